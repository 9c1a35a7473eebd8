import pytest

from diffusers_safe.formats import written_aside


def test_a_result_is_whole_or_absent_and_replaces_the_one_before(tmp_path):
    with written_aside(tmp_path) as aside:
        (aside / "unet").mkdir()
        (aside / "unet" / "old").write_text("old")
        (aside / "model_index.json").write_text("old")
    (tmp_path / "log.jsonl").write_text("kept")
    with pytest.raises(KeyboardInterrupt), written_aside(tmp_path) as aside:
        (aside / "erasure.json").write_text("new")
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "model_index.json", "log.jsonl"}
    with written_aside(tmp_path) as aside:
        (aside / "erasure.json").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"erasure.json", "log.jsonl"}
