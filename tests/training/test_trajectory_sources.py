"""Samples are functions of their numbers, however trajectories are reused and batches are cut."""

import pytest
import torch

from diffusers_safe.diffusion.generators import sample_generator


STOPS = 6
FROZEN = {"method": "esd", "sampling_model": "frozen"}


@pytest.fixture
def make_loop(make_loop):
    """The same with a schedule of `STOPS` steps, and one concept a sample."""
    settings = {"num_inference_steps": STOPS, "prompt_order": "matched", "max_train_steps": 6, "watch_prompts": []}
    return lambda **changes: make_loop(**{**settings, **changes})


def batches(source, steps, size=2):
    return [source.batch(step, range(size)) for step in steps]


def same(first, second):
    return (
        torch.equal(first.model_input, second.model_input)
        and torch.equal(first.timesteps, second.timesteps)
        and first.prompts == second.prompts
    )


def weights(loop):
    return {name: value.detach().clone() for name, value in loop.weights.student.items()}


def test_draws_depend_on_seed_purpose_and_number_only():
    def draw(*key):
        return torch.randn(3, generator=sample_generator(*key))

    assert torch.equal(draw(0, "erase", 5), draw(0, "erase", 5))
    others = [draw(1, "erase", 5), draw(0, "retain", 5), draw(0, "erase", 6)]
    assert not any(torch.equal(draw(0, "erase", 5), other) for other in others)


def test_a_trajectory_serves_as_many_steps_as_it_has_latents(make_loop):
    """Each slot follows one trajectory, one concept, through all its stops; then it gets another."""
    loop = make_loop(latents_per_trajectory=STOPS, train_batch_size=2)
    first = batches(loop.erasing, range(STOPS))
    second = batches(loop.erasing, range(STOPS, 2 * STOPS))
    for row in range(2):
        assert {batch.prompts[row] for batch in first} == {["knife", "gun"][row]}
        assert len({int(batch.timesteps[row]) for batch in first}) == STOPS
    for earlier, later in zip(first, second):
        assert earlier.prompts == later.prompts and not torch.equal(earlier.model_input, later.model_input)


def test_forwards_of_a_step_in_exact_mode_are_those_of_the_rule(make_loop):
    """Guidance, two of them, for each step of the way; then the target and the student."""
    loop = make_loop(max_train_steps=4)
    scheduler = loop.predictor.family.make_scheduler()
    scheduler.set_timesteps(STOPS)
    for step in range(4):
        (t,) = loop.erasing.batch(step, range(1)).timesteps
        loop.erasing._batches.clear()
        before = loop.predictor.forwards
        loop.train_step(step)
        assert loop.predictor.forwards - before == 2 * scheduler.timesteps.tolist().index(t) + 2


def test_forwards_of_reused_trajectories(make_loop):
    loop = make_loop(latents_per_trajectory=STOPS, max_train_steps=STOPS)
    before = loop.predictor.forwards
    for step in range(STOPS):
        loop.train_step(step)
    assert loop.predictor.forwards - before == 2 * (STOPS - 1) + 2 * STOPS


def test_forwards_with_a_pool_are_those_of_the_loss(make_loop):
    loop = make_loop(**FROZEN, trajectory_pool=3)
    loop.erasing.prepare()
    before = loop.predictor.forwards
    for step in range(6):
        loop.train_step(step)
    assert loop.predictor.forwards - before == 6 * 3  # nothing and the concept, frozen; the student


def test_a_pool_that_lasts_is_the_exact_rule(make_loop):
    """Trajectory n of the pool is trajectory n of a run without one."""
    settings = {"retain_prompts": ["a cat", "a tree"], "train_batch_size": 2, **FROZEN}
    exact, pooled = (make_loop(folder=f"{n}", trajectory_pool=n, **settings) for n in (0, 100))
    for one, other in ((exact.erasing, pooled.erasing), (exact.retaining, pooled.retaining)):
        for step in range(6):
            ours, theirs = one.batch(step, range(2)), other.batch(step, range(2))
            assert ours.prompts == theirs.prompts and torch.equal(ours.timesteps, theirs.timesteps)
            torch.testing.assert_close(ours.model_input, theirs.model_input, rtol=1e-4, atol=1e-4)
    assert len(pooled.erasing._pool) == 12  # no trajectory that is never used


def test_a_pool_gives_every_latent_of_every_trajectory_before_one_again(make_loop):
    loop = make_loop(**FROZEN, trajectory_pool=4, latents_per_trajectory=3, max_train_steps=24)
    seen = batches(loop.erasing, range(24), size=1)
    assert all(same(seen[i], seen[i + 12]) for i in range(12))
    latents = torch.cat([batch.model_input for batch in seen[:12]])
    assert len(latents.flatten(1).unique(dim=0)) == 12


def test_only_what_the_frozen_model_draws_is_pooled(make_loop):
    loop = make_loop(retain_prompts=["a cat"], trajectory_pool=2)
    loop.run()
    assert not hasattr(loop.erasing, "_pool") and len(loop.retaining._pool) == 2


REUSES = {"stops": {"latents_per_trajectory": 4}, "pool": {"latents_per_trajectory": 2, "trajectory_pool": 3}}


@pytest.mark.parametrize("name", REUSES)
def test_batch_size_accumulation_and_processes_change_no_draw(make_loop, name):
    """Slots are what a step is cut into; two processes or batches ask for one each here."""
    settings = {"retain_prompts": ["a cat", "a tree"], **REUSES[name]}
    whole = make_loop(folder="whole", train_batch_size=2, **settings)
    parts = [make_loop(folder=f"part{i}", gradient_accumulation_steps=2, **settings) for i in range(2)]
    for step in range(5):
        for purpose in ("erasing", "retaining"):
            together = getattr(whole, purpose).batch(step, range(2))
            alone = [getattr(part, purpose).batch(step, range(i, i + 1)) for i, part in enumerate(parts)]
            assert together.prompts == [text for batch in alone for text in batch.prompts]
            assert torch.equal(together.timesteps, torch.cat([batch.timesteps for batch in alone]))
            latents = torch.cat([batch.model_input for batch in alone])
            torch.testing.assert_close(together.model_input, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REUSES)
def test_a_run_resumed_amid_a_trajectory_ends_bit_for_bit_where_an_undisturbed_one_does(make_loop, tmp_path, name):
    settings = {"retain_prompts": ["a cat", "a tree"], "learning_rate": 1e-2, **REUSES[name]}
    whole = make_loop(folder="whole", checkpointing_steps=3, **settings)
    whole.run()
    resumed = make_loop(folder="resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    resumed.run()
    assert all(torch.equal(value, weights(resumed)[n]) for n, value in weights(whole).items())


def test_reuse_of_a_resumed_run_must_be_that_of_the_checkpoint(make_loop, tmp_path):
    make_loop(folder="first", checkpointing_steps=3).run()
    checkpoint = str(tmp_path / "first" / "checkpoint-3")
    with pytest.raises(ValueError, match="another run: latents_per_trajectory 1 there, 2 here"):
        make_loop(folder="second", latents_per_trajectory=2, resume_from_checkpoint=checkpoint).run()


@pytest.mark.parametrize(
    "schedule, turns", [("sequential", ["knife"] * 4 + ["gun"] * 4), ("iterative", ["knife"] * 8)]
)
def test_concepts_take_turns_by_trajectory(make_loop, schedule, turns):
    loop = make_loop(concept_schedule=schedule, latents_per_trajectory=4, max_train_steps=8, train_batch_size=2)
    assert [loop.erasing.batch(step, range(2)).prompts[0] for step in range(8)] == turns
