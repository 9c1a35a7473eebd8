"""Safe pipelines as repositories, through the real client and a Hub on the loopback interface."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_safe import SAFETY_CONCEPT, SafetyConfig, StableDiffusionPipelineSafe
from hub_server import HubServer


SOURCE = str(Path(__file__).parents[2] / "src")


@pytest.fixture(scope="module")
def safe(make_tiny_pipeline):
    parts = make_tiny_pipeline().components
    pipeline = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False, safety_concept="a {weapon}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(safe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("safe")
    safe.save_pretrained(folder)
    return folder


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=2, generator=generator, output_type="np", **SafetyConfig.MAX)


def small_files(folder):
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".safetensors"]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def test_a_saved_pipeline_is_loaded_by_its_class_without_trust(safe, folder):
    loaded = StableDiffusionPipelineSafe.from_pretrained(folder)
    assert type(loaded) is StableDiffusionPipelineSafe and loaded.safety_concept == "a {weapon}"
    assert np.allclose(draw(loaded).images, draw(safe).images, atol=1e-3)


def test_loading_it_does_not_run_its_code(folder, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, copy], check=True)
    (copy / "pipeline.py").write_text("raise SystemExit('ran')\n")
    assert StableDiffusionPipelineSafe.from_pretrained(copy).safety_concept == "a {weapon}"


def test_diffusers_loads_it_with_trust_and_saves_the_same(folder, tmp_path):
    loaded = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is StableDiffusionPipelineSafe
    loaded.save_pretrained(tmp_path)
    assert small_files(tmp_path).keys() == small_files(folder).keys()
    for name in ("model_index.json", "pipeline.py", "README.md"):
        assert small_files(tmp_path)[name] == small_files(folder)[name]


def test_a_class_of_ones_own_saves_what_everybody_can_load(safe, tmp_path):
    class Mine(StableDiffusionPipelineSafe):
        pass

    Mine(**safe.components, requires_safety_checker=False, safety_concept="a gun").save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is StableDiffusionPipelineSafe and loaded.safety_concept == "a gun"
    assert "Mine" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("cls", [DiffusionPipeline, StableDiffusionPipeline])
def test_no_other_way_loads_it_without_its_safety(folder, cls):
    with pytest.raises(ValueError, match="trust_remote_code"):
        cls.from_pretrained(folder)


def test_the_concept_can_be_given_when_loading(folder):
    assert StableDiffusionPipelineSafe.from_pretrained(folder, safety_concept="a gun").safety_concept == "a gun"


def test_a_stock_repository_gets_the_default_concept(tiny_model_folder):
    loaded = StableDiffusionPipelineSafe.from_pretrained(tiny_model_folder)
    assert loaded.safety_concept == SAFETY_CONCEPT


def test_repositories_of_the_old_pipeline_load(make_tiny_pipeline, tmp_path):
    from diffusers.pipelines.deprecated.stable_diffusion_safe.safety_checker import SafeStableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    checker = SafeStableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    make_tiny_pipeline().save_pretrained(tmp_path)
    checker.save_pretrained(tmp_path / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "feature_extractor"
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionPipelineSafe",
        "safety_checker": ["stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = StableDiffusionPipelineSafe.from_pretrained(tmp_path)
    assert type(loaded.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    assert torch.equal(
        loaded.safety_checker.visual_projection.weight, checker.visual_projection.weight
    )  # the weights are found

    loaded.safety_checker.concept_embeds_weights.data.fill_(-9)  # flags everything
    output = draw(loaded)
    assert output.nsfw_content_detected == [True] and not output.images.any()
    assert output.unsafe_images.shape == (1, 64, 64, 3) and output.unsafe_images.std() > 0
    loaded.safety_checker.concept_embeds_weights.data.fill_(9)
    output = draw(loaded)
    assert output.nsfw_content_detected == [False] and output.unsafe_images is None and output.images.any()

    loaded.save_pretrained(tmp_path / "again")
    assert StableDiffusionPipelineSafe.from_pretrained(tmp_path / "again").safety_checker is not None


def test_the_card_is_true(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "diffusers"
    assert "> a {weapon}" in card.text and "| `SafetyConfig.MAX` | 5000 | 0 | 1 | 0.5 | 0.7 |" in card.text


def test_somebody_elses_card_is_kept_and_our_own_follows_the_concept(folder, tmp_path):
    pipeline = StableDiffusionPipelineSafe.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path)
    pipeline.safety_concept = "a gun"
    pipeline.save_pretrained(tmp_path)
    assert "> a gun" in (tmp_path / "README.md").read_text()
    pipeline.safety_concept = "a gun,\n# a knife"
    pipeline.save_pretrained(tmp_path)
    assert "\n> a gun,\n> # a knife\n" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def run_client(hub, home, code):
    environment = {**hub.environment(home), "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_pushed_and_loaded_back_through_the_hub(safe, folder, tmp_path):
    expected = draw(safe).images
    with HubServer() as hub:
        push = f"""
from diffusers_safe import StableDiffusionPipelineSafe
pipeline = StableDiffusionPipelineSafe.from_pretrained({str(folder)!r})
pipeline.push_to_hub("tester/safe-emoji", commit_message="first")
pipeline.save_pretrained("saved", push_to_hub=True, repo_id="tester/saved")
"""
        run_client(hub, tmp_path, push)
        (_, first), (_, message, files) = (
            hub.repositories["tester/safe-emoji"][0][:2],
            hub.repositories["tester/safe-emoji"][-1],
        )
        assert (first, message) == ("initial commit", "first")
        assert json.loads(files["model_index.json"])["_class_name"] == ["pipeline", "StableDiffusionPipelineSafe"]
        assert b'from_pretrained("tester/safe-emoji")' in files["README.md"] and "pipeline.py" in files
        assert "unet/diffusion_pytorch_model.safetensors" in hub.lfs_paths
        assert hub.files("tester/saved").keys() == files.keys()
        assert not [name for name, content in files.items() if b"_name_or_path" in content]

        load = """
import numpy as np, torch
from diffusers import DiffusionPipeline
from diffusers_safe import SafetyConfig, StableDiffusionPipelineSafe
for cls, options in ((StableDiffusionPipelineSafe, {}), (DiffusionPipeline, {"trust_remote_code": True})):
    pipeline = cls.from_pretrained("tester/safe-emoji", **options)
    assert type(pipeline) is StableDiffusionPipelineSafe and pipeline.safety_concept == "a {weapon}"
    images = pipeline("a knife", num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                      output_type="np", **SafetyConfig.MAX).images
    np.save(f"{cls.__name__}.npy", images)
try:
    DiffusionPipeline.from_pretrained("tester/safe-emoji")
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded without trust")
"""
        run_client(hub, tmp_path, load)
    for name in ("StableDiffusionPipelineSafe", "DiffusionPipeline"):
        assert np.allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-3)


@pytest.mark.slow
def test_a_card_that_is_on_the_hub_already_is_kept(folder, tmp_path):
    push = f"""
from huggingface_hub import HfApi
from diffusers_safe import StableDiffusionPipelineSafe
api = HfApi()
api.create_repo("tester/mine")
api.upload_file(path_or_fileobj=b"MY OWN CARD", path_in_repo="README.md", repo_id="tester/mine")
pipeline = StableDiffusionPipelineSafe.from_pretrained({str(folder)!r})
print(pipeline.push_to_hub("tester/mine").commit_message)
pipeline.push_to_hub("tester/sub", subfolder="safe")
pipeline.save_pretrained("local", push_to_hub=True, repo_id="tester/mine")  # with a card of ours in the folder
again = StableDiffusionPipelineSafe.from_pretrained("tester/mine")
again.push_to_hub("tester/again")
"""
    with HubServer() as hub:
        assert "Upload StableDiffusionPipelineSafe" in run_client(hub, tmp_path, push)
        assert hub.files("tester/mine")["README.md"] == b"MY OWN CARD" and "pipeline.py" in hub.files("tester/mine")
        assert "safe/pipeline.py" in hub.files("tester/sub")
        assert b"base_model" not in hub.files("tester/again")["README.md"]  # a safe repository is no base


@pytest.mark.slow
def test_a_push_without_a_right_to_write_says_so(folder, tmp_path):
    code = f"""
from diffusers_safe import StableDiffusionPipelineSafe
from huggingface_hub.errors import HfHubHTTPError
try:
    StableDiffusionPipelineSafe.from_pretrained({str(folder)!r}).push_to_hub("tester/x", token="hf_wrong")
except HfHubHTTPError as error:
    print(error.response.status_code)
"""
    with HubServer() as hub:
        assert run_client(hub, tmp_path, code).strip().endswith("401") and not hub.repositories


def test_another_result_is_replaced_only_if_asked(safe, tmp_path):
    (tmp_path / "pipeline.py").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"results of another run \(pipeline.py\).*--overwrite"):
        safe.save_pretrained(tmp_path)
    safe.save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / ".replaced-1" / "pipeline.py").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "mine"
    type(safe).from_pretrained(tmp_path).save_pretrained(tmp_path)  # its own, and the files that it was loaded from
    assert type(safe).from_pretrained(tmp_path).safety_concept == "a {weapon}"
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1
