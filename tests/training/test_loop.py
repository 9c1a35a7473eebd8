"""The loop as a whole, in this process; tests/training/test_sdd.py runs the command."""

import json

import pytest
import torch

from closeness import ROUNDING, difference, trained
from diffusers_safe.methods.sdd import SDD_TARGETS
from diffusers_safe.training.options import LR_SCHEDULERS


def result(loop):
    return {name: value.detach().clone() for name, value in loop.predictor.family.denoiser.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


with_and_without_lora = pytest.mark.parametrize("rank", [None, 2])


def test_frozen_weights_stay_bit_identical_and_selected_ones_move(make_loop, make_tiny_pipeline):
    loop = make_loop(retain_prompts=["a cat"])
    loop.run()
    before = dict(make_tiny_pipeline().unet.named_parameters())
    assert trained(before, result(loop), loop.weights.student) == set(loop.weights.student)


@pytest.mark.parametrize("target", SDD_TARGETS)
def test_a_lora_leaves_the_base_bit_identical(make_loop, make_tiny_pipeline, target):
    loop = make_loop(rank=2, train_method="full", sdd_target=target, retain_prompts=["a cat"])
    start = {name: value.detach().clone() for name, value in loop.weights.student.items()}
    loop.run()
    after = {name.replace(".base_layer.", "."): value for name, value in result(loop).items() if ".lora_" not in name}
    before = dict(make_tiny_pipeline().unet.named_parameters())
    assert after.keys() == before.keys() and same(after, before)
    assert trained(start, loop.weights.student, start) == set(start)


def test_the_same_seed_is_the_same_run_and_another_is_not(make_loop):
    loops = [make_loop(f"run{i}", seed=seed) for i, seed in enumerate((3, 3, 4))]
    for loop in loops:
        loop.run()
    first, second, other = map(result, loops)
    assert same(first, second) and not same(first, other)


@with_and_without_lora
def test_the_ema_is_published(make_loop, rank):
    loop = make_loop(rank=rank)
    loop.run()
    assert all(torch.equal(loop.weights.student[name], value) for name, value in loop.weights.ema.items())


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rate_schedules(make_loop, name):
    """Warm-up reaches the peak after its own steps, whatever follows."""
    warmup = 0 if name == "constant" else 2
    loop = make_loop(lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=6, learning_rate=0.5)
    rates = []
    for _ in range(6):
        rates.append(loop.optimizer.param_groups[0]["lr"])
        loop.optimizer.step()
        loop.lr_scheduler.step()
    assert rates[warmup] == pytest.approx(0.5)
    assert rates[:warmup] == pytest.approx([0.0, 0.25][:warmup])
    assert (rates[-1] == pytest.approx(0.5)) == name.startswith("constant")


@with_and_without_lora
def test_mixed_precision_keeps_student_ema_and_frozen_apart(make_loop, rank):
    """Autocast remembers low-precision copies of parameters; a swap must not be answered with an old one."""
    loop = make_loop(
        mixed_precision="bf16", retain_prompts=["a cat"], learning_rate=1e-2 if rank is None else 1e-1, rank=rank
    )
    assert all(value.dtype == torch.float32 for value in loop.weights.student.values())
    terms = [loop.train_step(step) for step in range(3)]
    assert terms[0]["retain"] < 1e-6 and terms[2]["retain"] > 1e-4
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]), ["knife"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predictions = [loop.predictor(*inputs, which) for which in ("ema", "student", "frozen")]
    for first in range(3):
        assert difference(predictions[first], predictions[first - 1]) > 10 * ROUNDING


def test_a_checkpoint_of_another_run_is_refused(make_loop, tmp_path):
    make_loop("first", max_train_steps=2, checkpointing_steps=1).run()
    other = make_loop("second", learning_rate=2e-3, resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    with pytest.raises(ValueError, match="another run: learning_rate 0.001 there, 0.002 here"):
        other.run()


def test_a_checkpoint_that_trained_other_weights_is_refused_by_name(make_loop, tmp_path):
    make_loop("first", max_train_steps=2, checkpointing_steps=1).run()
    checkpoint = tmp_path / "first" / "checkpoint-1"
    with pytest.raises(ValueError, match="another run: .*train_method xattn there, selfattn here"):
        make_loop("second", train_method="selfattn", resume_from_checkpoint=str(checkpoint)).run()
    (checkpoint / "run.json").unlink()
    with pytest.raises(ValueError, match="has no run.json"):
        make_loop("third", resume_from_checkpoint=str(checkpoint)).run()


def test_a_lora_is_not_continued_by_another_or_on_another_base(make_loop, make_tiny_pipeline, tmp_path):
    make_loop("first", max_train_steps=2, checkpointing_steps=1, rank=2).run()
    checkpoint = str(tmp_path / "first" / "checkpoint-1")
    for changes, message in (
        ({"rank": None}, "rank 2 there, None here"),
        ({"lora_alpha": 1.0}, "lora_alpha 2.0 there"),
    ):
        other = make_loop("second", resume_from_checkpoint=checkpoint, **{"rank": 2, **changes})
        with pytest.raises(ValueError, match=f"another run: .*{message}"):
            other.run()
    other = make_loop("third", rank=2, resume_from_checkpoint=checkpoint, pipeline=make_tiny_pipeline(seed=1))
    with pytest.raises(ValueError, match="another run: base_weights"):
        other.run()


def test_a_loss_that_is_not_finite_ends_the_run(make_loop, tmp_path):
    loop = make_loop()
    with torch.no_grad():
        next(iter(loop.weights.student.values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: the loss is"):
        loop.run()


@pytest.mark.slow
def test_a_run_may_grow_where_no_earlier_step_would_have_been_another(make_loop, tmp_path):
    whole = make_loop("whole", max_train_steps=4)
    whole.run()
    make_loop("short", max_train_steps=3, checkpointing_steps=2).run()
    checkpoint = str(tmp_path / "short" / "checkpoint-2")
    grown = make_loop("short", max_train_steps=4, resume_from_checkpoint=checkpoint)
    grown.run()
    assert same(result(whole), result(grown))
    for changes in ({"lr_scheduler": "cosine"}, {"concept_schedule": "sequential"}):
        make_loop("other", max_train_steps=3, checkpointing_steps=2, **changes).run()
        checkpoint = str(tmp_path / "other" / "checkpoint-2")
        longer = make_loop("longer", max_train_steps=4, resume_from_checkpoint=checkpoint, **changes)
        with pytest.raises(ValueError, match="max_train_steps 3 there, 4 here"):
            longer.run()


@pytest.mark.parametrize("schedule, rank", [("sequential", None), ("random", None), ("random", 2)])
def test_resumed_equals_uninterrupted_bit_for_bit(make_loop, tmp_path, schedule, rank):
    whole = make_loop("whole", max_train_steps=6, checkpointing_steps=2, concept_schedule=schedule, rank=rank)
    whole.run()
    assert (tmp_path / "whole" / "checkpoint-4").is_dir()
    resumed = make_loop(
        "resumed",
        max_train_steps=6,
        concept_schedule=schedule,
        rank=rank,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"),
    )
    resumed.run()
    assert same(result(whole), result(resumed))


def test_a_checkpoint_holds_the_trained_weights_only(make_loop, tmp_path):
    make_loop(max_train_steps=2, checkpointing_steps=1).run()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert not any(name.endswith(".safetensors") for name in names)


@with_and_without_lora
def test_accumulation_equals_a_larger_batch(make_loop, monkeypatch, rank):
    """Gradients, not weights after Adam: its division by sqrt(v) turns rounding into steps."""
    gradients = []
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")  # as `accelerate launch` may set it
    for batch_size, accumulation in ((2, 1), (1, 2)):
        loop = make_loop(
            f"{batch_size}", train_batch_size=batch_size, gradient_accumulation_steps=accumulation, rank=rank
        )
        loop.optimizer.step = loop.optimizer.zero_grad = lambda: None
        loop.options.optimizer.max_grad_norm = 1e9
        loop.train_step(0)
        gradients.append({name: value.grad for name, value in loop.weights.student.items()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-6)


def test_a_fraction_of_the_schedule_is_its_beginning(make_loop):
    loop = make_loop(sampling_fraction=0.5, train_batch_size=16)
    batch = loop.erasing.batch(0, range(16))
    scheduler = loop.predictor.family.make_scheduler()
    scheduler.set_timesteps(4)
    assert set(batch.timesteps.tolist()) == set(scheduler.timesteps[:2].tolist())


def test_the_log_tells_loss_and_what_is_left(make_loop, tmp_path):
    make_loop(retain_prompts=["a cat"]).run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0].keys() == {"step", "erase", "retain", "concept_left", "drift", "by_concept"}
    assert rows[0]["by_concept"].keys() == {"knife"} and rows[1]["by_concept"].keys() == {"gun"}
    assert rows[0]["by_concept"]["knife"] == pytest.approx(rows[0]["erase"])
    assert rows[-1]["concept_left"] != rows[0]["concept_left"]


def test_collapse_is_announced(make_loop, caplog):
    make_loop(learning_rate=1.0, max_train_steps=4).run()
    assert [record.message for record in caplog.records if "collapsing" in record.message]
