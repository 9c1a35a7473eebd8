from huggingface_hub import ModelCard, ModelCardData

from diffusers_safe.hub.cards import CARD_NAME, is_ours, make_card, write_card


def card(text="# Model\n\nIt says {digest}.\n"):
    return make_card(ModelCardData(license="mit", tags=["a", "b"]), text)


def test_a_card_keeps_metadata_and_text():
    read = ModelCard(str(card()))
    assert read.data.license == "mit" and read.data.tags == ["a", "b"] and "It says {digest}." in read.text


def test_ours_is_told_from_what_a_person_changed():
    text = str(card())
    assert is_ours(text) and is_ours(text.replace("\n", "\r\n"))
    for edited in (
        text + "mine",
        text.replace("license: mit", "license: other"),
        text.replace("# Model", "# My model"),
    ):
        assert not is_ours(edited)
    assert not is_ours("# somebody's own") and not is_ours("")


def test_only_our_own_card_is_written_over(tmp_path):
    path = tmp_path / CARD_NAME
    write_card(card("# One\n"), tmp_path)
    write_card(card("# Two\n"), tmp_path)
    assert "# Two" in path.read_text()
    path.write_text(path.read_text() + "edited\n")
    write_card(card("# Three\n"), tmp_path)
    assert "# Two" in path.read_text() and "edited" in path.read_text()
    path.write_bytes(b"\xff\xfe not UTF-8")
    write_card(card("# Four\n"), tmp_path)
    assert path.read_bytes().startswith(b"\xff\xfe")
