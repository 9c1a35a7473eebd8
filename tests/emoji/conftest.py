import pytest

from diffusers_safe.emoji.classifier import HEADS
from diffusers_safe.emoji.scenes import OBJECTS, group_members


class ScriptedJudge:
    """Answers what it was told to, call by call; `None` takes the first label of a head."""

    def __init__(self, *objects, styles=()):
        self.objects, self.styles = list(objects), list(styles)

    def classify(self, pictures):
        names = {head: [labels[0]] * len(pictures) for head, labels in HEADS.items()}
        if self.objects and (answer := self.objects.pop(0)) is not None:
            assert len(answer) == len(pictures)
            names["object"] = answer
        if self.styles:
            names["style"] = self.styles.pop(0)
        return names


@pytest.fixture
def scripted_judge():
    return ScriptedJudge


@pytest.fixture
def perfect():
    """What a judge would see if every image showed what was asked for."""

    def answers(rows):
        return [name if (name := row.labels["subject"]) in OBJECTS else group_members(name)[0] for row in rows]

    return answers
