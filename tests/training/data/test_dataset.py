"""Every form of data opens as the same pictures and captions; what cannot be used is told in one line."""

import datasets
import pytest
from PIL import Image, ImageChops

from diffusers_safe.concepts import names_concept
from diffusers_safe.training.data import CaptionedImages, open_dataset
from diffusers_safe.training.data.images import decode_image
from picture_files import encoded


FORMS = ["saved", "folder", "parquet", "tars", "lists"]


def content(data):
    """[(PIL image, captions)] of what is used."""
    if data.streaming:
        return [(decode_image(data.image_of(row)), data.captions_of(row)) for row in data.rows]
    return [(decode_image(data.image_of(data.row(place))), data.captions(place)) for place in range(len(data))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form, streaming, forms, emoji):
    found = content(open_dataset(**forms[form], streaming=streaming))
    assert len(found) == len(emoji)
    for (image, captions), (expected, caption) in zip(found, emoji):
        assert ImageChops.difference(image, expected.convert("RGB")).getbbox() is None
        assert captions == ([caption, f"{caption}, again"] if form == "lists" else [caption])


def test_pictures_are_not_decoded(make_data):
    data = make_data({0: b"no picture"})
    assert data.row(0)["image"]["bytes"] == b"no picture"
    assert next(iter(make_data({0: b"no picture"}, streaming=True).rows))["image"]["bytes"] == b"no picture"


WRONG = {
    "no column of images": ({"image_column": "jpg"}, "image_column 'jpg': no such column; there are image, text"),
    "no column of captions": (
        {"caption_column": "txt"},
        "caption_column 'txt': no such column; there are image, text",
    ),
    "one column for both": ({"caption_column": "image"}, "caption_column 'image': is the image_column, too"),
    "no source": ({"train_data_dir": None}, "give exactly one of dataset_name, train_data_dir, data_files"),
    "two sources": ({"dataset_name": "a/b"}, "dataset_name, train_data_dir: give exactly one of"),
    "no folder": ({"train_data_dir": "no/such"}, "train_data_dir no/such: no such folder"),
    "no split": ({"split": "test"}, "est"),
    "no file": ({"train_data_dir": None, "data_files": ["no/such.tar"]}, r"data_files .*no/such.tar: no such file"),
    "no kind": ({"train_data_dir": None, "data_files": ["a.xyz"]}, "kinds are .parquet, .arrow, .tar"),
    "no repository": ({"train_data_dir": None, "dataset_name": "no/such"}, "dataset_name no/such: "),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_opened_is_told(case, streaming, forms):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as told:
        open_dataset(**{**forms["folder"], **changes, "streaming": streaming})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged PAR1", bytes(2048)])
@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
def test_damaged_files_are_told(kind, content, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data_files .*a.{kind}'.: ") as told:
        open_dataset(data_files=[str(path)], cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_fields_of_columns_are_told(streaming, forms):
    with pytest.raises(ValueError, match="caption_column 'json.text': no field 'text'; there are captions"):
        open_dataset(**{**forms["lists"], "caption_column": "json.text"}, streaming=streaming)


def test_columns_that_hold_something_else_are_told(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"], "number": [3, 4]})
    with pytest.raises(ValueError, match="image_column 'image': holds no images but Value"):
        CaptionedImages(rows)
    pictures = rows.remove_columns("image").add_column("image", [encoded(Image.new("RGB", (8, 8)))] * 2)
    assert len(CaptionedImages(pictures)) == 2  # bytes are images, too
    with pytest.raises(ValueError, match="caption_column 'number': must hold texts or lists of texts, not int"):
        CaptionedImages(pictures, caption_column="number")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_dataset_is_told(streaming):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [], "text": []}, features)
    if streaming:
        rows = datasets.IterableDataset.from_generator(lambda: iter([]), features=features)
    with pytest.raises(ValueError, match="the dataset is empty"):
        CaptionedImages(rows)


def test_rows_that_name_a_forbidden_concept_are_dropped(make_data, emoji):
    data = make_data({1: "", 2: "A KNIFE, on a plate", 3: "two knives"}, forbidden_concepts=["knife", "background"])
    expected = [caption for _, caption in [emoji[0], *emoji[4:]] if not names_concept(caption, "background")]
    assert sorted([data.captions(place)[0] for place in range(len(data))]) == sorted([*expected, "two knives"])
    assert data.dropped == {
        "have no caption": 1,
        "have a caption that names a forbidden concept": len(emoji) - 2 - len(expected),
    }


def test_any_of_several_captions_counts(forms):
    with pytest.raises(
        ValueError, match="no row of the dataset is left: 24 rows have a caption that names a forbidden"
    ):
        open_dataset(**forms["lists"], forbidden_concepts=["again"])


def test_a_part_is_drawn_from_the_seed(make_data, emoji):
    def part(**kwargs):
        data = make_data(max_train_samples=6, **kwargs)
        return [data.captions(place) for place in range(len(data))]

    everything = [[caption] for _, caption in emoji]
    assert part() == part() != part(seed=1)
    assert len(part()) == 6 and all(captions in everything for captions in part())
    assert len(make_data(max_train_samples=100)) == 24
    assert len(make_data(max_train_samples=6, forbidden_concepts=["style"])) == 6


def test_fingerprint_is_of_the_content(forms, make_data, emoji):
    fingerprints = {open_dataset(**forms[form]).fingerprint() for form in ("saved", "folder", "parquet", "tars")}
    assert fingerprints == {make_data().fingerprint()}
    picture = encoded(emoji[3][0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    changed = [
        open_dataset(**forms["lists"]),
        make_data({3: "another caption"}),
        make_data({3: picture}),
        make_data(count=23),
        make_data(max_train_samples=23),
    ]
    assert len({data.fingerprint() for data in changed} | fingerprints) == 6
