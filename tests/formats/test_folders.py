import pytest

from diffusers_safe.formats import written_aside
from diffusers_safe.output_folders import RECORD
from diffusers_safe.provenance import Provenance


OLD = ("unet", "model_index.json", "erasure.json")
NEW = ("erased_weights.safetensors", "erasure.json")


def record(concept):
    return Provenance("base", None, [concept], "sdd", "xattn", {})


def test_a_result_that_fails_leaves_no_folder_that_was_not_there(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path / "runs" / "new" / "knife", record("new")):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_a_result_is_whole_or_absent_and_replaces_the_one_before(tmp_path):
    with written_aside(tmp_path, record("old")) as aside:
        (aside / "unet").mkdir()
        (aside / "unet" / "old").write_text("old")
        (aside / "model_index.json").write_text("old")
    (tmp_path / "log.jsonl").write_text("kept")
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path, record("new")) as aside:
        (aside / "erased_weights.safetensors").write_text("new")
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {
        "unet",
        "model_index.json",
        "erasure.json",
        "log.jsonl",
        RECORD,
    }
    assert Provenance.load(tmp_path).concepts == ["old"]
    with written_aside(tmp_path, record("new")) as aside:
        (aside / "erased_weights.safetensors").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {
        "erased_weights.safetensors",
        "erasure.json",
        "log.jsonl",
        RECORD,
    }
    assert Provenance.load(tmp_path).concepts == ["new"]
