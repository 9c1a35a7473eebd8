"""`--dry_run` against what the loop then does."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig

from diffusers_safe.emoji.architecture import build_tokenizer
from diffusers_safe.erasure.job import make_options
from diffusers_safe.erasure.loop import ErasureLoop
from diffusers_safe.erasure.plan import make_plan
from diffusers_safe.families import make_family
from diffusers_safe.weights.trained import select_parameters


@pytest.fixture
def make_args(tiny_model_folder, tmp_path):
    def make(kind="sdd", model=tiny_model_folder, **changes):
        known = {"pretrained_model_name_or_path": str(model), "concepts": ["knife"], "output_dir": str(tmp_path / "o")}
        return make_options(kind, **{**known, "num_inference_steps": 4, "watch_prompts": [], **changes})

    return make


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("sdd", {}),
        ("sdd", {"retain_prompts": ["a cat"], "retain_unconditional": True, "negative_guidance_scale": 0.1}),
        ("sdd", {"sampling_guidance_scale": 1.0, "sampling_fraction": 0.5}),
        ("esd", {}),
        ("esd", {"erase_from": "a cat"}),
        ("sdd", {"latents_per_trajectory": 3}),
    ],
)
def test_the_forwards_of_the_plan_are_those_of_the_loop(make_args, make_tiny_pipeline, monkeypatch, kind, changes):
    args = make_args(kind, train_batch_size=4, **changes)
    plan = make_plan(args)
    loop = ErasureLoop(
        Accelerator(cpu=True), make_family(make_tiny_pipeline()), args.method.objective(args.concept.concepts), args
    )
    choices = loop.trajectories.stop_choices(args.sampling.sampling_fraction, args.sampling.latents_per_trajectory)
    draws = iter(8 * choices)  # every one equally often: the mean
    monkeypatch.setattr(loop.trajectories, "draw_stops", lambda *_: next(draws))
    before = loop.predictor.forwards
    for step in range(args.sampling.latents_per_trajectory):
        loop.train_step(step)
    num_samples = 4 * args.sampling.latents_per_trajectory
    assert loop.predictor.forwards - before == pytest.approx(num_samples * sum(plan.forwards.values()))


def test_the_forwards_of_a_pool_are_planned(make_args, make_tiny_pipeline):
    changes = {"trajectory_pool": 4, "latents_per_trajectory": 4, "sampling_model": "frozen", "max_train_steps": 5}
    args = make_args("esd", train_batch_size=2, **changes)
    plan = make_plan(args)
    loop = ErasureLoop(
        Accelerator(cpu=True), make_family(make_tiny_pipeline()), args.method.objective(args.concept.concepts), args
    )
    before = loop.predictor.forwards
    for step in range(5):
        loop.train_step(step)
    assert loop.predictor.forwards - before == pytest.approx(10 * sum(plan.forwards.values()))


def test_the_plan_counts_what_trains(make_args, tiny_pipeline):
    plan = make_plan(make_args(train_method="xattn-strict"), num_processes=2)
    names = select_parameters(tiny_pipeline.unet, "xattn-strict")
    parameters = dict(tiny_pipeline.unet.named_parameters())
    assert plan.selected == (len(names), sum(parameters[name].numel() for name in names))
    assert plan.total == (len(parameters), sum(parameter.numel() for parameter in parameters.values()))
    assert plan.num_samples == 2 * 1500
    assert "nothing was trained" in str(plan) and "knife by SDD" in str(plan)


@pytest.mark.parametrize("kind", ["sdd", "esd"])
@pytest.mark.parametrize("rank", [None, 4])
def test_the_memory_of_the_plan_is_what_the_loop_holds(make_args, make_tiny_pipeline, kind, rank):
    args = make_args(kind, rank=rank)
    memory = make_plan(args).memory
    pipeline = make_tiny_pipeline()
    loop = ErasureLoop(
        Accelerator(cpu=True), make_family(pipeline), args.method.objective(args.concept.concepts), args
    )
    model = list(pipeline.unet.parameters())
    held = {id(value) for value in model}
    weights = [loop.weights.student, loop.weights.frozen, loop.weights.ema or {}]
    copies = [value for part in weights for value in part.values() if id(value) not in held]

    def size(tensors):
        return 4 * sum(tensor.numel() for tensor in tensors)

    assert memory["model"] == size(model)
    assert memory["copies and gradients"] == size(copies) + size(loop.weights.student.values())
    assert memory["Adam"] == 2 * size(loop.weights.student.values())


def test_a_plan_reads_the_model_once(make_args, monkeypatch):
    """And does not check again what the command line has checked."""
    args = make_args()
    monkeypatch.setattr(type(args), "check_base_model", None)
    built = []
    plain = UNet2DConditionModel.from_config.__func__
    monkeypatch.setattr(
        UNet2DConditionModel, "from_config", classmethod(lambda cls, config: built.append(1) or plain(cls, config))
    )
    make_plan(args)
    assert len(built) == 1


@pytest.fixture(scope="module")
def real_size_folder(tmp_path_factory):
    """The configs of Stable Diffusion 1.5, no weights."""
    folder = tmp_path_factory.mktemp("real")
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet.save_config(folder / "unet")
    AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4).save_config(folder / "vae")  # fmt: skip
    CLIPTextConfig(hidden_size=768).save_pretrained(folder / "text_encoder")
    DDIMScheduler(beta_schedule="scaled_linear").save_config(folder / "scheduler")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
def test_a_model_of_real_size_is_planned_without_its_weights(make_args, real_size_folder):
    plan = make_plan(make_args(model=real_size_folder))
    assert plan.selected[0] == 80 and plan.total[1] == 859_520_964
    assert 3.4e9 < plan.memory["model"] < 3.5e9
    less = make_plan(make_args(model=real_size_folder, gradient_checkpointing=True))
    assert less.memory["activations"] < 0.5 * plan.memory["activations"]
    twice = make_plan(make_args(model=real_size_folder, train_batch_size=2))
    assert twice.memory["activations"] == pytest.approx(2 * plan.memory["activations"], rel=0.01)
    larger = make_plan(make_args(model=real_size_folder, resolution=768))
    assert larger.flops > 2 * plan.flops
    assert twice.flops == pytest.approx(plan.flops, rel=0.01)
