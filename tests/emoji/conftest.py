import pytest
import torch
from torch import nn

from diffusers_safe.emoji.classifier import HEADS
from diffusers_safe.emoji.scenes import OBJECTS, group_members


class ScriptedJudge(nn.Module):
    """Returns given labels image by image, and then the first label of each head."""

    def __init__(self, *objects, styles=()):
        super().__init__()
        self.script = {"object": sum(objects, []), "style": sum(styles, [])}

    def classify(self, pictures):
        return {head: self._next(head, len(pictures)) for head in HEADS}

    def forward(self, pixels):
        names = self.classify(pixels)
        return {
            head: torch.tensor([[20.0 * (label == name) for label in labels] for name in names[head]])
            for head, labels in HEADS.items()
        }

    def levels(self, pixels):
        return [pixels]

    def _next(self, head, count):
        script = self.script.get(head, [])
        names, script[:count] = script[:count], []
        assert len(names) in (0, count)
        return names or [HEADS[head][0]] * count


@pytest.fixture
def scripted_judge():
    return ScriptedJudge


@pytest.fixture
def perfect():
    """The labels of a judge if every image showed the requested scene."""

    def answers(rows):
        return [name if (name := row.labels["subject"]) in OBJECTS else group_members(name)[0] for row in rows]

    return answers
