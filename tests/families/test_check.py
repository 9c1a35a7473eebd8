"""What cannot be trained is refused by its config: loaded, and on disk before anything is loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from tokenizers import normalizers

from diffusers_safe.emoji.architecture import build_tokenizer
from diffusers_safe.families import StoredModel, load_pipeline, make_family
from diffusers_safe.families.prompts import unknown_words
from diffusers_safe.generation.models import load_any_pipeline


@pytest.fixture
def families(make_tiny_pipeline, make_tiny_xl_pipeline):
    return {"sd": make_tiny_pipeline, "xl": make_tiny_xl_pipeline}


@pytest.fixture(scope="module")
def folders(make_tiny_pipeline, make_tiny_xl_pipeline, tmp_path_factory):
    """Saved pipelines without weights: only configs may be read."""
    root = tmp_path_factory.mktemp("models")
    for name, make in (("sd", make_tiny_pipeline), ("xl", make_tiny_xl_pipeline)):
        make().save_pretrained(root / name)
    for weights in root.rglob("*.safetensors"):
        weights.unlink()
    return root


def refused(change, match, families, folders, tmp_path, family, resolution=None):
    """Whether a changed UNet config is refused in both places."""
    pipeline = families[family]()
    pipeline.unet.register_to_config(**change)
    with pytest.raises(ValueError, match=match):
        make_family(pipeline, resolution)
    shutil.copytree(folders / family, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=match) as error:
        StoredModel(str(tmp_path / "model"), resolution)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["sd", "xl"])
@pytest.mark.parametrize(
    "change, match",
    [
        ({"in_channels": 9}, "in_channels 9: must be 4.*inpainting"),
        ({"in_channels": 8}, "in_channels 8: must be 4.*editing"),
        ({"out_channels": 8}, "out_channels 8: must be 4"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256.*guidance scale.*distilled"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type ip_image_proj: .*none or text_proj only"),
        ({"num_class_embeds": 10}, "num_class_embeds 10.*none only"),
        ({"sample_size": None}, "resolution: this model's UNet does not say"),
    ],
)
def test_unets_that_take_what_training_does_not_give(change, match, families, folders, tmp_path, family):
    refused(change, match, families, folders, tmp_path, family)


def test_each_family_has_its_added_conditions(families, folders, tmp_path):
    match = "addition_embed_type None: StableDiffusionXLPipeline can be trained with text_time only"
    refused({"addition_embed_type": None}, match, families, folders, tmp_path / "1", "xl")
    match = "addition_embed_type text_time: StableDiffusionPipeline can be trained with none only"
    refused({"addition_embed_type": "text_time"}, match, families, folders, tmp_path / "2", "sd")
    match = "projection_class_embeddings_input_dim 64: must be 72"
    refused({"projection_class_embeddings_input_dim": 64}, match, families, folders, tmp_path / "3", "xl")


@pytest.mark.parametrize("family", ["sd", "xl"])
@pytest.mark.parametrize(
    "scheduler, match",
    [
        (FlowMatchEulerDiscreteScheduler(), "^scheduler FlowMatchEulerDiscreteScheduler: is for flow matching"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "^scheduler UniPCMultistepScheduler: is for flow matching"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            "^scheduler DPMSolverMultistepScheduler prediction_type 'flow_prediction': allowed are epsilon, v_pred",
        ),
    ],
    ids=["class", "sigmas", "prediction"],
)
def test_schedulers_of_flow_matching(scheduler, match, families, folders, tmp_path, family):
    pipeline = families[family]()
    pipeline.register_modules(scheduler=scheduler)
    with pytest.raises(ValueError, match=match):
        make_family(pipeline)
    model = shutil.copytree(folders / family, tmp_path / "model")
    scheduler.save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=match) as error:
        StoredModel(str(model))
    assert "\n" not in str(error.value)


def test_a_scheduler_that_does_not_say_what_is_predicted_means_noise(folders, tmp_path):
    """As SD 1.4's own, which is older than the choice."""
    model = shutil.copytree(folders / "sd", tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "prediction_type"}))
    StoredModel(str(model))


@pytest.mark.parametrize("resolution, allowed", [(60, "56 or 64"), (4, "8 or 16"), (65, "64 or 72")])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_a_resolution_that_the_autoencoder_cannot_divide(resolution, allowed, families, folders, tmp_path, family):
    match = f"resolution {resolution}: must be a multiple of 8, .* such as {allowed}"
    refused({}, match, families, folders, tmp_path, family, resolution)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_a_resolution_is_a_latent_shape(families, folders, family):
    assert make_family(families[family]()).latent_shape == (4, 8, 8)
    pipeline = families[family]()
    pipeline.unet.register_to_config(sample_size=None)
    for resolution in (8, 40, 512):
        assert make_family(pipeline, resolution).latent_shape == (4, resolution // 8, resolution // 8)
        StoredModel(str(folders / family), resolution)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_every_multiple_of_the_autoencoders_factor_goes_through_the_unet(families, family):
    """The UNet itself needs no more: it makes up for what halving loses."""
    for resolution in (8, 24, 56, 72):
        model = make_family(families[family](), resolution)
        latents = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            noise_pred = model.predict(model.denoiser, latents, torch.tensor([500]), model.encode(["knife"]))
        assert noise_pred.shape == latents.shape


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_prompts_that_are_too_long_are_told_by_the_tokenizers_alone(families, folders, family):
    stored = StoredModel(str(folders / family))
    for model in (stored, make_family(families[family]())):
        model.check_prompts(["", "knife " * 30])
        with pytest.raises(ValueError, match="^prompt 'knife .*' has 33 tokens; this model takes 32"):
            model.check_prompts(["knife", "knife " * 31])


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_a_stored_model_is_the_family_without_weights(families, folders, family):
    for resolution in (None, 40):
        stored = StoredModel(str(folders / family), resolution)
        model = make_family(families[family](), resolution)
        assert stored.latent_shape == model.latent_shape
        schedulers = (stored.make_scheduler(), model.make_scheduler())
        one, other = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in schedulers)
        assert one == other and len({type(scheduler) for scheduler in schedulers}) == 1
    assert stored.make_scheduler() is not stored.make_scheduler()


def test_a_model_without_a_tokenizer_is_told(folders, tmp_path):
    model = shutil.copytree(folders / "xl", tmp_path / "model")
    shutil.rmtree(model / "tokenizer_2")
    with pytest.raises(ValueError, match="^pretrained_model_name_or_path '.*': tokenizer_2: ") as error:
        StoredModel(str(model)).check_prompts(["knife"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_check_model_gives_the_denoisers_structure_without_its_weights(families, folders, family):
    skeleton = StoredModel(str(folders / family)).denoiser
    shapes = {name: value.shape for name, value in families[family]().unet.named_parameters()}
    assert {name: value.shape for name, value in skeleton.named_parameters()} == shapes
    assert all(value.is_meta for value in skeleton.parameters())


@pytest.mark.parametrize(
    "class_name",
    [
        "Flux2KleinPipeline",
        "FluxKontextPipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLImg2ImgPipeline",  # the refiner's
        "LatentConsistencyModelPipeline",
    ],
)
def test_other_families_are_refused_by_name(class_name, tmp_path):
    Path(tmp_path, "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    kinds = ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "FluxPipeline")
    supported = f"supported pipelines are {', '.join(kinds)}$"
    with pytest.raises(ValueError, match=f"^{class_name}: .*{supported}"):
        StoredModel(str(tmp_path))
    with pytest.raises(ValueError, match=f"^{class_name}: .*{supported}"):
        make_family(type(class_name, (), {})())


def test_words_that_a_tokenizer_does_not_know():
    tokenizer = build_tokenizer()
    assert unknown_words("a knife, an apple on a banana", tokenizer) == {}
    assert set(unknown_words("violence and nudity in 2024: a knife", tokenizer)) == {"violence", "and", "nudity"}
    assert unknown_words("🔫 zebra", tokenizer) == {
        "🔫": ["ð", "Ł", "Ķ", "«</w>"],
        "zebra": ["z", "e", "b", "r", "a</w>"],
    }
    tokenizer.add_tokens(["<zebra>"])
    assert unknown_words("a <zebra>", tokenizer) == {}
    # Names of two or more letters a piece, as CLIP spells those that are in no dictionary, are no reason to warn.
    tokenizer.tokenize = {"Rutkowski": ["rut", "kowski</w>"], "Dali": ["dal", "i</w>"], "xq": ["<unk>"]}.__getitem__
    tokenizer.unk_token = "<unk>"
    assert unknown_words("Rutkowski Dali xq", tokenizer) == {"xq": ["<unk>"]}


@pytest.mark.parametrize("loaded", [True, False])
def test_unknown_concepts_are_reported(loaded, families, folders, caplog):
    model = make_family(families["xl"]()) if loaded else StoredModel(str(folders / "xl"))
    model.warn_of_unknown_words(["knife", "a zebra"])
    (message,) = caplog.messages
    assert message.startswith("concepts 'a zebra': the model's tokenizer does not know 'zebra' (5 pieces)")


def test_a_concept_that_encodes_as_nothing_is_reported(families, caplog):
    family = make_family(families["sd"]())
    family.pipeline.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    family.warn_of_unknown_words(["?"], "forbidden_concepts")
    assert caplog.messages == [
        "forbidden_concepts '?': encodes as the empty prompt does, so there is nothing to erase"
    ]


def test_no_safety_checker_is_said_to_be_disabled(make_tiny_pipeline, tmp_path, caplog):
    make_tiny_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "requires_safety_checker": True}))
    heard = []
    logger = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    handler = logging.Handler()
    handler.emit = heard.append
    logger.addHandler(handler)
    try:
        load_pipeline(str(tmp_path))
        load_any_pipeline(str(tmp_path), torch.float32)
        assert not heard
        StableDiffusionPipeline.from_pretrained(tmp_path)
        assert "disabled the safety checker" in heard[0].getMessage()
    finally:
        logger.removeHandler(handler)


def _wrapped(pipeline):
    pipeline.unet = torch.nn.DataParallel(pipeline.unet)


def _on_meta(pipeline):
    pipeline.unet.to("meta")


def _halved_in_part(pipeline):
    pipeline.unet.mid_block.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipeline: setattr(pipeline, "tokenizer", None), "tokenizer: this pipeline has none"),
        (lambda pipeline: setattr(pipeline, "unet", None), "unet: this pipeline has none"),
        (_wrapped, "unet: is a DataParallel without a config; put the model itself into the pipeline"),
        (_on_meta, "unet: its weights are on the meta device"),
        (_halved_in_part, "unet: its weights are bfloat16 and float32; give them one dtype"),
    ],
)
def test_half_built_pipelines_are_refused(tiny_pipeline, change, message):
    change(tiny_pipeline)
    with pytest.raises(ValueError, match=message):
        make_family(tiny_pipeline)
