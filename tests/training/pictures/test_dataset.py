"""Every form of data opens as the same pictures and captions; unusable data is reported in one line."""

import gzip
import io
import json
import tarfile
import zipfile
from functools import partial

import datasets
import pandas as pd
import pytest
from PIL import Image, ImageChops

from diffusers_safe.concepts import names_concept
from diffusers_safe.preparation.folders import tar_samples
from diffusers_safe.training.pictures import CaptionedImages, open_dataset
from diffusers_safe.training.pictures.images import decode_image
from picture_files import encoded


FORMS = ["saved", "folder", "parquet", "tars", "lists"]


def content(data):
    """[(PIL image, captions)] of the used rows."""
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
    "one column for both": ({"caption_column": "image"}, "caption_column 'image': is also the image_column"),
    "no source": ({"train_data_dir": None}, "give exactly one of dataset_name, train_data_dir, data_files"),
    "two sources": ({"dataset_name": "a/b"}, "dataset_name, train_data_dir: give exactly one of"),
    "configuration of a folder": (
        {"train_data_dir": "a", "dataset_config_name": "x"},
        "train_data_dir a: dataset_config_name 'x': does not apply to train_data_dir, only to dataset_name",
    ),
    "no folder": ({"train_data_dir": "no/such"}, "train_data_dir no/such: no such folder"),
    "no split": ({"split": "test"}, "est"),
    "no file": ({"train_data_dir": None, "data_files": ["no/such.tar"]}, r"data_files .*no/such.tar: no such file"),
    "no kind": ({"train_data_dir": None, "data_files": ["a.xyz"]}, "kinds are .parquet, .arrow, .tar"),
    "no repository": ({"train_data_dir": None, "dataset_name": "no/such"}, "dataset_name no/such: "),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_invalid_sources_are_refused(case, streaming, forms):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        open_dataset(**{**forms["folder"], **changes, "streaming": streaming})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged PAR1", bytes(2048)])
@pytest.mark.parametrize("kind", ["parquet", "tar", "jsonl"])
def test_damaged_files_are_refused(kind, content, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data_files .*a.{kind}'.: ") as error:
        open_dataset(data_files=[str(path)], cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_fields_of_columns_are_refused(streaming, forms):
    with pytest.raises(ValueError, match="caption_column 'json.text': no field 'text'; there are captions"):
        open_dataset(**{**forms["lists"], "caption_column": "json.text"}, streaming=streaming)


def test_columns_of_other_types_are_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"], "number": [3, 4]})
    with pytest.raises(ValueError, match="image_column 'image': must contain images, not Value"):
        CaptionedImages(rows)
    pictures = rows.remove_columns("image").add_column("image", [encoded(Image.new("RGB", (8, 8)))] * 2)
    assert len(CaptionedImages(pictures)) == 2  # bytes are also images
    with pytest.raises(ValueError, match="caption_column 'number': must contain texts or lists of texts, not int"):
        CaptionedImages(pictures, caption_column="number")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_dataset_is_refused(streaming):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [], "text": []}, features)
    if streaming:
        rows = datasets.IterableDataset.from_generator(lambda: iter([]), features=features)
    with pytest.raises(ValueError, match="the dataset is empty"):
        CaptionedImages(rows)


@pytest.mark.parametrize("text", ["file_name,text\n", "file_name,text", "\n\n", ""])
def test_a_table_without_rows_is_named(tmp_path, text):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match="metadata.csv: has no rows below its header"):
        open_dataset(train_data_dir=str(tmp_path))
    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        open_dataset(data_files=[str(tmp_path / "empty.parquet")])


@pytest.mark.parametrize("option", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_table_that_has_no_rows_or_is_damaged_is_named(tmp_path, streaming, option):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = tmp_path / "metadata.parquet"
    opened = partial(open_dataset, **{option: str(tmp_path)}, streaming=streaming, cache_dir=str(tmp_path / ".cache"))
    pd.DataFrame({"file_name": ["a.png"], "text": ["a"]}).to_parquet(table)
    opened()
    whole = table.read_bytes()
    for empty in (pd.DataFrame({"file_name": [], "text": []}).to_parquet, datasets.Dataset.from_dict({}).to_parquet):
        empty(table)  # pandas writes a group of rows without rows, `datasets` no group
        with pytest.raises(ValueError, match="metadata.parquet: has no rows"):
            opened()
    table.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="metadata.parquet: cannot be read as a parquet file"):
        opened()


def test_rows_that_name_a_forbidden_concept_are_dropped(make_data, emoji):
    data = make_data({1: "", 2: "A KNIFE, on a plate", 3: "two knives"}, forbidden_concepts=["knife", "background"])
    expected = [caption for _, caption in [emoji[0], *emoji[4:]] if not names_concept(caption, "background")]
    assert sorted([data.captions(place)[0] for place in range(len(data))]) == sorted([*expected, "two knives"])
    assert data.dropped == {
        "without a caption": 1,
        "with a caption that names a forbidden concept": len(emoji) - 2 - len(expected),
    }


def test_any_of_several_captions_counts(forms):
    with pytest.raises(ValueError, match="no row of the dataset is left; dropped: 24 rows with a caption that names"):
        open_dataset(**forms["lists"], forbidden_concepts=["again"])


def test_max_train_samples_depends_on_the_seed(make_data, emoji):
    def part(**kwargs):
        data = make_data(max_train_samples=6, **kwargs)
        return [data.captions(place) for place in range(len(data))]

    everything = [[caption] for _, caption in emoji]
    assert part() == part() != part(seed=1)
    assert len(part()) == 6 and all(captions in everything for captions in part())
    assert len(make_data(max_train_samples=100)) == 24
    assert len(make_data(max_train_samples=6, forbidden_concepts=["style"])) == 6


def test_the_fingerprint_depends_on_the_content_only(forms, make_data, emoji):
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


def folder_with_texts(folder, emoji, count=3):
    """Pictures with a `.txt` file next to each, and one without."""
    folder.mkdir()
    for i, (image, caption) in enumerate(emoji[: count + 1]):
        image.save(folder / f"{i}.png")
        if i < count:
            (folder / f"{i}.txt").write_text(f"{caption}\n")
    return folder


def img2dataset_folder(folder, emoji, form):
    """The output of img2dataset: shards of two samples, each with a table and counts; the first has no picture."""
    folder.mkdir()
    for shard in range(3):
        numbers = range(2 * shard - 2, 2 * shard) if shard else range(0)
        facts = [{"key": f"{i:09}", "caption": emoji[i][1], "url": f"http://example.org/{i}"} for i in numbers]
        pictures = [encoded(emoji[i][0].convert("RGB"), "PNG") for i in numbers]
        files = [
            (f"{fact['key']}.{ending}", content)
            for fact, picture in zip(facts, pictures)
            for ending, content in {
                "jpg": picture,
                "json": json.dumps(fact).encode(),
                "txt": fact["caption"].encode(),
            }.items()
        ]
        if form == "webdataset":
            with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
                for name, content in files:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        elif form == "files":
            (folder / f"{shard:05}").mkdir()
            for name, content in files:
                (folder / f"{shard:05}" / name).write_bytes(content)
        else:
            facts = [{**fact, "jpg": picture} for fact, picture in zip(facts, pictures)]
        if facts or form != "parquet":
            pd.DataFrame(facts or [{"key": "x"}]).to_parquet(folder / f"{shard:05}.parquet")
        (folder / f"{shard:05}_stats.json").write_text(json.dumps({"count": 2, "successes": len(facts)}))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["texts", "webdataset", "files", "parquet"])
def test_folders_of_other_tools_need_no_options(form, streaming, emoji, tmp_path):
    folder = tmp_path / "data [1]"
    folder_with_texts(folder, emoji, 4) if form == "texts" else img2dataset_folder(folder, emoji, form)
    data = open_dataset(train_data_dir=str(folder), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    found = [(image, captions) for image, captions in content(data) if captions]
    assert [captions for _, captions in found] == [[caption] for _, caption in emoji[:4]]
    for (image, _), (expected, _) in zip(found, emoji):
        assert ImageChops.difference(image, expected.convert("RGB")).getbbox() is None
    if not streaming:
        assert data.dropped == ({"without a caption": 1} if form == "texts" else {})


@pytest.mark.parametrize(
    "content, message", [(b"\xff\xfea", "must be text in UTF-8"), (b"a\0b", "contains a null char")]
)
def test_a_caption_is_text(content, message, emoji, tmp_path):
    folder_with_texts(tmp_path / "texts", emoji, 2)
    caption = min((tmp_path / "texts").glob("*.txt"))
    caption.write_bytes(content)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(caption, caption.name)
    for read in (
        lambda: open_dataset(train_data_dir=str(tmp_path / "texts"), cache_dir=str(tmp_path / "cache")),
        lambda: list(tar_samples(tmp_path / "a.tar")),
    ):
        with pytest.raises(ValueError, match=f"{caption.name}.*{message}"):
            read()


def test_splits_of_tar_files_are_kept(emoji, tmp_path):
    for split, (image, caption) in zip(("train", "test"), emoji):
        with tarfile.open(tmp_path / f"{split}-00000.tar", "w") as tar:
            for name, data in (("0.png", encoded(image)), ("0.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "report.json").write_text("{}")
    for split, (_, caption) in zip(("train", "test"), emoji):
        data = open_dataset(train_data_dir=str(tmp_path), split=split, cache_dir=str(tmp_path / "cache"))
        assert [data.captions(place) for place in range(len(data))] == [[caption]]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_error_lists_the_files_of_a_folder_without_captions(streaming, emoji, tmp_path):
    def message():
        with pytest.raises(ValueError) as error:
            open_dataset(train_data_dir=str(tmp_path / "data"), streaming=streaming, cache_dir=str(tmp_path / "cache"))
        return str(error.value)

    (tmp_path / "data").mkdir()
    assert "no images with captions (metadata.csv, " in message() and message().endswith(
        "the folder contains no files"
    )
    emoji[0][0].save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "notes.md").write_text("")
    assert message().endswith("the folder contains 1 .png (a.png) and 1 .md (notes.md)")
    (tmp_path / "data" / "captions.csv").write_text("file,text\na.png,a\n")
    assert (
        "image_column 'image': no such column; there are file, text; the folder contains 1 .png (a.png), 1 .csv"
        in message()
    )


@pytest.fixture
def private(emoji, tmp_path):
    return folder_with_texts(tmp_path / "private", emoji, 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("name", ["../private/0.png", "{private}/0.png", "a/../../private/0.png"])
def test_metadata_does_not_lead_outside(name, kind, streaming, private, emoji, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    emoji[0][0].save(folder / "0.png")
    rows = pd.DataFrame({"file_name": ["0.png", name.format(private=private)], "text": ["a", "b"]})
    if kind == "csv":
        rows.to_csv(folder / "metadata.csv", index=False)
    else:
        rows.to_json(folder / "metadata.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match="private/0.png") as error:
        open_dataset(train_data_dir=str(folder), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_deeply_nested_json_is_refused(streaming, emoji, tmp_path):
    emoji[0][0].save(tmp_path / "0.png")
    text = json.dumps({"file_name": "0.png", "text": "DEEP"}).replace('"DEEP"', "[" * 20_000 + "]" * 20_000)
    (tmp_path / "metadata.jsonl").write_text(text)
    for source in (
        {"train_data_dir": str(tmp_path)},
        {"dataset_name": str(tmp_path)},
        {"data_files": [f"{tmp_path}/*.jsonl"]},
    ):
        with pytest.raises(ValueError, match="metadata.jsonl, line 1: JSON nested more than 100 levels deep"):
            open_dataset(**source, streaming=streaming, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("link", ["4.png", "0.txt", "folder", "0.tar", "0.parquet"])
def test_links_do_not_lead_outside(link, streaming, private, emoji, tmp_path):
    folder = folder_with_texts(tmp_path / "data", emoji)
    (folder / link).unlink(missing_ok=True)
    (folder / link).symlink_to(private if link == "folder" else private / f"0.{'txt' if link == '0.txt' else 'png'}")
    with pytest.raises(ValueError, match=f"{link}' lies outside of {folder}; only files inside are read"):
        open_dataset(train_data_dir=str(folder), streaming=streaming, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "path",
    ["{private}/0.png", "file://{private}/0.png", "http://127.0.0.1:9/0.png", "zip://0.png::{private}/0.zip", "0.png"],
)
def test_paths_in_tables_do_not_lead_outside(path, streaming, private, tmp_path, monkeypatch):
    monkeypatch.chdir(private)  # where relative paths would be resolved
    (tmp_path / "data").mkdir()
    image = {"bytes": None, "path": path.format(private=private)}
    pd.DataFrame({"image": [image], "text": ["a"]}).to_parquet(tmp_path / "data" / "0.parquet")
    with pytest.raises(ValueError, match=f"{image['path'][-5:]}' lies outside of"):
        content(
            open_dataset(train_data_dir=str(tmp_path / "data"), streaming=streaming, cache_dir=str(tmp_path / "c"))
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_links_inside_and_archives_are_read(streaming, emoji, tmp_path):
    """The second folder is a snapshot in the cache of the Hub, whose files are links to blobs."""
    repository = tmp_path / "datasets--user--name"
    repository.mkdir()
    folder_with_texts(repository / "blobs", emoji, 1)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("0.png", "0.txt"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "link").symlink_to(repository / "blobs")
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "a.zip", "w") as archive:
        archive.writestr("0.png", encoded(emoji[0][0]))
        archive.writestr("metadata.csv", f'file_name,text\n0.png,"{emoji[0][1]}"\n')
    for folder in (snapshot, tmp_path / "link", tmp_path / "zipped"):
        data = open_dataset(train_data_dir=str(folder), streaming=streaming, cache_dir=str(tmp_path / "cache"))
        found = [captions for _, captions in content(data) if captions]
        assert found == [[emoji[0][1]]]


@pytest.mark.parametrize("option", ["train_data_dir", "data_files", "dataset_name"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tar_files_that_are_damaged_or_cut_short_are_refused(tmp_path, streaming, option):
    """`datasets` takes what follows for the end, and would train on what comes before."""
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        for name, content in {"a.png": encoded(Image.new("RGB", (8, 8))), "a.txt": b"a caption"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        end = tar.offset
    header, content = end - 2 * tarfile.BLOCKSIZE, whole.read_bytes()  # of the last member
    source = {option: [str(whole)] if option == "data_files" else str(tmp_path)}
    opened = partial(open_dataset, **source, streaming=streaming, cache_dir=str(tmp_path / ".cache"))
    opened()
    damaged = {
        "damaged": content[: header + 100] + b"XXXX" + content[header + 104 :],
        "zeroed": content[:header] + bytes(tarfile.BLOCKSIZE) + content[header + tarfile.BLOCKSIZE :],
        "two": content + content,
        "cut": content[: header + 100],
        "cut between members": content[:header],
        "none": b"",
        "compressed and cut": gzip.compress(content)[:-30],
        "compressed and damaged": gzip.compress(content[: header + 100] + b"XXXX" + content[header + 104 :]),
    }
    for case, bad in damaged.items():
        whole.write_bytes(bad)
        with pytest.raises(ValueError, match="whole.tar: cannot be read as a tar file") as error:
            opened()
        assert "\n" not in str(error.value), case
