"""The table of a model's quality, and the model card that shows it."""

from pathlib import Path

from ..provenance import write_text
from ..report.statistics import Estimate


CARD_MARKERS = ("<!-- quality:begin -->", "<!-- quality:end -->")


def quality_table(results: dict) -> str:
    """The results of [`evaluate_model`] as Markdown: a table with a column for each judge, and notes below."""
    judges, protocol = results["judges"], results["protocol"]
    first = next(iter(judges.values()))
    cells = {
        **{
            part: [f"{j['mean'][part]}; lowest: {_lowest(j[part])}" for j in judges.values()] for part in first["mean"]
        },
        **{
            f"object and {part.removesuffix('s')}, never seen together in training": [
                str(judge["held_out"][part]) for judge in judges.values()
            ]
            for part in first["held_out"]
        },
        **{
            f"{head} on renders, which tests the judge": [str(j["renders"][head]) for j in judges.values()]
            for head in first["renders"]
        },
    }
    lines = [f"| recognised | {' | '.join(judges)} |", "|---" * (len(judges) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    sampler = f"{protocol['steps']} steps of {protocol['scheduler']}, guidance {protocol['guidance_scale']:g}"
    psnr, speed = results["autoencoder"], protocol["speed"]
    styles = ", ".join(f"{style} {value:.1f}" for style, value in psnr.items() if style != "all")
    sentences = [
        f"{sampler}, seed {protocol['seed']}, model {protocol['model']}. 95 % intervals: for averages a bootstrap "
        "over prompts (groups: over images), else Wilson.",
        f"Autoencoder on {protocol['renders']:,} new renders: PSNR {psnr['all']:.1f} dB ({styles}).",
        f"{speed['images_per_second']:.1f} images per second in batches of {speed['batch_size']}, "
        "the best of three; "
        f"{1000 * speed['seconds_per_forward']:.0f} ms per forward pass of the denoiser for one image with guidance "
        f"({speed['device']}, {speed['threads']} thread{'s' if speed['threads'] > 1 else ''}).",
    ]
    if "agreement" in results:
        sentences.insert(1, f"The judges agree on the object in {results['agreement']} of the images.")
    return "\n\n".join(["\n".join(lines), *sentences])


def _lowest(shares: dict[str, Estimate]) -> str:
    name, worst = min(shares.items(), key=lambda item: item[1].value)
    return f"{name} {worst}"


def write_card(path: str | Path, results: dict) -> None:
    """Writes the table between the markers of a model card.

    Raises:
        `ValueError`: If the card does not exist or lacks the markers.
    """
    path = Path(path)
    check_card(path)
    head, rest = path.read_text(encoding="utf-8").split(CARD_MARKERS[0], 1)
    tail = rest.split(CARD_MARKERS[1], 1)[1]
    write_text(path, f"{head}{CARD_MARKERS[0]}\n{quality_table(results)}\n{CARD_MARKERS[1]}{tail}")


def check_card(path: Path) -> None:
    """
    Raises:
        `ValueError`: If the card does not exist or lacks the markers.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the card must exist and hold the lines {' and '.join(CARD_MARKERS)}")
    begin, end = (path.read_text(encoding="utf-8").find(marker) for marker in CARD_MARKERS)
    if not 0 <= begin < end:
        raise ValueError(f"{path}: has no line {CARD_MARKERS[0]} with a line {CARD_MARKERS[1]} after it")
