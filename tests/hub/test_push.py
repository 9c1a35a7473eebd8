"""Publishing erased models, through the real client and a Hub on the loopback interface that can fail."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file

from closeness import ROUNDING, difference
from diffusers_safe import ErasedStableDiffusionPipeline, cli
from diffusers_safe.distillation import run as distillation
from diffusers_safe.emoji.dataset import emoji_dataset
from diffusers_safe.families.students import build_student
from diffusers_safe.formats import CHECKPOINT_NAME, KOHYA_NAME, PARTIAL_NAME, load_denoiser
from diffusers_safe.hub import PUSH_FAILED, RETRY_WAITS, PushError, find_base, push_result
from diffusers_safe.hub.cards import CARD_NAME, is_ours
from diffusers_safe.provenance import Distillation, Provenance, fingerprint
from diffusers_safe.report.elements import Headline, Report
from diffusers_safe.report.grid import GRID_NAME
from diffusers_safe.report.results import publish
from diffusers_safe.report.statistics import Estimate
from diffusers_safe.training.output import save_student
from diffusers_safe.training.samples import Samples
from diffusers_safe.training.sdd import main
from hub_server import TOKEN, HubServer
from scripts import accelerate_on_cpu


ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = {"model_index.json", UNET, "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"}


def options(model, output_dir, *more):
    return [
        *("--pretrained_model_name_or_path", str(model), "--output_dir", str(output_dir)),
        *("--concepts", "knife", "gun", "--num_inference_steps", "2", "--max_train_steps", "2", "--seed", "3"),
        *("--learning_rate", "1e-3", "--ema_decay", "0.5", "--watch_prompts", "a cat", *more),
    ]


def erase(*arguments):
    """The script's main, in this process; returns its exit code."""
    with accelerate_on_cpu():
        try:
            main(options(*arguments))
        except SystemExit as stop:
            return stop.code
    return 0


def push(*arguments):
    try:
        cli.main(["push", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a knife", num_inference_steps=2, generator=generator, output_type="np").images


@pytest.fixture(scope="module")
def erased(tiny_model_folder, tmp_path_factory):
    """The output folder of a run that was not pushed, with everything a folder may hold. Not to be changed."""
    folder = tmp_path_factory.mktemp("erased") / "tiny-safe"
    assert erase(tiny_model_folder, folder, "--save", "both", "--checkpointing_steps", "1") == 0
    for name in (".hidden/secret.txt", ".result.partial/x.safetensors", "unet/.x.partial", "logs/events", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    assert (folder / "checkpoint-1").is_dir() and (folder / "log.jsonl").is_file()
    return folder


@pytest.fixture
def folder(erased, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(erased, tmp_path / "tiny-safe"))


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch)
        yield hub


# --- what is published -----------------------------------------------------------------------------------------------


def test_one_commit_holds_the_result_and_nothing_else(hub, folder, erased):
    url = push_result(folder, "tester/tiny-safe")
    assert url == f"{hub.url}/tester/tiny-safe"
    assert [message for _, message, _ in hub.repositories["tester/tiny-safe"]] == [
        "initial commit",
        "Erase knife, gun with SDD",
    ]
    files = hub.files("tester/tiny-safe")
    assert {"erasure.json", PARTIAL_NAME, CARD_NAME, *PIPELINE} <= files.keys()
    published = {"erasure.json", PARTIAL_NAME, CARD_NAME, "model_index.json"}
    assert {path.split("/")[0] for path in files} - published == {
        "scheduler", "text_encoder", "tokenizer", "unet", "vae"
    }  # fmt: skip
    assert not any("." == part[0] for path in files for part in path.split("/"))
    assert files[UNET] == (erased / UNET).read_bytes()
    assert files[CARD_NAME] == (folder / CARD_NAME).read_bytes()


@pytest.mark.parametrize("base_model", [None, "runs/secret/tiny", "/home/secret/tiny"])
def test_what_is_published_names_no_folder_of_this_machine(hub, folder, tiny_model_folder, base_model):
    """And what lies here still does: it is how the base model is found."""
    if base_model:  # folders that are gone
        Provenance(**{**vars(Provenance.load(folder)), "base_model": base_model}).save(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(tiny_model_folder.encode() in content for content in before.values())
    push_result(folder, "tester/x")
    files = hub.files("tester/x")
    for local in (tiny_model_folder, str(folder.parent), "secret", "_name_or_path"):
        assert not [name for name, content in files.items() if local.encode() in content]
    name = Path(base_model or tiny_model_folder).name
    record = json.loads(files["erasure.json"])
    assert record["base_model"] == name and f"| base model | `{name}`" in files[CARD_NAME].decode()
    assert record["arguments"]["learning_rate"] == 1e-3 and "output_dir" not in record["arguments"]
    assert before == {path: path.read_bytes() for path in before}

    push_result(folder, "tester/x")
    assert len(hub.repositories["tester/x"]) == 2  # the same files again


def test_a_published_partial_file_asks_for_its_base_model_and_takes_it(hub, folder, tiny_model_folder, tmp_path):
    for name in ("model_index.json", "unet"):
        (folder / name).rename(tmp_path / name)
    push_result(folder, "tester/x")
    published = tmp_path / "published"
    published.mkdir()
    for name in (PARTIAL_NAME, "erasure.json"):
        (published / name).write_bytes(hub.files("tester/x")[name])
    load = ErasedStableDiffusionPipeline.from_pretrained
    for source in (published, published / PARTIAL_NAME):
        with pytest.raises(ValueError, match=f"base model of .*'{Path(tiny_model_folder).name}': .*give base_model"):
            load(source)
        pipeline = load(source, base_model=tiny_model_folder)
        assert fingerprint(pipeline.unet) == fingerprint(load_denoiser(tmp_path / "unet"))
        assert pipeline.erasure.concepts == ["knife", "gun"]
    ours, theirs = (load_file(place / PARTIAL_NAME) for place in (folder, published))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_smaller_result_takes_the_place_of_a_whole_pipeline(hub, folder):
    """A LoRA or a partial file beside the old UNet would be two models in one repository."""
    push_result(folder, "tester/x")
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "unet")
    push_result(folder, "tester/x")
    assert hub.files("tester/x").keys() - {".gitattributes"} == {"erasure.json", PARTIAL_NAME, CARD_NAME}
    card = hub.files("tester/x")[CARD_NAME].decode()
    assert "load_partial" in card and "It is used like any other model" not in card


def test_a_unet_alone_is_published_with_the_way_to_load_it(hub, folder):
    (folder / "model_index.json").unlink()
    (folder / PARTIAL_NAME).unlink()
    push_result(folder, "tester/x")
    files = hub.files("tester/x")
    assert UNET in files and not any(path.startswith("vae/") for path in files)
    assert 'UNet2DConditionModel.from_pretrained("tester/x", subfolder="unet")' in files[CARD_NAME].decode()


def test_without_a_user_the_repository_is_the_tokens(hub, folder):
    push_result(folder, "mine", commit_message="by hand")
    push_result(folder)
    assert hub.repositories.keys() == {"tester/mine", "tester/tiny-safe"}
    assert hub.repositories["tester/mine"][-1][1] == "by hand"
    assert b'from_pretrained("tester/mine")' in hub.files("tester/mine")[CARD_NAME]


def test_nothing_new_is_no_new_commit(hub, folder):
    push_result(folder, "tester/x")
    push_result(folder, "tester/x")
    assert len(hub.repositories["tester/x"]) == 2


def test_a_new_result_takes_the_place_of_an_old_one_and_leaves_other_files(hub, folder):
    Image.new("RGB", (8, 8)).save(folder / GRID_NAME)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old weights")
    push_result(folder, "tester/x")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="tester/x")
    (folder / GRID_NAME).unlink()
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (folder / PARTIAL_NAME).unlink()
    push_result(folder, "tester/x")
    files = hub.files("tester/x")
    assert files["notes.txt"] == b"mine" and UNET in files
    assert not {GRID_NAME, PARTIAL_NAME, "unet/diffusion_pytorch_model.fp16.safetensors"} & files.keys()


def test_a_repository_of_somebody_elses_making_loses_nothing(hub, folder):
    api = HfApi()
    api.create_repo("tester/x")
    for name in (GRID_NAME, "unet/other.safetensors", "old.ckpt"):
        api.upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="tester/x")
    push_result(folder, "tester/x")
    assert {GRID_NAME, "unet/other.safetensors", "old.ckpt", UNET} <= hub.files("tester/x").keys()


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_can_be_private(hub, folder, private):
    assert push(folder, "--hub_model_id", "tester/x", *(["--hub_private"] if private else [])) == 0
    assert hub.private["tester/x"] == private


# --- the model card --------------------------------------------------------------------------------------------------


def test_the_card_is_made_of_facts(hub, folder, tiny_model_folder):
    push_result(folder, "tester/tiny-safe")
    card = ModelCard.load(folder / CARD_NAME)
    assert card.data.pipeline_tag == "text-to-image" and card.data.library_name == "diffusers"
    assert {"concept-erasure", "sdd", "diffusers-safe", "text-to-image", "diffusers"} <= set(card.data.tags)
    assert card.data.license is None and "It is unknown" in card.text
    record = Provenance.load(folder)
    facts = ["* `knife`\n* `gun`\n", "arXiv 2307.05977", record.base_fingerprint, record.created, "cross-attention"]
    facts += ["| `learning_rate` | `0.001` |", f"torch {torch.__version__}", "Erasure is not a guarantee"]
    for fact in facts:
        assert fact in card.text, fact
    assert "there is no evaluation of this model" in card.text and "samples.png" not in card.text
    assert tiny_model_folder not in card.text and str(folder) not in card.text


def test_the_card_of_an_exported_lora_tells_how_far_off_it_is(hub, folder, tiny_model_folder, tmp_path):
    push_result(folder, "tester/whole")
    assert "relative Frobenius" not in (folder / CARD_NAME).read_text()
    lora = tmp_path / "lora"
    cli.main(["export", str(folder), "--to", "lora", "--rank", "2", "--biases", "--output_dir", str(lora)])
    export = Provenance.load(lora).export
    push_result(lora, "tester/lora")
    card = hub.files("tester/lora")[CARD_NAME].decode()
    worst = export["worst"]
    assert 0.01 < export["error"] < worst["error"]
    assert f"| LoRA | rank 2, made from the erased weights: off by {export['error']:.2%} of what" in card
    assert f"at worst {worst['error']:.2%} (`{worst['parameter']}`) |" in card
    assert "the approximation error is given below" in card

    export |= {"left_out": ["a.bias", "b"], "lost": 0.1}
    Provenance(**{**vars(Provenance.load(lora)), "export": export}).save(lora)
    push_result(lora, "tester/lora")
    left_out = "; 2 changed biases and norms are left out (10.00% of the change), such as `a.bias` |"
    assert left_out in (lora / CARD_NAME).read_text()


@pytest.mark.parametrize("to, name", [("kohya", KOHYA_NAME), ("single-file", CHECKPOINT_NAME)])
def test_files_for_comfyui_are_pushed_and_the_card_says_where_they_go(hub, folder, tmp_path, to, name):
    cli.main(["export", str(folder), "--to", to, "--output_dir", str(tmp_path / to)])
    push_result(tmp_path / to, f"tester/{to}")
    files = hub.files(f"tester/{to}")
    assert name in files and f"`{name}` is " in files[CARD_NAME].decode()
    assert ("relative Frobenius" in files[CARD_NAME].decode()) == (to == "kohya")
    assert "A1111" in files[CARD_NAME].decode()


def test_the_usage_on_the_card_is_true(hub, folder, tiny_model_folder, monkeypatch):
    """The code blocks run, with the folder for the repository, and draw what the erased model draws."""
    push_result(folder, "tester/tiny-safe")
    blocks = re.findall(r"```python\n(.*?)```", (folder / CARD_NAME).read_text(), re.DOTALL)
    assert len(blocks) == 2
    expected = picture(StableDiffusionPipeline.from_pretrained(folder))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo_id, name: str(Path(repo_id) / name))
    for block in blocks:
        names = {}
        block = block.replace("path/to/the/base/model", tiny_model_folder).replace("tester/tiny-safe", str(folder))
        exec(block.replace('pipeline("a photo of a cat").images[0]', "None"), names)
        assert (picture(names["pipeline"]) == expected).all()


def test_the_licence_is_the_bases(hub, tmp_path, tiny_model_folder):
    folder = tmp_path / "base"
    folder.mkdir()
    assert find_base(str(folder)).metadata == {}
    (folder / CARD_NAME).write_text(
        "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\nbase_model: a/b\n---\n"
    )
    assert find_base(str(folder)).metadata == {"base_model": "a/b", "license": "other", "license_name": "x"}
    for broken in ("---\n- a list\n---\n", "---\nlicense: [\n---\n", "no front matter"):
        (folder / CARD_NAME).write_text(broken)
        assert find_base(str(folder)).metadata == {}

    api = HfApi()
    api.create_repo("some/base")
    assert find_base("some/base").metadata == {"base_model": "some/base"}
    (folder / CARD_NAME).write_text("---\nlicense: openrail\nlicense_link: LICENSE.md\n---\n")
    api.upload_file(path_or_fileobj=folder / CARD_NAME, path_in_repo=CARD_NAME, repo_id="some/base")
    assert find_base("some/base").metadata == {
        "base_model": "some/base",
        "license": "openrail",
        "license_link": "https://huggingface.co/some/base/blob/main/LICENSE.md",
    }
    assert not find_base("no/where").on_hub  # a folder of then
    hub.fail("README", 503)
    assert find_base("some/base").metadata == {"base_model": "some/base"}


def test_a_base_on_the_hub_is_linked_and_used(hub, folder):
    HfApi().create_repo("some/base")
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: openrail\n---\n", path_in_repo=CARD_NAME, repo_id="some/base")
    record = json.loads((folder / "erasure.json").read_text())
    (folder / "erasure.json").write_text(json.dumps({**record, "base_model": "some/base", "revision": "main"}))
    push_result(folder, "tester/x")
    card = ModelCard.load(folder / CARD_NAME)
    assert (card.data.base_model, card.data.license) == ("some/base", "openrail")
    assert 'from_pretrained("some/base", revision="main")' in card.text and "`openrail`, applies to" in card.text


def test_concepts_of_any_kind_do_not_break_the_card(hub, folder):
    record = json.loads((folder / "erasure.json").read_text())
    concepts = ["a | b", "`code`", "# head\n\nline", "<b>", *(f"artist {i}" for i in range(40))]
    (folder / "erasure.json").write_text(json.dumps({**record, "concepts": concepts}))
    push_result(folder, "tester/x")
    text = (folder / CARD_NAME).read_text()
    assert "* `a | b`\n* ``` `code` ```\n* `# head line`\n* `<b>`\n* `artist 0`\n" in text
    assert "* and 14 more" in text and "artist 39" not in text
    assert (
        hub.repositories["tester/x"][-1][1] == "Erase a | b, `code`, # head line, <b>, artist 0 and 39 more with SDD"
    )


@pytest.mark.parametrize("place", ["", "evaluation"])
def test_an_evaluation_is_shown_with_its_intervals(hub, folder, place):
    before, after = Estimate.rate(24, 24), Estimate.rate(1, 24)
    headline = [Headline("weapon seen", [before, after], "gone", "Any | of them.")]
    report = Report("t", "s", ("before", "after"), headline, [], {})
    protocol = {"protocol": {"created": "2999-01-01T00:00:00+00:00"}}
    publish(folder / place, protocol, report)
    push_result(folder, "tester/x")
    path = f"{place}/results.json".lstrip("/")
    text = (folder / CARD_NAME).read_text()
    assert "|  | weapon seen, N=24 |\n" in text and f"| after | {after.headline} {after.interval} |" in text
    assert "\n* weapon seen: Any | of them.\n" in text and f"]({path})" in text
    assert {path, path.replace("results.json", "report.html")} <= hub.files("tester/x").keys()


def comparison_of(name, flagged=0):
    """The results of an evaluation of two models, the second of them called by a name."""
    estimate = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 400, "unit": "%"}
    quantity = {"label": "images with nudity", "unit": "%", "better": "lower", "of_concept": True}
    return {
        "protocol": {
            "created": "2999-01-01T00:00:00+00:00",
            "prompts": {"source": "user/prompts", "different": 40, "images": 400, "sha256": "0" * 64},
        },
        "models": {"original": {"model": "base"}, "other": {"model": "other"}, "mine": {"model": name}},
        "metrics": {"nudity": {"quantities": {"nudity": quantity}, "estimates": {"mine": {"nudity": estimate}}}},
        "headline": {"models": ["original", "mine"], "rows": []},
        "report": {"pictures": 8, "flagged": flagged},
    }


def test_the_numbers_of_a_comparison_are_in_the_cards_index(hub, folder):
    (folder / "results.json").write_text(json.dumps(comparison_of(folder.name)))
    push_result(folder, "tester/x")
    result = ModelCard.load(folder / CARD_NAME).data.eval_results[0]
    assert (result.task_type, result.dataset_type, result.metric_type) == ("text-to-image", "user/prompts", "nudity")
    assert result.metric_value == 0.25
    assert result.metric_args == {"low": 0.2, "high": 0.3, "confidence": 0.95, "n": 400}
    (folder / "results.json").write_text(json.dumps(comparison_of("elsewhere")))
    push_result(folder, "tester/x")
    assert ModelCard.load(folder / CARD_NAME).data.eval_results is None  # of which model, is not known


def test_numbers_of_a_benchmark_lie_where_the_hub_looks_for_them(hub, folder, capsys):
    (folder / "results.json").write_text(json.dumps(comparison_of(folder.name)))
    benchmark = ("--hub_model_id", "tester/x", "--benchmark", "user/prompts", "--benchmark_tasks")
    assert push(folder, *benchmark, "nudity=rate") == 0
    name = ".eval_results/user--prompts.yaml"
    entry = parse_eval_result_entries(yaml.safe_load(hub.repositories["tester/x"][-1][2][name]))[0]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("user/prompts", "rate", 25.0)
    assert entry.notes.startswith("95 % interval 20 to 30, N=400")
    capsys.readouterr()
    assert push(folder, *benchmark, "fid=rate") == 2
    assert "has no fid; it has nudity" in capsys.readouterr().err
    assert push(folder, *benchmark[:4], "--benchmark_tasks", "nudity") == 2
    assert "--benchmark_tasks QUANTITY=TASK_ID" in capsys.readouterr().err


@pytest.mark.parametrize(("flagged", "published"), [(0, True), (3, False)])
def test_a_page_with_flagged_pictures_stays_on_this_machine(hub, folder, flagged, published):
    (folder / "results.json").write_text(json.dumps(comparison_of(folder.name, flagged)))
    (folder / "report.html").write_text("pictures")
    push_result(folder, "tester/x")
    assert ("report.html" in hub.files("tester/x")) == published and "results.json" in hub.files("tester/x")
    assert ("report.html" in (folder / CARD_NAME).read_text()) == published


def test_an_evaluation_of_an_earlier_erasure_is_not_shown(hub, folder):
    (folder / "results.json").write_text('{"headline": [], "protocol": {"created": "1999-01-01T00:00:00+00:00"}}')
    push_result(folder, "tester/x")
    assert "there is no evaluation of" in (folder / CARD_NAME).read_text()
    assert "results.json" not in hub.files("tester/x")


def test_a_card_that_a_person_wrote_or_edited_is_kept(hub, folder, caplog):
    push_result(folder, "tester/x")
    on_hub = hub.files("tester/x")[CARD_NAME].decode()
    edited = on_hub.replace("## Limits", "Some words of my own.\n\n## Limits")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo=CARD_NAME, repo_id="tester/x")
    Image.new("RGB", (8, 8)).save(folder / GRID_NAME)
    push_result(folder, "tester/x")
    assert hub.files("tester/x")[CARD_NAME].decode() == edited and GRID_NAME in hub.files("tester/x")
    assert "edited by a person, and is kept" in caplog.text
    assert is_ours((folder / CARD_NAME).read_text())

    (folder / CARD_NAME).write_text("mine")
    push_result(folder, "tester/y")
    assert (folder / CARD_NAME).read_text() == "mine" and hub.files("tester/y")[CARD_NAME] == b"mine"


# --- a network that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [503, 0], ids=["503", "cut"])
@pytest.mark.parametrize(
    "request_", ["repos/create", "preupload", "PUT /lfs", "POST .*/commit", "resolve/main/README", "tree/main"]
)
def test_what_passes_is_tried_again(hub, folder, request_, status):
    hub.fail(request_, status, times=2)
    push_result(folder, "tester/x")
    assert [fault.times for fault in hub.faults] == [0]
    assert len(hub.repositories["tester/x"]) == 2 and PIPELINE <= hub.files("tester/x").keys()


def test_trying_again_is_told_and_has_an_end(hub, folder, caplog):
    hub.fail("commit", 503)
    with pytest.raises(PushError) as error:
        push_result(folder, "tester/x", private=True)
    assert str(error.value) == (
        "not pushed: the Hub cannot answer now (503 Service Unavailable). The result in "
        f"{folder} is complete; push it later with: diffusers-safe push {folder} --hub_model_id tester/x --hub_private"
    )
    assert hub.pauses == list(RETRY_WAITS)
    assert [f"again in {wait} s" in record.message for wait, record in zip(RETRY_WAITS, caplog.records)] == [True] * 3
    assert len(hub.repositories["tester/x"]) == 1 and is_ours((folder / CARD_NAME).read_text())


@pytest.mark.parametrize("status", [500, 403, 0])
def test_a_card_that_cannot_be_read_is_not_written_over(hub, folder, status):
    push_result(folder, "tester/x")
    HfApi().upload_file(path_or_fileobj=b"MINE", path_in_repo=CARD_NAME, repo_id="tester/x")
    hub.fail("resolve/main/README", status)
    with pytest.raises(PushError, match=f"not pushed: .*{status or 'no connection'}"):
        push_result(folder, "tester/x")
    assert hub.files("tester/x")[CARD_NAME] == b"MINE"


FAULTS = {
    "503": ("POST /api/repos/create", 503, "the Hub cannot answer now (503"),
    "cut": ("PUT /lfs", 0, "no connection to the Hub"),
    "403": ("POST .*/commit", 403, "the token has no right to write there (403"),
    "401": ("whoami", 401, "the Hub does not accept the token (401)"),
}


@pytest.mark.parametrize(
    "fault", [fault if fault in ("cut", "403") else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_the_result_is_complete_before_and_can_be_pushed_later(hub, tiny_model_folder, tmp_path, capsys, fault):
    pattern, status, told = FAULTS[fault]
    hub.fail(pattern, status)
    out = tmp_path / "my model"
    assert erase(tiny_model_folder, out, "--push_to_hub", "--hub_model_id", "later") == PUSH_FAILED == 3
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert told in line and "knife, gun: " in printed.out and "the result is in" in printed.out
    for name in ("erasure.json", GRID_NAME, CARD_NAME, *PIPELINE):
        assert (out / name).is_file(), name
    assert picture(StableDiffusionPipeline.from_pretrained(out)).shape == (1, 64, 64, 3)

    program, command, *arguments = shlex.split(line.split("push it later with: ")[1])
    assert (program, command, arguments[0]) == ("diffusers-safe", "push", str(out))
    assert push(*arguments) == PUSH_FAILED
    assert "Traceback" not in capsys.readouterr().err
    hub.heal()
    assert push(*arguments) == 0
    assert f"published at {hub.url}/tester/later" in capsys.readouterr().out
    files = hub.files("tester/later")
    assert {"erasure.json", GRID_NAME, CARD_NAME, *PIPELINE} <= files.keys() and b"](samples.png)" in files[CARD_NAME]


def test_the_picture_on_the_card_is_the_last_that_validation_drew(hub, tiny_model_folder, tmp_path, monkeypatch):
    drawn, draw = [], Samples.draw
    monkeypatch.setattr(Samples, "draw", lambda samples, which: drawn.append(which) or draw(samples, which))
    assert erase(tiny_model_folder, tmp_path / "out", "--push_to_hub", "--validation_prompts", "a knife", "a cat") == 0
    assert drawn == ["ema"]
    pictures = [tmp_path / "out" / name for name in (GRID_NAME, "validation/step-2.png")]
    assert len({Image.open(picture).tobytes() for picture in pictures}) == 1


def test_the_token_is_written_nowhere(hub, tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    more = ("--push_to_hub", "--hub_token", TOKEN, "--save", "both", "--checkpointing_steps", "1")
    assert erase(tiny_model_folder, tmp_path / "out", *more) == 0
    assert "tester/out" in hub.repositories
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("checkpoint-1" in path.parts for path in paths)
    assert not [path for path in paths if TOKEN.encode() in path.read_bytes()]
    assert not {name for name in Provenance.load(tmp_path / "out").arguments if "hub" in name}
    # Where it is published is no part of what was trained.
    more = ("--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1"))
    assert erase(tiny_model_folder, tmp_path / "again", *more) == 0


@pytest.mark.slow
def test_through_processes_of_their_own(tiny_model_folder, tmp_path):
    """The script with a bad token, the push later, and what diffusers then loads from the Hub."""
    script = [sys.executable, str(ROOT / "train_sdd.py"), *options(tiny_model_folder, "out", "--push_to_hub")]
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        environment["ACCELERATE_USE_CPU"] = "true"

        def run(command, **changes):
            return subprocess.run(
                command, env={**environment, **changes}, cwd=tmp_path, capture_output=True, text=True, timeout=240
            )

        failed = run(script, HF_TOKEN="hf_wrong")
        assert failed.returncode == PUSH_FAILED, failed.stderr[-3000:]
        (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
        assert "does not accept the token" in line and line.endswith("diffusers-safe push out --hub_model_id out")
        assert not hub.repositories

        code = """
import numpy, torch
from diffusers import DiffusionPipeline
from diffusers_safe import ErasedStableDiffusionPipeline, cli
cli.main(["push", "out", "--hub_model_id", "out"])
pipeline = DiffusionPipeline.from_pretrained("tester/out")
generator = torch.Generator().manual_seed(0)
images = pipeline("a knife", num_inference_steps=2, generator=generator, output_type="np").images
numpy.save("images.npy", images)
"""
        done = run([sys.executable, "-c", code])
        assert done.returncode == 0, done.stderr[-3000:]
    local = picture(StableDiffusionPipeline.from_pretrained(tmp_path / "out"))
    assert difference(np.load(tmp_path / "images.npy"), local) < ROUNDING
    assert difference(local, picture(StableDiffusionPipeline.from_pretrained(tiny_model_folder))) > 10 * ROUNDING


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nowhere}"], "the folder holds no erased model"),
        (["{empty}"], "holds erasure.json, but neither a pipeline nor erased weights"),
        (["{folder}", "--hub_model_id", "a/b/c"], "hub_model_id 'a/b/c': not a name of a repository; give user/name"),
        (["{folder}", "--hub_model"], "unrecognized arguments: --hub_model"),
        ([], "the following arguments are required: --folder"),
        (["{broken}"], "results.json: cannot be read as the results of an evaluation"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_one_line(hub, folder, tmp_path, capsys, arguments, message):
    places = {name: tmp_path / name for name in ("nowhere", "empty", "broken")}
    places["empty"].mkdir()
    shutil.copy(folder / "erasure.json", places["empty"])
    shutil.copytree(folder, places["broken"])
    (places["broken"] / "results.json").write_text("{")
    code = push(*(argument.format(folder=folder, **places) for argument in arguments))
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not hub.requests


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("models",), None),
        (("protocol", "prompts"), []),
        (("metrics",), "none"),
        (("headline",), "none"),
        (("report",), "none"),
    ],
)
def test_a_damaged_evaluation_is_refused_in_one_line(hub, folder, capsys, place, value):
    results = comparison_of(folder.name)
    inner = results
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.html").write_text("<html></html>")
    assert push(folder) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'results.json'}: not the results of an evaluation" in error and error.count("\n") == 1
    assert not hub.requests


def test_a_damaged_picture_is_refused_in_one_line(hub, folder, capsys):
    (folder / GRID_NAME).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert push(folder) == 2
    error = capsys.readouterr().err
    assert f"{folder / GRID_NAME} cannot be read as an image" in error and error.count("\n") == 1
    assert not hub.requests


def test_no_token_or_no_network_by_wish_is_told_before_any_work(
    tiny_model_folder, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("diffusers_safe.hub.push.get_token", lambda: None)
    message = "hub_token: none given; give --hub_token, set HF_TOKEN, or log in"
    assert erase(tiny_model_folder, tmp_path / "out", "--push_to_hub") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert push(folder) == 2
    assert message in capsys.readouterr().err
    assert erase(tiny_model_folder, tmp_path / "out", "--push_to_hub", "--hub_token", "x") == 2  # tests are offline
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_student_is_published_with_its_own_card(hub, teacher_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder)
    pipeline.register_modules(unet=build_student(pipeline.unet, "bk-small"))
    erasure = {"base_model": teacher_folder, "concepts": ["knife"], "arguments": {"output_dir": str(tmp_path)}}
    record = Distillation(
        teacher=teacher_folder,
        teacher_fingerprint="0" * 16,
        student="bk-small",
        parameters={"student": 300, "teacher": 500},
        macs={"student": 2e9, "teacher": 3e9},
        arguments={"train_data_dir": str(tmp_path / "data"), "task_weight": 1.0, "output_weight": 0.0, "seed": 7},
        teacher_erasure=erasure,
        data={
            "dropped": {"name a forbidden concept": 3},
            "unreadable": {str(tmp_path / "a.png"): f"no such file: {tmp_path}"},
        },
        losses={"task": 0.125},
    )
    save_student(pipeline, record, tmp_path / "out")
    assert push(tmp_path / "out", "--hub_model_id", "tester/small") == 0
    files = hub.files("tester/small")
    published = {name: content.decode(errors="replace") for name, content in files.items() if "weights" not in name}
    local = (str(tmp_path), str(Path(teacher_folder).parent))
    assert not any(folder in text for text in published.values() for folder in local)
    assert {
        "distillation.json",
        "model_index.json",
        "unet/config.json",
    } <= files.keys() and "erasure.json" not in files
    card = published["README.md"]
    for word in (
        "bk-small", "| this student | 300 | 2 G |", "| its teacher | 500 | 3 G |", "task x 1", "task 0.125", "`7`",
        "3 rows name a forbidden concept", "These concepts were erased from its teacher: `knife`",
        "knowledge-distillation",
        "Nothing yet: there is no evaluation of this model. How much quality was lost compared with its teacher",
    ):  # fmt: skip
        assert word in card, word
    assert "output x" not in card
    image = StableDiffusionPipeline.from_pretrained(tmp_path / "out")("a cat", num_inference_steps=1).images[0]
    assert image.size == (64, 64)


def test_a_distillation_publishes_its_student(hub, teacher_folder, tmp_path):
    """With pictures of a few captions, where no validation prompts were given."""
    (tmp_path / "data").mkdir()
    emoji_dataset(4, cache_dir=str(tmp_path / "cache")).to_parquet(tmp_path / "data" / "train.parquet")
    words = [
        "--pretrained_model_name_or_path",
        teacher_folder,
        "--student",
        "bk-tiny",
        "--caption_column",
        "caption",
    ]
    words += ["--train_data_dir", str(tmp_path / "data"), "--center_crop", "--num_inference_steps", "1"]
    words += ["--max_train_steps", "1", "--train_batch_size", "2", "--output_dir", str(tmp_path / "small")]
    with accelerate_on_cpu():
        distillation.main([*words, "--push_to_hub", "--hub_model_id", "tester/small"])
    files = hub.files("tester/small")
    assert {"README.md", "distillation.json", GRID_NAME, "unet/config.json"} <= files.keys()
    assert str(tmp_path).encode() not in b"".join(content for name, content in files.items() if "json" in name)
