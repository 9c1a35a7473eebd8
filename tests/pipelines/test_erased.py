"""Erased pipelines: loaded from everything, compared with their base model, published as stock repositories."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline

from closeness import ROUNDING, difference
from diffusers_safe import ErasedStableDiffusionPipeline, ErasedStableDiffusionXLPipeline
from diffusers_safe.formats import load_denoiser, read_erased_weights
from diffusers_safe.provenance import FILE_NAME, Provenance, fingerprint
from erasure_files import FORMS, make_erased, write_form
from hub_server import HubServer


SOURCE = str(Path(__file__).parents[2] / "src")
KNOW_BASE = ("partial", "esd-v2", "unet-in-folder")


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=2, generator=generator, output_type="np").images


def weights_of(pipeline):
    return {name: value.detach().clone() for name, value in pipeline.unet.named_parameters()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return StableDiffusionPipeline.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def partial(base, tiny_model_folder, tmp_path_factory):
    """A partial file that names the base model."""
    folder = tmp_path_factory.mktemp("partial")
    return write_form("partial", base.unet, make_erased(base.unet), folder, tiny_model_folder)


@pytest.fixture(scope="module")
def whole(partial, tmp_path_factory):
    """The folder of a whole erased pipeline."""
    folder = tmp_path_factory.mktemp("whole")
    ErasedStableDiffusionPipeline.from_pretrained(partial).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_and_can_be_switched_off_and_on(base, tiny_model_folder, tmp_path, form):
    path = write_form(form, base.unet, make_erased(base.unet), tmp_path, tiny_model_folder)
    options = {} if form in KNOW_BASE else {"base_model": tiny_model_folder}
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(path, **options)
    before, expected = weights_of(pipeline), {**weights_of(base), **make_erased(base.unet)}
    assert all(torch.allclose(before[name], value, atol=2e-6) for name, value in expected.items())
    assert pipeline.erasure.base_model == tiny_model_folder
    assert pipeline.erasure.base_fingerprint == fingerprint(base.unet)
    with pipeline.erasure_disabled():
        assert same(weights_of(pipeline), weights_of(base))
    assert same(weights_of(pipeline), before)
    assert pipeline._other_values.keys() == make_erased(base.unet).keys()  # and no other tensor twice


def test_a_base_that_is_not_known_must_be_given_and_must_fit(base, tiny_model_folder, tmp_path, partial):
    load = ErasedStableDiffusionPipeline.from_pretrained
    esd = write_form("esd", base.unet, make_erased(base.unet), tmp_path)
    with pytest.raises(ValueError, match="does not say which model it was made from; give base_model"):
        load(esd)
    other = tmp_path / "other"
    base.save_pretrained(other)
    from conftest import build_tiny_pipeline

    build_tiny_pipeline(seed=1).unet.save_pretrained(other / "unet")
    with pytest.raises(ValueError, match="made for .* with fingerprint"):
        load(partial, base_model=other)
    with pytest.raises(ValueError, match="base model of .*no such file, folder or Hub repository"):
        load(esd, base_model="no/where")
    with pytest.raises(ValueError, match="nothing says that anything was erased"):
        load(tiny_model_folder)
    with pytest.raises(ValueError, match="no such file, folder"):
        load("no/where")
    with pytest.raises(ValueError, match="a pipeline of class StableDiffusionPipeline; .* takes StableDiffusionXL"):
        ErasedStableDiffusionXLPipeline.from_pretrained(partial)
    with pytest.raises(ValueError, match="nothing was erased"):
        load(Path(tiny_model_folder) / "unet", base_model=tiny_model_folder)


def test_a_whole_pipeline_reads_its_base_only_when_asked(base, whole, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    record = Provenance.load(copy)
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(copy)
    assert pipeline.erasure == record and pipeline._other_values is None
    before = weights_of(pipeline)
    for _ in range(2):
        with pipeline.erasure_disabled():
            assert same(weights_of(pipeline), weights_of(base))
        assert same(weights_of(pipeline), before)
    assert pipeline._other_values.keys() == make_erased(base.unet).keys()

    record.base_model = str(tmp_path / "gone")
    record.save(copy)
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(copy)  # it draws without its base model
    with pytest.raises(ValueError, match="base model of the erasure: .*gone.*give base_model to from_pretrained"):
        with pipeline.erasure_disabled():
            pass
    assert same(weights_of(pipeline), before)
    found = ErasedStableDiffusionPipeline.from_pretrained(copy, base_model=base.config._name_or_path)
    with found.erasure_disabled():
        assert same(weights_of(found), weights_of(base))
    record.base_fingerprint = "0" * 16
    record.save(copy)
    found = ErasedStableDiffusionPipeline.from_pretrained(copy, base_model=base.config._name_or_path)
    with pytest.raises(ValueError, match="its fingerprint is .*, the erasure was made from 0000"):
        with found.erasure_disabled():
            pass


def test_a_whole_pipeline_without_a_record_needs_its_base(base, whole, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", whole, copy], check=True)
    (copy / FILE_NAME).unlink()
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(copy, base_model=base.config._name_or_path)
    assert pipeline.erasure.method == "unknown" and pipeline.erasure.concepts == []
    with pipeline.erasure_disabled():
        assert same(weights_of(pipeline), weights_of(base))
    assert pipeline.erasure.base_fingerprint == fingerprint(base.unet)


def test_errors_and_nesting_leave_the_erasure_on(base, partial):
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(partial)
    before, pictures = weights_of(pipeline), draw(pipeline)
    with pytest.raises(KeyError), pipeline.erasure_disabled():
        with pipeline.erasure_disabled():
            pass
        assert same(weights_of(pipeline), weights_of(base))
        assert difference(draw(pipeline), draw(base)) < ROUNDING
        raise KeyError
    assert same(weights_of(pipeline), before) and difference(draw(pipeline), pictures) < ROUNDING
    assert difference(pictures, draw(base)) > 10 * ROUNDING


@pytest.mark.parametrize("form", ["partial", "whole"])
def test_half_precision(base, partial, whole, form):
    """The fingerprint is of fp32 weights; the erasure and the way back are those of the smaller dtype."""
    source = partial if form == "partial" else whole
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16)
    before = weights_of(pipeline)
    assert {value.dtype for value in before.values()} == {torch.bfloat16} == {pipeline.vae.dtype}
    assert same({k: v.bfloat16() for k, v in make_erased(base.unet).items()}, before)
    for _ in range(2):
        with pipeline.erasure_disabled():
            assert same({k: v.bfloat16() for k, v in weights_of(base).items()}, weights_of(pipeline))
        assert same(weights_of(pipeline), before)


def test_with_a_lora_on_top_and_moved_to_another_dtype(base, whole, tmp_path):
    from peft import LoraConfig

    pipeline = ErasedStableDiffusionPipeline.from_pretrained(whole)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    before = weights_of(pipeline)
    with pipeline.erasure_disabled():
        inside = {name.replace(".base_layer.", "."): value for name, value in weights_of(pipeline).items()}
        assert same(weights_of(base), inside)
    assert same(weights_of(pipeline), before)


def test_another_unet_in_its_place_is_told(make_tiny_pipeline, partial):
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(partial)
    config = {**pipeline.unet.config, "layers_per_block": 1}
    pipeline.unet = type(pipeline.unet).from_config(config)
    with pytest.raises(RuntimeError, match="the denoiser is not the one that was loaded"), pipeline.erasure_disabled():
        pass
    pipeline.unet = pipeline.unet.to("meta")
    with pytest.raises(RuntimeError, match="not in memory, as with sequential"), pipeline.erasure_disabled():
        pass


def test_the_stock_loaders_draw_what_it_draws(partial, whole):
    expected = draw(ErasedStableDiffusionPipeline.from_pretrained(partial))
    for loader in (DiffusionPipeline, AutoPipelineForText2Image):
        loaded = loader.from_pretrained(whole)
        assert type(loaded) is StableDiffusionPipeline and difference(draw(loaded), expected) < ROUNDING
    assert difference(draw(ErasedStableDiffusionPipeline.from_pretrained(whole)), expected) < ROUNDING
    files = {path.suffix for path in whole.rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors", ".txt"}
    index = json.loads((whole / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "_name_or_path" not in index


def test_an_image_processor_is_saved_by_the_name_that_every_environment_has(partial, tmp_path):
    from transformers import CLIPImageProcessor

    pipeline = ErasedStableDiffusionPipeline.from_pretrained(partial)
    pipeline.register_modules(feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}))
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


def test_what_cannot_be_saved_is_told_and_writes_nothing(base, partial, tmp_path):
    pipeline = ErasedStableDiffusionPipeline.from_pretrained(partial)
    with pipeline.erasure_disabled(), pytest.raises(ValueError, match="the erasure is disabled"):
        pipeline.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="safetensors only"):
        pipeline.save_pretrained(tmp_path / "out", safe_serialization=False)
    stock = ErasedStableDiffusionPipeline(**base.components, requires_safety_checker=False)
    assert stock.erasure is None
    with pytest.raises(ValueError, match="nothing is known of an erasure"):
        stock.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_client(hub, home, code):
    environment = {**hub.environment(home), "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_pushed_and_loaded_back_through_the_hub(base, partial, whole, tiny_model_folder, tmp_path):
    lora = write_form("lora", base.unet, make_erased(base.unet), tmp_path / "lora")
    unet = write_form("unet-in-folder", base.unet, make_erased(base.unet), tmp_path / "unet", "tester/base")
    code = f"""
import torch
from huggingface_hub import HfApi
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers_safe import ErasedStableDiffusionPipeline as Erased
from diffusers_safe.provenance import fingerprint
api = HfApi()
base = DiffusionPipeline.from_pretrained({tiny_model_folder!r})
base.push_to_hub("tester/base")
pipeline = Erased.from_pretrained({str(partial)!r})
pipeline.erasure.base_model = "tester/base"
commit = pipeline.push_to_hub("tester/erased", commit_message="first")
expected, original = fingerprint(pipeline.unet), fingerprint(base.unet)

for name, folder in (("lora", {str(lora.parent)!r}), ("unet", {str(unet)!r}), ("files", {str(partial.parent)!r})):
    api.create_repo(f"tester/{{name}}")
    api.upload_folder(repo_id=f"tester/{{name}}", folder_path=folder)

def check(pipeline, exact=True):
    assert pipeline.erasure.base_model == "tester/base", pipeline.erasure
    assert not exact or fingerprint(pipeline.unet) == expected
    with pipeline.erasure_disabled():
        assert fingerprint(pipeline.unet) == original

check(Erased.from_pretrained("tester/erased"))
check(Erased.from_pretrained("tester/erased", revision=commit.oid))
check(Erased.from_pretrained("tester/unet"))
check(Erased.from_pretrained("tester/lora", base_model="tester/base"), exact=False)
loaded = Erased.from_pretrained("tester/files", weight_name="some.safetensors", base_model="tester/base")
assert fingerprint(loaded.unet) == expected
for loader in (DiffusionPipeline, AutoPipelineForText2Image):
    loaded = loader.from_pretrained("tester/erased")
    assert type(loaded).__name__ == "StableDiffusionPipeline" and fingerprint(loaded.unet) == expected
assert fingerprint(Erased.from_pretrained("tester/files").unet) == expected  # the only file
api.upload_file(path_or_fileobj=b"x", path_in_repo="another.pt", repo_id="tester/files")
for source in ("tester/nothing", "tester/files"):
    try:
        Erased.from_pretrained(source)
    except ValueError as error:
        print(str(error).count("\\n"), str(error))
"""
    with HubServer() as hub:
        told = run_client(hub, tmp_path, code)
        files = hub.files("tester/erased")
    assert "0 'tester/nothing': no such file, folder or Hub repository" in told
    assert "0 tester/files: holds several files, of which weight_name must name one: another.pt, some" in told
    assert FILE_NAME in files and not any(name.endswith((".py", ".bin", ".pt")) for name in files)
    assert json.loads(files[FILE_NAME])["base_model"] == "tester/base"
    for local in (tiny_model_folder, "_name_or_path"):
        assert not [name for name, content in files.items() if local.encode() in content]


def test_sdxl(tmp_path):
    from conftest import build_tiny_pipeline
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    parts = build_tiny_pipeline().components
    text = {**parts["text_encoder"].config.to_dict(), "projection_dim": 32}
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, cross_attention_dim=64, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    base = StableDiffusionXLPipeline(
        parts["vae"], parts["text_encoder"], CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval(),
        parts["tokenizer"], parts["tokenizer"], unet.eval(), parts["scheduler"], add_watermarker=False,
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    path = write_form("partial", unet, make_erased(unet), tmp_path / "file", str(tmp_path / "base"))
    pipeline = ErasedStableDiffusionXLPipeline.from_pretrained(path)
    pipeline.save_pretrained(tmp_path / "erased")
    loaded = ErasedStableDiffusionXLPipeline.from_pretrained(tmp_path / "erased")
    stock = AutoPipelineForText2Image.from_pretrained(tmp_path / "erased")
    erased = draw(loaded)
    assert type(stock) is StableDiffusionXLPipeline and difference(draw(stock), erased) < ROUNDING
    with loaded.erasure_disabled():
        assert difference(draw(loaded), draw(base)) < ROUNDING < difference(erased, draw(base)) / 10
    assert read_erased_weights(tmp_path / "erased").known["concepts"] == ["knife"]
    assert fingerprint(load_denoiser(tmp_path / "base" / "unet")) == fingerprint(unet)
