from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_safe import erase
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.run import make_samples
from diffusers_safe.generation.generate import GenerationSettings
from diffusers_safe.provenance import fingerprint
from diffusers_safe.report import grid
from diffusers_safe.training import samples
from diffusers_safe.training.samples import Samples
from diffusers_safe.weights.trained import TrainedWeights, select_parameters


@pytest.fixture
def weights(tiny_pipeline):
    return TrainedWeights(tiny_pipeline.unet, select_parameters(tiny_pipeline.unet, "xattn"), ema_decay=0.5)


def test_before_is_the_base_model_and_after_is_what_is_asked_for(tiny_pipeline, weights, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        samples,
        "draw_grid",
        lambda groups, caption, sides: drawn.append((groups, caption)) or grid.draw_grid(groups, caption, sides),
    )
    pictures = Samples(tiny_pipeline, weights, ["a", "b"], ["a cat"], 2, 5, GenerationSettings(2))
    pictures.draw()
    with torch.no_grad():
        for value in weights.student.values():
            value.add_(torch.randn_like(value))
    learned = {name: value.clone() for name, value in weights.student.items()}
    pictures.draw("student")
    pictures.draw("ema")
    (first, caption), (second, _), (third, _) = drawn
    assert [group.prompts for group in first] == [["a", "b"], ["a cat"]] and "seeds 5 to 6" in caption
    assert caption.startswith("Before and after with the same noise")

    def flat(groups):
        return [[[np.asarray(image).astype(int) for row in rows for image in row]
                 for rows in (group.before, group.after)] for group in groups]  # fmt: skip

    def apart(first, second):
        """The largest difference of each pair of pictures, of 255."""
        return [np.abs(one - other).max() for one, other in zip(first, second, strict=True)]

    untouched, changed, averaged = flat(first), flat(second), flat(third)
    for group, (before, after) in enumerate(changed):
        for same in (untouched[group][0], untouched[group][1], averaged[group][1]):  # the EMA has not moved
            assert max(apart(same, before)) <= 1
        assert min(apart(before, after)) > 3
    for one, other in combinations(untouched[0][0], 2):  # every prompt and seed is a picture of its own
        assert np.abs(one - other).max() > 3
    assert all(torch.equal(value, learned[name]) for name, value in weights.student.items())


@pytest.fixture
def arguments(tiny_model_folder, tmp_path):
    known = {"pretrained_model_name_or_path": tiny_model_folder, "output_dir": str(tmp_path)}
    return lambda **changes: make_options("sdd", **{**known, **changes})


def test_what_is_drawn_of_a_run(tiny_pipeline, weights, arguments):
    concepts = [f"concept{i}" for i in range(10)]
    some = make_samples(tiny_pipeline, weights, arguments(concepts=concepts, watch_prompts=["a cat"]))
    assert (some.erased, some.kept) == (["concept0", "concept2", "concept5", "concept7"], ["a cat"])
    prompts = ["a big Gun", "a cat"]
    named = make_samples(tiny_pipeline, weights, arguments(concepts=["gun"], validation_prompts=prompts))
    assert (named.erased, named.kept) == (["a big Gun"], ["a cat"])


def test_validation_draws_when_it_is_due_and_changes_nothing(on_cpu, make_tiny_pipeline, tmp_path):
    run = {"method": "sdd", "max_train_steps": 5, "num_inference_steps": 3, "learning_rate": 1e-3,
           "watch_prompts": ["a cat"], "progress_bar": False}  # fmt: skip
    quiet = erase(make_tiny_pipeline(), ["knife"], **run)
    drawn = erase(
        make_tiny_pipeline(), ["knife"], output_dir=str(tmp_path), report_to="tensorboard", validation_steps=2,
        validation_prompts=["a knife", "a cat"], **run,
    )  # fmt: skip
    assert fingerprint(drawn.pipeline.unet) == fingerprint(quiet.pipeline.unet)
    pictures = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert pictures == ["step-2.png", "step-4.png", "step-5.png"]
    with Image.open(tmp_path / "validation" / "step-5.png") as picture:
        assert picture.width > 300
    (events,) = (tmp_path / "logs" / "diffusers-safe").glob("events.out*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert [event.step for event in reader.Images("validation")] == [2, 4, 5]


def test_a_student_stands_below_its_teacher_and_leaves_it_as_it_was(make_tiny_pipeline, monkeypatch):
    teacher, pipeline = make_tiny_pipeline(seed=1), make_tiny_pipeline()
    teacher.unet.to(torch.bfloat16)
    weights = TrainedWeights(pipeline.unet, select_parameters(pipeline.unet, "full"), keeps_frozen=False)
    drawn = []
    monkeypatch.setattr(samples, "draw_grid", lambda groups, caption, sides: drawn.append((groups, caption, sides)))
    Samples(pipeline, weights, [], ["a cat"], settings=GenerationSettings(2), teacher=teacher).draw()
    (((group,), caption, sides),) = drawn
    assert sides == ("teacher", "student") and caption.startswith("Teacher and student") and group.title == "to learn"
    assert group.before[0][0].tobytes() != group.after[0][0].tobytes()
    assert teacher.unet.dtype == torch.bfloat16
