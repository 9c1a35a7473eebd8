"""24 emoji with captions, in every form that `datasets` reads."""

import io
import itertools
import json
import tarfile

import datasets
import pytest
from accelerate import PartialState

from diffusers_safe.emoji.dataset import emoji_dataset
from diffusers_safe.training.pictures import open_dataset
from picture_files import encoded


SIZE = 24
FILES = 3  # of the forms that have several


@pytest.fixture(autouse=True, scope="session")
def quiet():
    PartialState(cpu=True)
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def emoji(tmp_path_factory):
    """`[(PIL image, caption)]`"""
    rows = emoji_dataset(SIZE, cache_dir=str(tmp_path_factory.mktemp("emoji")))
    return [(row["image"], row["caption"]) for row in rows]


@pytest.fixture(scope="session")
def forms(emoji, tmp_path_factory):
    """What `open_dataset` takes, by the form of the data; the caption of "lists" is a list in a field of a column."""
    root = tmp_path_factory.mktemp("forms")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    pairs = [{"image": {"bytes": encoded(image), "path": None}, "text": caption} for image, caption in emoji]
    rows = datasets.Dataset.from_list(pairs, features)
    rows.save_to_disk(root / "saved")
    for name in ("folder", "parquet", "tars"):
        (root / name).mkdir()
    for number in range(FILES):
        rows.shard(FILES, number, contiguous=True).to_parquet(root / "parquet" / f"{number}.parquet")
        with tarfile.open(root / "tars" / f"{number}.tar", "w") as tar:
            for i in range(number * SIZE // FILES, (number + 1) * SIZE // FILES):
                caption = emoji[i][1]
                captions = json.dumps({"captions": [caption, f"{caption}, again"]})
                for ending, data in (
                    ("png", encoded(emoji[i][0])),
                    ("txt", caption.encode()),
                    ("json", captions.encode()),
                ):
                    info = tarfile.TarInfo(f"{i:03}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    with open(root / "folder" / "metadata.jsonl", "w") as file:
        for i, (image, caption) in enumerate(emoji):
            (root / "folder" / f"{i:03}.png").write_bytes(encoded(image))
            file.write(json.dumps({"file_name": f"{i:03}.png", "text": caption}) + "\n")
    cache_dir = str(root / "cache")
    return {
        "saved": {"train_data_dir": str(root / "saved")},
        "folder": {"train_data_dir": str(root / "folder"), "cache_dir": cache_dir},
        "parquet": {"data_files": [str(root / "parquet" / "*.parquet")], "cache_dir": cache_dir},
        "tars": {"train_data_dir": str(root / "tars"), "image_column": "png", "caption_column": "txt",
                 "cache_dir": cache_dir},
        "lists": {"data_files": [str(root / "tars" / f"{i}.tar") for i in range(FILES)], "image_column": "png",
                  "caption_column": "json.captions", "cache_dir": cache_dir},
    }  # fmt: skip


@pytest.fixture(scope="session")
def data(forms):
    """The emoji with random access."""
    return open_dataset(**forms["saved"])


@pytest.fixture
def make_data(emoji, tmp_path):
    """The function `(changes: {row: image bytes or caption}, count, **kwargs) -> CaptionedImages`, from a folder of
    its own."""

    numbers = itertools.count()

    def make(changes=None, count=SIZE, **kwargs):
        rows = [{"image": {"bytes": encoded(image), "path": f"{i}.png"}, "text": text}
                for i, (image, text) in enumerate(emoji[:count])]  # fmt: skip
        for row, change in (changes or {}).items():
            if isinstance(change, bytes):
                rows[row]["image"]["bytes"] = change
            else:
                rows[row]["text"] = change
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        folder = tmp_path / f"data-{next(numbers)}"  # never overwritten, because it is memory-mapped
        datasets.Dataset.from_list(rows, features).save_to_disk(folder)
        return open_dataset(train_data_dir=str(folder), **kwargs)

    return make
