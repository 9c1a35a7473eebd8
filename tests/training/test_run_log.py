"""What a run tells: read as TensorBoard reads it."""

import json

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_safe import erase
from diffusers_safe.training.run_log import ConceptLosses, _keep


pytestmark = pytest.mark.usefixtures("on_cpu")


def test_the_tracker_gets_losses_by_concept_rate_and_speed(tiny_pipeline, tmp_path):
    erase(
        tiny_pipeline, ["knife", "gun"], "sdd", output_dir=str(tmp_path), report_to="tensorboard", progress_bar=False,
        max_train_steps=4, num_inference_steps=3, learning_rate=1e-3, lr_scheduler="linear", watch_prompts=["a cat"],
        retain_unconditional=True, prompt_order="matched",
    )  # fmt: skip
    (events,) = (tmp_path / "logs" / "diffusers-safe").glob("events.out*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    told = {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}
    assert told["learning_rate"] == pytest.approx({1: 7.5e-4, 2: 5e-4, 3: 2.5e-4, 4: 0.0})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("erase", "retain_unconditional", "concept_left", "drift"):
        assert told[name] == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-5)
    assert told["loss/knife"].keys() == {1, 3} and told["loss/gun"].keys() == {2, 4}
    assert all(value > 0 for value in told["forwards_per_second"].values())


def test_a_line_that_was_cut_off_does_not_hinder_the_next_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "era')
    _keep(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1}\n{"step": 3, "era')
    _keep(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_mean_losses_of_concepts_since_they_were_last_asked_for():
    accelerator = Accelerator(cpu=True)
    losses = ConceptLosses(["knife", "gun", "knife", "axe"])  # a prompt may have two purposes
    losses.add(["knife", "gun", "knife"], torch.tensor([1.0, 5.0, 3.0]))
    assert losses.take(accelerator) == {"knife": 2.0, "gun": 5.0}
    losses.add(["axe"], torch.tensor([4.0]))
    assert losses.take(accelerator) == {"axe": 4.0}
