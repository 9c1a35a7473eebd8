"""Raw scores of generated images, kept in their folder: a metric runs its network on each image once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..files import json_lines, write_text
from ..generation.manifest import load_image
from ..output_folders import claimed
from ..progress import ProgressBar, ProgressCallback
from .base import Metric


SCORES = "scores"


def score_images(
    metric: Metric,
    folder: str | Path,
    rows: Sequence[dict],
    originals: tuple[str | Path, Sequence[dict]] | None = None,
    batch_size: int = 16,
    callback: ProgressCallback | None = None,
) -> list[dict]:
    """Scores images, or reads earlier scores, from `scores/{metric}-{hash of its identity}.jsonl`.

    A stopped pass continues. A score belongs to the bytes of its image (and of the original's image): an image that
    was generated again is scored again.

    Args:
        metric ([`Metric`]): The metric.
        folder (`str` or `Path`): Folder in which `generate` wrote the images.
        rows (`Sequence[dict]`): Their rows of the manifest, at least one.
        originals (`tuple`, *optional*): Folder and rows of the original model's images, for a metric that `compares`;
            they include every id of `rows`.
        batch_size (`int`, defaults to 16): Number of images scored at once.
        callback (`Callable[[Progress], None]`, *optional*): Called at the start and after each batch. If it raises,
            finished scores are kept.

    Returns:
        `list[dict]`: Raw scores in the order of `rows`.

    Raises:
        `ValueError`: If there are no rows, they lack what the metric needs, an image is missing or broken, the
            originals lack one, or the metric does not give each image a score that can be written as JSON.
    """
    if not rows:
        raise ValueError(f"{folder}: there are no images to score")
    metric.check(rows)
    partners = _partners(metric, rows, originals)
    identity = metric.identity()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    path = Path(folder) / SCORES / f"{metric.name}-{digest}.jsonl"
    with claimed(path.parent):
        return _score(metric, path, identity, folder, rows, partners, originals, batch_size, callback)


def _score(
    metric: Metric,
    path: Path,
    identity: dict,
    folder: str | Path,
    rows: Sequence[dict],
    partners: list[dict | None],
    originals: tuple | None,
    batch_size: int,
    callback: ProgressCallback | None,
) -> list[dict]:
    known = _known(path, identity)
    keys = [(row["sha256"], partner and partner["sha256"]) for row, partner in zip(rows, partners)]
    waiting = [place for place, (row, key) in enumerate(zip(rows, keys)) if known.get(row["id"], (None,))[0] != key]

    bar = ProgressBar(metric.name, len(rows), len(rows) - len(waiting), callback=callback)
    with bar, path.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), batch_size):
            places = waiting[start : start + batch_size]
            batch = [rows[place] for place in places]
            images = [load_image(folder, row) for row in batch]
            pairs = [load_image(originals[0], partners[place]) for place in places] if metric.compares else None
            scores = list(metric.score(images, batch, pairs))
            if len(scores) != len(batch):
                raise ValueError(f"{metric.name}: gives {len(scores)} scores of {len(batch)} images")
            for place, row, score in zip(places, batch, scores):
                known[row["id"]] = (keys[place], score)
                entry = {"id": row["id"], "sha256": keys[place][0], "against": keys[place][1], "score": score}
                file.write(_line(metric, entry))
            file.flush()
            bar.update(len(places))
    return [known[row["id"]][1] for row in rows]


def _line(metric: Metric, entry: dict) -> str:
    try:
        return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{metric.name}: its score of image {entry['id']} cannot be written as JSON ({error})"
        ) from None


def _partners(metric: Metric, rows: Sequence[dict], originals: tuple | None) -> list[dict | None]:
    if not metric.compares:
        return [None] * len(rows)
    if originals is None:
        raise ValueError(f"{metric.name}: compares with the original model's images; there are none")
    by_id = {row["id"]: row for row in originals[1]}
    for row in rows:
        if row["id"] not in by_id:
            raise ValueError(
                f"{metric.name}: the original has no image {row['id']}; generate the same prompts with it"
            )
        for name in ("prompt", "seed"):
            if row[name] != by_id[row["id"]][name]:
                raise ValueError(f"{metric.name}: image {row['id']} of the original has another {name}")
    return [by_id[row["id"]] for row in rows]


def _known(path: Path, identity: dict) -> dict[str, tuple[tuple, dict]]:
    """id -> (hashes of image and original, score) of an earlier pass, from its complete lines."""
    head = json.dumps({"identity": identity}, ensure_ascii=False)
    known, kept = {}, [head]
    for line, entry in json_lines(path)[1:] if path.is_file() else []:
        if isinstance(entry, dict) and entry.keys() >= {"id", "sha256", "against", "score"}:
            known[str(entry["id"])] = ((entry["sha256"], entry["against"]), entry["score"])
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
    return known
