"""What training shows the denoiser is, call by call, what the stock pipeline's own `__call__` shows it."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from diffusers_safe.diffusion.trajectories import Trajectories, concatenate
from diffusers_safe.families import denoiser_of, make_family


STEPS, GUIDANCE_SCALE, PROMPT = 6, 3.0, "a knife"
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "edm-dpm++": EDMDPMSolverMultistepScheduler,  # of Playground v2.5, an SDXL
    "flow": FlowMatchEulerDiscreteScheduler,
}
CASES = [("sd-1", name) for name in ("ddim", "pndm", "euler", "dpm++")]
CASES += [("sd-2", name) for name in ("ddim", "euler", "dpm++")]
CASES += [("xl", name) for name in ("euler", "dpm++", "edm-dpm++")]
CASES += [("sd-3", "flow"), ("flux", "flow")]
RESOLUTIONS = {"flux": 64}  # instead of the model's own


@pytest.fixture
def make_pipeline(
    make_tiny_pipeline,
    make_tiny_sd_2_pipeline,
    make_tiny_xl_pipeline,
    make_tiny_sd3_pipeline,
    make_tiny_flux_pipeline,
):
    makers = {
        "sd-1": make_tiny_pipeline,
        "sd-2": make_tiny_sd_2_pipeline,
        "xl": make_tiny_xl_pipeline,
        "sd-3": make_tiny_sd3_pipeline,
        "flux": make_tiny_flux_pipeline,
    }

    def make(family, scheduler):
        pipeline = makers[family]()
        pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def recorded(denoiser, run):
    """Every input of the denoiser while `run()` runs: sample, timesteps, hidden states and added conditions, by
    name."""
    calls = []

    def record(module, args, kwargs):
        given = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args)), **kwargs}
        given["sample"] = given.pop("hidden_states", given.get("sample"))  # a transformer's name
        given["timestep"] = given["timestep"].expand(len(given["sample"]))
        given.update(given.pop("added_cond_kwargs", None) or {})
        calls.append({name: value.clone() for name, value in given.items() if torch.is_tensor(value)})

    hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    run()
    hook.remove()
    return calls


def inputs_of_the_pipeline(pipeline, generator, **sizes):
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "output_type": "latent", **sizes}
    return recorded(denoiser_of(pipeline), lambda: pipeline(PROMPT, generator=generator, **options))


def inputs_of_training(family, generator):
    """A trajectory up to its last latent, and one guided prediction there."""

    def predict(*inputs):
        return family.predict(family.denoiser, *inputs)

    def run():
        prompts, empty = family.encode([PROMPT]), family.encode([""])
        trajectories = Trajectories(
            family.make_scheduler, family.latent_shape, STEPS, GUIDANCE_SCALE, family.guidance_name
        )
        stops = [[trajectories.positions[-1]]]
        latents, timesteps = trajectories.sample(predict, prompts, empty, stops, [generator])
        with torch.no_grad():
            if (name := family.guidance_name) is not None:
                predict(latents, timesteps, {**prompts, name: torch.full((1,), GUIDANCE_SCALE)})
            else:
                predict(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), concatenate(empty, prompts))

    return recorded(family.denoiser, run)


def check_the_same(pipeline, resolution=None):
    family = make_family(pipeline, resolution)
    sizes = {} if resolution is None else {"height": resolution, "width": resolution}
    theirs = inputs_of_the_pipeline(pipeline, torch.Generator().manual_seed(7), **sizes)
    ours = inputs_of_training(family, torch.Generator().manual_seed(7))
    assert len(ours) == len(theirs) >= STEPS
    for mine, expected in zip(ours, theirs):
        assert mine.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(mine[name], expected[name], rtol=1e-4, atol=1e-5, check_dtype=False)
    return ours


@pytest.mark.parametrize("family, scheduler", CASES)
def test_every_input_of_the_denoiser_is_that_of_the_pipelines_own_call(make_pipeline, family, scheduler):
    inputs = check_the_same(make_pipeline(family, scheduler), RESOLUTIONS.get(family))
    assert 0.8 < inputs[0]["sample"].std() < 1.2  # scaled, where Euler's latents start at 14
    assert ("time_ids" in inputs[0]) == (family == "xl")
    assert ("guidance" in inputs[0]) == (family == "flux")


@pytest.mark.parametrize("family, scheduler", [("sd-1", "euler"), ("xl", "euler"), ("sd-3", "flow"), ("flux", "flow")])
@pytest.mark.parametrize("pixels", [32, 80])
def test_at_another_resolution_too(make_pipeline, family, scheduler, pixels):
    sample = check_the_same(make_pipeline(family, scheduler), pixels)[0]["sample"]
    assert sample.shape == ((1, (pixels // 16) ** 2, 16) if family == "flux" else (2, 4, pixels // 8, pixels // 8))


def test_a_model_that_learned_an_encoded_empty_prompt_gets_that(make_pipeline):
    pipeline = make_pipeline("xl", "euler")
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    (uncond, _) = check_the_same(pipeline)[0]["encoder_hidden_states"]
    assert uncond.abs().max() > 0


@pytest.mark.parametrize("t5", [True, False])
def test_a_schedule_that_is_shifted_by_the_size_and_a_pipeline_without_t5(make_tiny_sd3_pipeline, t5):
    pipeline = make_tiny_sd3_pipeline(t5=t5)
    pipeline.set_progress_bar_config(disable=True)
    plain = check_the_same(pipeline, 80)
    config = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 36}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **config)
    shifted = check_the_same(pipeline, 80)
    assert not torch.equal(shifted[1]["timestep"], plain[1]["timestep"])
    assert plain[0]["encoder_hidden_states"][:, 32:].any() == t5
