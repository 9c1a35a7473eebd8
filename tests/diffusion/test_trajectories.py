"""Latents and timesteps belong together, whatever the scheduler."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from diffusers_safe.diffusion.trajectories import Trajectories, concatenate, repeat


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "euler-leading": lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    "euler-ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
    "dpm++": lambda: DPMSolverMultistepScheduler(**BETAS),
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "ddpm": lambda: DDPMScheduler(**BETAS, clip_sample=False),
}
SHAPE = (4, 8, 8)
EMPTY = {"prompt": torch.zeros(1, 1)}


def toy_predict(model_input, timesteps, conditioning):
    """A smooth stand-in for a UNet that feels input, timestep and prompt."""
    return torch.tanh(model_input + 0.001 * timesteps.view(-1, 1, 1, 1) + conditioning["prompt"].view(-1, 1, 1, 1))


def set_up(make_scheduler):
    """As a family makes its scheduler, for a number of steps."""

    def make(num_inference_steps):
        scheduler = make_scheduler()
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    return make


def draw(make_scheduler, stops, predict=toy_predict, guidance_scale=3.0):
    trajectories = Trajectories(set_up(make_scheduler), SHAPE, 10, guidance_scale)
    prompts = {"prompt": torch.linspace(0.1, 0.5, len(stops)).view(-1, 1)}
    generators = [torch.Generator().manual_seed(i) for i in range(len(stops))]
    return trajectories.sample(predict, prompts, EMPTY, stops, generators)


def plain_pipeline_inputs(make_scheduler, row, rows):
    """The (model_input, timestep) pairs that a pipeline's own loop shows its UNet, written out plainly."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(row)
    latents = torch.randn((1, *SHAPE), generator=generator) * scheduler.init_noise_sigma
    prompt = {"prompt": torch.linspace(0.1, 0.5, rows)[row].view(1, 1)}
    stochastic = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    seen = []
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, t)
        seen.append((model_input, t))
        uncond = toy_predict(model_input, t.expand(1), EMPTY)
        cond = toy_predict(model_input, t.expand(1), prompt)
        latents = scheduler.step(uncond + 3.0 * (cond - uncond), t, latents, **stochastic, return_dict=False)[0]
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_zero_steps_give_the_initial_noise(name):
    make_scheduler = SCHEDULERS[name]
    model_input, timesteps = draw(make_scheduler, [[0], [0]])
    scheduler = make_scheduler()
    scheduler.set_timesteps(10)
    assert timesteps.tolist() == [scheduler.timesteps[0].item()] * 2
    for row in range(2):
        noise = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(row)) * scheduler.init_noise_sigma
        expected = scheduler.scale_model_input(noise, scheduler.timesteps[0])
        assert torch.equal(model_input[row : row + 1], expected)
        assert 0.8 < model_input[row].std() < 1.2


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_stop_is_what_the_pipeline_shows_its_unet_there(name):
    make_scheduler = SCHEDULERS[name]
    positions = Trajectories(set_up(make_scheduler), SHAPE, 10).positions
    model_input, timesteps = draw(make_scheduler, [[position] for position in positions])
    for row, position in enumerate(positions):
        expected_input, expected_timestep = plain_pipeline_inputs(make_scheduler, row, len(positions))[position]
        assert timesteps[row] == expected_timestep
        torch.testing.assert_close(model_input[row : row + 1], expected_input, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_timestep_is_trained_once(name):
    trajectories = Trajectories(set_up(SCHEDULERS[name]), SHAPE, 10)
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(10)
    visited = [scheduler.timesteps[i].item() for i in trajectories.positions]
    assert sorted(visited) == sorted(set(scheduler.timesteps.tolist()))
    generator = torch.Generator().manual_seed(0)
    assert {trajectories.draw_stops(generator)[0] for _ in range(400)} == set(trajectories.positions)


def test_a_fraction_keeps_to_the_beginning():
    trajectories = Trajectories(set_up(SCHEDULERS["ddim"]), SHAPE, 10)
    generator = torch.Generator().manual_seed(0)
    for fraction, expected in ((0.4, {0, 1, 2, 3}), (0.7, set(range(7))), (0.01, {0})):
        assert {trajectories.draw_stops(generator, fraction)[0] for _ in range(200)} == expected


def test_forwards_are_only_those_that_are_needed():
    """Samples that have stopped are not computed on, and 0 steps compute nothing."""
    rows = []

    def counting(model_input, timesteps, conditioning):
        rows.append(len(model_input))
        return toy_predict(model_input, timesteps, conditioning)

    draw(SCHEDULERS["ddim"], [[0], [3], [1]], counting)
    assert rows == [4, 2, 2]
    rows.clear()
    draw(SCHEDULERS["ddim"], [[0], [3], [1]], counting, guidance_scale=1.0)
    assert rows == [2, 1, 1]
    rows.clear()
    draw(SCHEDULERS["ddim"], [[0], [0]], counting)
    assert rows == []


def test_a_batch_is_its_samples():
    """What a sample is does not depend on its neighbours."""
    together, _ = draw(SCHEDULERS["dpm++"], [[7], [2]])
    trajectories = Trajectories(set_up(SCHEDULERS["dpm++"]), SHAPE, 10, 3.0)
    alone, _ = trajectories.sample(
        toy_predict, {"prompt": torch.full((1, 1), 0.1)}, EMPTY, [[7]], [torch.Generator().manual_seed(0)]
    )
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_several_stops_of_a_trajectory_are_those_of_single_ones(name):
    make_scheduler = SCHEDULERS[name]
    positions = Trajectories(set_up(make_scheduler), SHAPE, 10).positions
    stops = [positions[6], positions[0], positions[9], positions[3]]
    several, timesteps = draw(make_scheduler, [stops, stops[:2]])
    for column, stop in enumerate(stops):
        single, t = draw(make_scheduler, [[stop], [stop]])
        torch.testing.assert_close(several[column], single[0])
        assert timesteps[column] == t[0]
        if column < 2:
            torch.testing.assert_close(several[4 + column], single[1])
            assert timesteps[4 + column] == t[1]


def test_a_trajectory_of_several_stops_costs_no_more_than_its_last():
    rows = []

    def counting(model_input, timesteps, conditioning):
        rows.append(len(model_input))
        return toy_predict(model_input, timesteps, conditioning)

    draw(SCHEDULERS["ddim"], [[2, 0, 1], [1, 3]], counting)
    assert rows == [4, 4, 2]


def test_stops_are_spread_over_the_schedule_and_each_is_uniform():
    trajectories = Trajectories(set_up(SCHEDULERS["pndm"]), SHAPE, 10)
    generator = torch.Generator().manual_seed(0)
    draws = [trajectories.draw_stops(generator, 1.0, 5) for _ in range(300)]
    for column in zip(*draws):
        assert set(column) == set(trajectories.positions)
    for stops in draws:
        ranks = sorted(trajectories.positions.index(stop) for stop in stops)
        assert [later - earlier for earlier, later in zip(ranks, ranks[1:])] == [2] * 4
    assert set(trajectories.draw_stops(generator, 0.5, 5)) == set(trajectories.positions[:5])
    with pytest.raises(ValueError, match="latents_per_trajectory 6: must be at most 5"):
        trajectories.draw_stops(generator, 0.5, 6)


def test_conditioning_helpers():
    one, two = {"a": torch.ones(1, 2), "b": torch.ones(1, 3, 4)}, {"a": torch.zeros(2, 2), "b": torch.zeros(2, 3, 4)}
    both = concatenate(repeat(one, 3), two)
    assert both["a"].shape == (5, 2) and both["b"].shape == (5, 3, 4)


def test_bad_step_count():
    with pytest.raises(ValueError, match="num_inference_steps 0"):
        Trajectories(set_up(SCHEDULERS["ddim"]), SHAPE, 0)
