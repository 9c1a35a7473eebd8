"""A family that the package does not know goes through every room: found, trained, saved, published, attacked."""

from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from closeness import ROUNDING, difference
from diffusers_safe import export
from diffusers_safe.attacks import InversionSettings
from diffusers_safe.attacks.token import added_token, read_token
from diffusers_safe.attacks.token_learning import TOKEN, learn_token
from diffusers_safe.commands.students import StudentsArguments, check_surroundings
from diffusers_safe.diffusion.loss_weighting import LossWeighting
from diffusers_safe.diffusion.noise import NoiseSchedule, TimestepBias
from diffusers_safe.diffusion.trajectories import Trajectories
from diffusers_safe.erasure.run import erase, run_command
from diffusers_safe.families import (
    StoredModel,
    check_files,
    load_pipeline,
    make_family,
    register_family,
    registry,
    stored_denoiser,
)
from diffusers_safe.families.cost import forward_flops, macs, training_cost
from diffusers_safe.formats import LORA_NAME, PARTIAL_NAME, load_partial, read_erased_weights, save_lora, save_partial
from diffusers_safe.generation.generate import GenerationSettings, PromptRow, generate
from diffusers_safe.generation.models import SteeredModel
from diffusers_safe.hub import Base, erasure_card
from diffusers_safe.pipelines import enable_safe_latent_diffusion
from diffusers_safe.provenance import Provenance, fingerprint
from diffusers_safe.weights.lora import LoRAWeights, fused
from diffusers_safe.weights.trained import TrainedWeights, select_parameters
from toy_family import ErasedToyPipeline, ToyFamily, ToyPipeline, build_toy_pipeline, registered


@pytest.fixture(scope="module", autouse=True)
def known():
    with registered():
        yield


@pytest.fixture
def pipeline():
    return build_toy_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    build_toy_pipeline().save_pretrained(path)
    return str(path)


def record(folder, pipeline):
    own = fingerprint(pipeline.transformer)
    return Provenance(folder, own, ["knife"], "sdd", "xattn", {}, created="now")


def erased_weights(transformer):
    torch.manual_seed(1)
    parameters = dict(transformer.named_parameters())
    names = select_parameters(transformer, "xattn")
    return {name: parameters[name].detach() + 0.5 * torch.randn_like(parameters[name]) for name in names}


@pytest.fixture(scope="module")
def partial(folder, tmp_path_factory):
    """A folder with the erased weights and their record."""
    base, path = build_toy_pipeline(), tmp_path_factory.mktemp("partial")
    provenance = record(folder, base)
    provenance.save(path)
    save_partial(erased_weights(base.transformer), provenance, path / PARTIAL_NAME)
    return path


def image(pipeline):
    return pipeline("a knife", generator=torch.Generator().manual_seed(0), output_type="np").images


def test_a_stored_model_and_a_loaded_one_are_of_the_family(folder):
    stored = StoredModel(folder)
    check_files(folder, "model")
    assert stored.family is ToyFamily and stored.latent_shape == (4, 8, 8)
    assert {parameter.device.type for parameter in stored.denoiser.parameters()} == {"meta"}
    assert len(stored.tokenizers) == 1
    loaded = load_pipeline(folder)
    assert type(loaded) is ToyPipeline and type(make_family(loaded)) is ToyFamily
    with pytest.raises(ValueError, match="resolution 64: must be 16"):
        make_family(loaded, 64)


def test_files_of_its_denoiser_are_checked(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state.pop("proj_out.bias")
    save_file(state, path)
    with pytest.raises(ValueError, match="transformer: the weights lack proj_out.bias"):
        check_files(str(tmp_path), "model")


def test_an_entry_point_registers_it_and_nothing_takes_its_pipelines(monkeypatch):
    others = [family for family in registry.families() if family is not ToyFamily]
    monkeypatch.setattr(registry, "_registered", others)
    point = EntryPoint("toy", "toy_family:ToyFamily", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINTS else [])
    registry._load_entry_points.cache_clear()
    assert registry.families()[-1] is ToyFamily and registry.denoiser_names() == ("unet", "transformer")
    with pytest.raises(ValueError, match="ToyPipeline belongs to ToyFamily already"):
        register_family(type("Other", (ToyFamily,), {}))
    with pytest.raises(ValueError, match="Other: unknown train method attention; allowed are xattn"):
        register_family(type("Other", (ToyFamily,), {"pipeline_classes": (), "train_methods": {"attention": None}}))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_trajectory_passes_where_the_pipelines_own_call_does(pipeline, guidance_scale):
    family, seen = make_family(pipeline), []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"][:1], kwargs["timestep"][:1])),
        with_kwargs=True,
    )
    generator = torch.Generator().manual_seed(0)
    pipeline("a knife", guidance_scale=guidance_scale, generator=generator, output_type="latent")
    hook.remove()
    trajectories = Trajectories(family.make_scheduler, family.latent_shape, 4, guidance_scale)
    assert trajectories.positions == [0, 1, 2, 3]

    def predict(*inputs):
        with torch.no_grad():
            return family.predict(pipeline.transformer, *inputs)

    generators = [torch.Generator().manual_seed(0)]
    encoded, empty = family.encode(["a knife"]), family.encode([""])
    latents, timesteps = trajectories.sample(predict, encoded, empty, [[0, 1, 2, 3]], generators)
    for latent, t, (expected, expected_t) in zip(latents, timesteps, seen, strict=True):
        assert torch.allclose(latent[None], expected, atol=1e-5) and t == expected_t


def test_a_stored_models_schedule_is_the_loaded_ones(folder, pipeline):
    stored, loaded = StoredModel(folder).make_scheduler(5), make_family(pipeline).make_scheduler(5)
    assert torch.equal(stored.timesteps, loaded.timesteps) and len(stored.timesteps) == 5


def test_noise_and_targets_are_those_of_flow_matching(pipeline):
    noise = NoiseSchedule(pipeline.scheduler, snr_gamma=5.0)
    latents = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    noisy = noise.add(latents, [torch.Generator().manual_seed(i) for i in range(3)])
    sigmas = noisy.timesteps / 1000
    assert ((0 < sigmas) & (sigmas <= 1)).all()
    # A step of Euler from there along the target ends at the latents.
    back = noisy.model_input - sigmas.view(-1, 1, 1, 1) * noisy.target
    torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-5)
    # The error of the latents is sigma times that of the velocity; min(SNR, 5) times it counts.
    expected = torch.minimum(((1 - sigmas) / sigmas) ** 2, torch.tensor(5.0)) * sigmas**2
    torch.testing.assert_close(noise.snr_weights(noisy.timesteps), expected)
    late = NoiseSchedule(pipeline.scheduler, bias=TimestepBias("earlier", multiplier=0.0, portion=0.75))
    assert (late.add(latents, [torch.Generator().manual_seed(i) for i in range(3)]).timesteps > 750).all()
    losses = torch.tensor([1.0, 2.0, 3.0])
    for weighting in ("prediction", "velocity"):
        assert torch.equal(LossWeighting(weighting, pipeline.scheduler).weigh(losses, noisy.timesteps), losses)


def test_latents_are_scaled_as_the_pipeline_decodes_them(pipeline):
    family = make_family(pipeline)
    moments = family.encode_pictures(torch.zeros(1, 3, 16, 16))
    latents = family.draw_latents(moments, [torch.Generator().manual_seed(0)])
    plain = pipeline.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents / 1.5 + 0.1, plain)


def test_its_train_methods_select_by_its_own_rules(pipeline):
    chosen = {method: select_parameters(pipeline.transformer, method) for method in ("xattn", "selfattn", "full")}
    assert all("add" in name for name in chosen["xattn"]) and not {*chosen["xattn"]} & {*chosen["selfattn"]}
    assert chosen["full"] == [name for name, _ in pipeline.transformer.named_parameters()]
    with pytest.raises(ValueError, match="'esd-u'.*has no such parameters; allowed are xattn, selfattn, full"):
        select_parameters(pipeline.transformer, "esd-u")


def test_its_cost_is_counted(pipeline):
    count = macs(pipeline.transformer, (4, 8, 8), 32)
    with torch.device("meta"):
        empty = type(pipeline.transformer).from_config(pipeline.transformer.config)
    inputs = ToyFamily.blank_inputs(empty, (2, 4, 8, 8), 32)
    assert forward_flops(empty, inputs) == 2 * count > 0
    forward, backward, activations = training_cost(empty, inputs)
    assert forward == 2 * count and backward > forward and activations > 0


def test_a_partial_file_goes_into_the_base_and_no_other(folder, partial):
    base = load_pipeline(folder)
    expected = erased_weights(base.transformer)
    load_partial(base.transformer, partial / PARTIAL_NAME)
    parameters = dict(base.transformer.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match="made for .* with fingerprint"):
        load_partial(build_toy_pipeline(seed=1).transformer, partial / PARTIAL_NAME)


def test_weights_swap_and_a_trained_lora_is_saved_and_loaded(folder, pipeline, tmp_path):
    names = select_parameters(pipeline.transformer, "xattn")
    weights = TrainedWeights(pipeline.transformer, names, ema_decay=0.5)
    before = image(pipeline)
    with torch.no_grad():
        for value in weights.student.values():
            value.add_(0.5)
    with weights.use("frozen"):
        assert difference(image(pipeline), before) < ROUNDING
    assert difference(image(pipeline), before) > ROUNDING

    adapted = build_toy_pipeline()
    lora = LoRAWeights(adapted.transformer, names, rank=2)
    with torch.no_grad():
        for name, value in lora.student.items():
            if "lora_B" in name:
                value.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    drawn, provenance = image(adapted), record(folder, build_toy_pipeline())
    assert difference(drawn, before) > ROUNDING and difference(image(fused(adapted)), drawn) < ROUNDING
    save_lora(adapted, provenance, tmp_path / LORA_NAME)
    stock = build_toy_pipeline()
    stock.load_lora_weights(tmp_path)
    assert difference(image(stock), drawn) < ROUNDING
    base = build_toy_pipeline()
    read_erased_weights(tmp_path / LORA_NAME).apply(base.transformer)
    assert difference(image(base), drawn) < ROUNDING


@pytest.mark.parametrize("to", ["full", "transformer", "partial", "lora", "kohya"])
def test_every_form_is_exported_loaded_switched_off_and_published(folder, partial, tmp_path, to):
    out, options = tmp_path / "out", {"lora": {"rank": 16, "biases": True}, "kohya": {"rank": 16}}
    export(str(partial), str(out), to, **options.get(to, {}))
    erased = ErasedToyPipeline.from_pretrained(out, folder)
    erased.set_progress_bar_config(disable=True)
    base = build_toy_pipeline()
    parameters = dict(erased.transformer.named_parameters())
    for name, value in erased_weights(base.transformer).items():
        if to != "kohya" or name.endswith(".weight"):
            torch.testing.assert_close(parameters[name].detach(), value, atol=1e-5, rtol=1e-5)
    erased_image = image(erased)
    assert difference(erased_image, image(base)) > ROUNDING
    with erased.erasure_disabled():
        assert difference(image(erased), image(base)) < ROUNDING
    assert difference(image(erased), erased_image) < ROUNDING
    card = str(erasure_card(out, "user/model", Base("user/base", True, {})))
    usage = {
        "full": 'ToyPipeline.from_pretrained("user/model")',
        "transformer": 'transformer = SD3Transformer2DModel.from_pretrained("user/model", subfolder="transformer")',
        "partial": "load_partial(pipeline.transformer,",
        "lora": 'pipeline.load_lora_weights("user/model")',
        "kohya": "`kohya_lora.safetensors` is a LoRA for ComfyUI, for the base model only",
    }
    assert usage[to] in card and "unet" not in card.lower()
    if to == "full":
        erased.save_pretrained(tmp_path / "saved")
        assert difference(image(load_pipeline(str(tmp_path / "saved"))), erased_image) < ROUNDING


def test_a_checkpoint_of_one_file_is_refused(partial, tmp_path):
    with pytest.raises(ValueError, match="to single-file: .* is a ToyPipeline; allowed are StableDiffusionPipeline"):
        export(str(partial), str(tmp_path / "out"), "single-file")


def test_the_name_of_another_familys_denoiser_is_refused(partial, tmp_path):
    with pytest.raises(ValueError, match="to unet: .* has none; its denoiser is called transformer"):
        export(str(partial), str(tmp_path / "out"), "unet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method, options", [("sdd", {}), ("esd", {"loss_space": "velocity"}), ("sdd", {"rank": 2})])
def test_it_is_erased_and_resumed(folder, tmp_path, on_cpu, method, options):
    settings = {"num_inference_steps": 4, "learning_rate": 1e-2, "watch_prompts": ["a cat"], **options}
    settings |= {"checkpointing_steps": 1, "progress_bar": False}
    trained = []
    for out, runs in (("whole", [3]), ("in-parts", [2, 3])):
        for steps in runs:
            resume = {"resume_from_checkpoint": "latest"} if steps > runs[0] else {}
            given = {**settings, **resume, "output_dir": str(tmp_path / out), "max_train_steps": steps}
            erasure = erase(folder, ["knife"], method, save="lora" if "rank" in options else "partial", **given)
        trained.append(read_erased_weights(tmp_path / out))
    assert type(erasure.pipeline) is ToyPipeline
    base = build_toy_pipeline().transformer
    whole, parts = (erased.changes(base) for erased in trained)
    assert set(whole) <= set(select_parameters(base, "xattn"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_its_dry_run_counts_its_weights_and_arithmetic(folder, tmp_path, capsys):
    words = ["--pretrained_model_name_or_path", folder, "--concepts", "knife", "--dry_run"]
    run_command("sdd", [*words, "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "xattn (cross-attention): 14 of 66 tensors" in shown and "PFLOP" in shown
    assert not (tmp_path / "out").exists()


def test_images_are_generated_with_safe_latent_diffusion(folder, tmp_path):
    rows, settings = [PromptRow("one", "a knife", 0)], GenerationSettings(num_inference_steps=4, guidance_scale=3.0)
    images = []
    for safety in (None, "max"):
        pipeline, used = SteeredModel("toy", folder, safety=safety).load(settings)
        pipeline.set_progress_bar_config(disable=True)
        (row,) = generate(pipeline, rows, tmp_path / str(safety), used)
        images.append(np.asarray(Image.open(tmp_path / str(safety) / row["file"])) / 255)
    assert images[0].shape == (16, 16, 3) and difference(*images) > ROUNDING


def test_safe_latent_diffusion_knows_its_pooled_embeddings(pipeline):
    enable_safe_latent_diffusion(pipeline, "a knife")
    with pytest.raises(ValueError, match="needs safety_pooled_prompt_embeds"):
        pipeline("a cat", safety_prompt_embeds=torch.zeros(1, 32, 32))


def test_it_is_attacked_by_a_learned_word(pipeline, tmp_path):
    settings = InversionSettings(steps=3, batch_size=2, learning_rate=0.05, checkpointing_steps=0)
    before, examples = image(pipeline), [Image.new("RGB", (16, 16), "red")]
    path = learn_token(pipeline, examples, [f"a {TOKEN}"], tmp_path, settings, "knife")
    token, (vector,), _ = read_token(path)
    start = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer("knife").input_ids[1]]
    assert token == TOKEN and difference(vector, start.detach()) > ROUNDING
    with added_token(pipeline, token, [vector]):
        assert len(pipeline.tokenizer) == len(build_toy_pipeline().tokenizer) + 1
    assert difference(image(pipeline), before) < ROUNDING


def test_it_has_no_students(folder):
    with pytest.raises(ValueError, match="none of the students .* fits its denoiser"):
        check_surroundings(StudentsArguments(pretrained_model_name_or_path=folder))


def test_its_structure_is_read_wherever_its_denoiser_is(folder, tmp_path, pipeline):
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    for place in (folder, str(tmp_path), str(tmp_path / "transformer")):
        found = stored_denoiser(place, "from_student")
        assert type(found) is type(pipeline.transformer) and found.device.type == "meta"
        assert [*found.state_dict()] == [*pipeline.transformer.state_dict()]
    with pytest.raises(ValueError, match="no folder or Hub repository with a transformer or unet"):
        stored_denoiser(str(tmp_path / "nothing"), "from_student")
