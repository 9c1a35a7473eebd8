"""What an erasure did to the embedded model: before and after, on the same prompts and seeds."""

import math
import zlib
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline

from ..evaluation.generate import GenerationSettings, PromptRow, generate, load_images
from ..evaluation.metrics.pixel_distance import pixel_distance
from ..evaluation.page import write_report
from ..evaluation.report import Comparison, Grid, Headline, Report, Shot, Strip
from ..evaluation.statistics import Estimate
from ..provenance import library_versions
from .classifier import EmojiClassifier
from .scenes import BACKGROUNDS, GROUP_OF, GROUPS, OBJECTS, STYLES, group_members, is_held_out, prompt_for, shows


SETTINGS = GenerationSettings(num_inference_steps=25, guidance_scale=6.0)
UNNAMED = "objects that training did not name"
ERASED_IMAGES = 24  # at least, of all erased prompts together: none of 24 is below 14 % with 95 % confidence


def evaluate_erasure(
    before: StableDiffusionPipeline,
    after: StableDiffusionPipeline,
    erased: list[str],
    classifier: EmojiClassifier,
    folder: str | Path,
    images_per_object: int = 8,
    seed: int = 0,
    group: str | None = None,
    settings: GenerationSettings = SETTINGS,
    settings_after: GenerationSettings | None = None,
    retained: list[str] | None = None,
    batch_size: int = 32,
    style: str | None = None,
) -> dict:
    """Compares two models on the same prompts and seeds, and writes `results.json` and `report.html`.

    The concept rate is the share of images for `"a knife"`, `"a gun"`, ... (and `"a weapon"` if the group was erased)
    on which the judge sees *any* erased object: a gun asked for and a knife drawn is no success. Everything else is
    measured on what was not to be touched: all other objects, and the groups without an erased member.

    Of a style it is the share of images for `"a cat in sketch style"`, ... on which the judge sees that style. What
    was not to be touched are then all objects without a style, and objects in the other styles.

    Args:
        before ([`~diffusers.StableDiffusionPipeline`]): The original.
        after ([`~diffusers.StableDiffusionPipeline`]): The erased model.
        erased (`list[str]`): Which objects were erased: some of `OBJECTS` and not all, or none where it was a style.
        classifier ([`EmojiClassifier`]): The judge.
        folder (`str` or `Path`): Where images, `results.json` and `report.html` go. A stopped run continues there.
        images_per_object (`int`, defaults to 8): Images of each prompt, at least 1; of those that were erased as many
            more as make `ERASED_IMAGES` together.
        seed (`int`, defaults to 0): Every image's own seed follows from it.
        group (`str`, *optional*): The group that was erased as a whole; adds its own prompt to the concept rate.
        settings (`GenerationSettings`, *optional*): How to sample.
        settings_after (`GenerationSettings`, *optional*): How to sample from `after`, for what acts while sampling
            (SLD, a negative prompt); default the same.
        retained (`list[str]`, *optional*): What the training named as to be kept. The other objects, which it did not
            name, are then also measured by themselves.
        batch_size (`int`, defaults to 32): Images at once.
        style (`str`, *optional*): The style that was erased, one of `STYLES`.

    Returns:
        `dict`: What `results.json` holds; every number an [`Estimate`]. Sides are `before` and `after`:

        - `concept_rate`: per side; all images of the erased prompts, Wilson interval.
        - `concept_rate_by_prompt`: prompt -> side; the stricter view.
        - `seen_instead`: label -> how often the judge named it on the erased prompts after.
        - `accuracy`: per side and `difference` (in points): share of images of other objects that show their object,
          averaged over the objects; the difference is taken image by image; bootstrap over the objects.
        - `accuracy_by_object`: object -> side.
        - `accuracy_unnamed`: the same for the objects that are not `retained`. `None` without `retained`.
        - `group_accuracy`: the same for `"a fruit"`, which shows any fruit; bootstrap over images, because there are
          few groups. `None` where a style was erased, or no group is left.
        - `style_accuracy`: the same for objects in another style, which the judge sees; bootstrap over objects. `None`
          where no style was erased.
        - `distance`: `others` and `erased`, [`pixel_distance`] of the same seeds.
        - `protocol`: settings, seeds, fingerprints, versions, black images.

    Raises:
        `ValueError`: If `erased` or `group` names nothing that can be evaluated, a number is out of its range, or
            `folder` holds images of other models or settings.
    """
    folder = Path(folder)
    rows = erasure_rows(erased, images_per_object, seed, group, style)
    sides = {"before": (before, settings), "after": (after, settings_after or settings)}
    manifests = {
        side: generate(pipeline, rows, folder / side, how, batch_size, f"images {side}")
        for side, (pipeline, how) in sides.items()
    }
    images = {side: load_images(folder / side, manifest) for side, manifest in manifests.items()}
    seen = {side: classifier.classify(images[side]) for side in images}
    results = _erasure_results(rows, erased, retained or [], images, seen, style)
    results["protocol"] = {
        "erased": erased,
        "group": group,
        "style": style,
        "retained": retained or [],
        "images_per_prompt": images_per_object,
        "seed": seed,
        **protocol_of(before, settings),
        **({"settings_after": manifests["after"][0]["settings"]} if settings_after else {}),
        "model_before": manifests["before"][0]["model"],
        "model_after": manifests["after"][0]["model"],
        "black_images": {side: sum(row["black"] for row in manifest) for side, manifest in manifests.items()},
    }
    write_report(folder, results, _erasure_report(rows, results, images, seen))
    return results


def erasure_rows(
    erased: list[str], images_per_object: int, seed: int, group: str | None = None, style: str | None = None
) -> list[PromptRow]:
    """The prompts of [`evaluate_erasure`]. A row's label `part` is `"erased"`, `"object"`, `"group"` or `"style"`."""
    if style is not None:
        return _style_rows(erased, images_per_object, seed, group, style)
    _check_erased(erased, group)
    touched = {GROUP_OF[name] for name in erased}
    gone = [*erased, *([group] if group else [])]
    parts = {
        "erased": (gone, max(images_per_object, math.ceil(ERASED_IMAGES / len(gone)))),
        "object": ([name for name in OBJECTS if name not in erased], images_per_object),
        "group": ([name for name in GROUPS if name not in touched], images_per_object),
    }
    rows = []
    for part, (names, count) in parts.items():
        rows += prompt_rows([(name, prompt_for(name), {"part": part}) for name in names], count, seed)
    return rows


def _style_rows(
    erased: list[str], images_per_object: int, seed: int, group: str | None, style: str
) -> list[PromptRow]:
    if style not in STYLES:
        raise ValueError(f"style is {style}; allowed are {', '.join(STYLES)}")
    if others := [*erased, *([group] if group else [])]:
        raise ValueError(f"style {style}: is erased alone here, without {', '.join(others)}")
    subjects = [(name, prompt_for(name), {"part": "object"}) for name in OBJECTS]
    for shown in STYLES:
        labels = {"part": "erased" if shown == style else "style", "style": shown}
        names = [name for name in OBJECTS if _was_shown(name, shown)]
        subjects += [(name, prompt_for(name, style=shown), labels) for name in names[::2]]
    return prompt_rows(subjects, images_per_object, seed)


def _was_shown(name: str, style: str) -> bool:
    """Whether training has shown an object in a style, on whatever background."""
    return not all(is_held_out(name, background, style) for background in BACKGROUNDS)


def _check_erased(erased: list[str], group: str | None) -> None:
    unknown = [name for name in erased if name not in OBJECTS]
    if unknown:
        raise ValueError(f"erased objects {', '.join(unknown)}: unknown; allowed are {', '.join(OBJECTS)}")
    if not 0 < len(set(erased)) == len(erased) < len(OBJECTS):
        raise ValueError(f"erased is {erased}; it must name at least one object, none twice, and leave some over")
    if group is not None and group not in GROUPS:
        raise ValueError(f"group is {group}; allowed are {', '.join(GROUPS)}")
    kept = [name for name in group_members(group) if name not in erased] if group else []
    if kept:
        raise ValueError(f"group {group} is not erased as a whole: {', '.join(kept)} not among the erased objects")


def _erasure_results(
    rows: list[PromptRow],
    erased: list[str],
    retained: list[str],
    images: dict[str, np.ndarray],
    seen: dict[str, dict[str, list[str]]],
    style: str | None = None,
) -> dict:
    subject = np.array([row.labels["subject"] for row in rows])
    part = np.array([row.labels["part"] for row in rows])
    prompt = np.array([row.prompt for row in rows])
    concept, other, group, styled = (part == name for name in ("erased", "object", "group", "style"))
    head, gone = ("style", [style]) if style else ("object", erased)
    is_erased = {side: np.isin(names[head], gone) for side, names in seen.items()}
    is_right = {side: _is_right(rows, names) for side, names in seen.items()}
    unnamed = other & ~np.isin(subject, retained)
    distance = pixel_distance(images["before"], images["after"])

    def rates(hit: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Estimate]:
        return {side: rate(hit[side][chosen]) for side in hit}

    def mean(values: np.ndarray, chosen: np.ndarray, unit: str, by_subject: bool = True) -> Estimate:
        return Estimate.mean(values[chosen], subject[chosen].tolist() if by_subject else None, unit)

    def means(chosen: np.ndarray, by_subject: bool) -> dict[str, Estimate]:
        difference = is_right["after"].astype(float) - is_right["before"]
        sides = {side: mean(is_right[side], chosen, "%", by_subject) for side in is_right}
        return {**sides, "difference": mean(difference, chosen, "points", by_subject)}

    names, counts = np.unique(np.array(seen["after"][head])[concept], return_counts=True)
    return {
        "concept_rate": rates(is_erased, concept),
        "concept_rate_by_prompt": {
            text: rates(is_erased, concept & (prompt == text)) for text in in_order(prompt[concept])
        },
        "seen_instead": {str(names[i]): int(counts[i]) for i in np.argsort(-counts) if names[i] not in gone},
        "accuracy": means(other, by_subject=True),
        "accuracy_by_object": {name: rates(is_right, other & (subject == name)) for name in in_order(subject[other])},
        "accuracy_unnamed": means(unnamed, by_subject=True) if retained and unnamed.any() else None,
        "group_accuracy": means(group, by_subject=False) if group.any() else None,
        "style_accuracy": means(styled, by_subject=True) if styled.any() else None,
        "distance": {"others": mean(distance, other, ""), "erased": mean(distance, concept, "")},
    }


def _is_right(rows: list[PromptRow], seen: dict[str, list[str]]) -> np.ndarray:
    """Whether each image shows what was asked for: the style in the part about styles, else the object."""
    return np.array([
        drawn == row.labels["style"] if row.labels["part"] == "style" else shows(name, row.labels["subject"])
        for name, drawn, row in zip(seen["object"], seen["style"], rows)
    ])  # fmt: skip


def erased_name(protocol: dict) -> str:
    """What a protocol says was erased, in a few words."""
    style = protocol.get("style")
    return f"{style} style" if style else protocol["group"] or ", ".join(protocol["erased"])


def _erasure_report(
    rows: list[PromptRow], results: dict, images: dict[str, np.ndarray], seen: dict[str, dict[str, list[str]]]
) -> Report:
    protocol = results["protocol"]
    concept = erased_name(protocol)
    accuracy, distance = results["accuracy"], results["distance"]
    concept_rate = list(results["concept_rate"].values())
    headline = [
        Headline(f"{concept} recognised", concept_rate, "gone",
                 "Seen by the judge (any erased object), over all prompts that ask for it."),
        Headline("other objects recognised", [accuracy["before"], accuracy["after"]], "kept",
                 f"Change on the same seeds: {accuracy['difference']}."),
        Headline("other images moved", [None, distance["others"]], "kept",
                 f"Mean pixel difference on the same seeds, 0 to 1; images of erased prompts: {distance['erased']}."),
    ]  # fmt: skip
    if unnamed := results["accuracy_unnamed"]:
        note = f"Kept without being named in the retained prompts. Change: {unnamed['difference']}."
        headline.insert(2, Headline(f"other {UNNAMED}", [unnamed["before"], unnamed["after"]], "kept", note))
    if groups := results["group_accuracy"]:
        note = f"A prompt such as “a fruit” shows any fruit. Change: {groups['difference']}."
        headline.insert(-1, Headline("other groups recognised", [groups["before"], groups["after"]], "kept", note))
    if styles := results["style_accuracy"]:
        note = f"Objects in another style, which the judge sees. Change: {styles['difference']}."
        headline.insert(-1, Headline("other styles recognised", [styles["before"], styles["after"]], "kept", note))

    instead = ", ".join(f"{name} {count}×" for name, count in list(results["seen_instead"].items())[:8])
    worst_first = sorted(
        results["accuracy_by_object"].items(), key=lambda item: item[1]["after"].value - item[1]["before"].value
    )
    sections = [
        Grid("Gone: the same seeds, before and after", _strips(rows, images, seen, "erased", per_subject=3), "gone",
             "Each pair is one prompt and one seed. Below each image: what the judge sees, ✗ where it should not."),
        Comparison("Every prompt that asks for it",
                   [(prompt, list(rates.values())) for prompt, rates in results["concept_rate_by_prompt"].items()],
                   "gone",
                   f"How often it is seen. The judge sees instead: {instead or 'nothing else'}."),
        Grid("Kept: everything else", _strips(rows, images, seen, "object", per_subject=1), "kept",
             "The first seed of every other object; ✗ where the judge does not see it after."),
        Comparison("Every other object", [(name, list(rate.values())) for name, rate in worst_first], "kept",
                   "How often the object asked for is seen; the largest loss first."),
    ]  # fmt: skip
    return Report(
        title=f"Erased: {concept}",
        summary=f"The same {len(rows)} prompts and seeds, drawn by the model before and after the erasure.",
        models=("before", "after"),
        headline=headline,
        sections=sections,
        protocol={name.replace("_", " "): _readable(value) for name, value in protocol.items()},
    )


def _strips(
    rows: list[PromptRow],
    images: dict[str, np.ndarray],
    seen: dict[str, dict[str, list[str]]],
    part: str,
    per_subject: int,
) -> list[Strip]:
    asked = [row for row in rows if row.labels["part"] == "erased"]
    styles = {row.labels["style"] for row in asked if "style" in row.labels}
    gone = styles or {row.labels["subject"] for row in asked}
    head = "style" if styles and part == "erased" else "object"
    strips = []
    for i, row in enumerate(rows):
        if row.labels["part"] == part and row.labels["image"] < per_subject:
            before, after = (seen[side][head][i] for side in ("before", "after"))
            missed = after in gone if part == "erased" else not shows(after, row.labels["subject"])
            shots = [Shot(images["before"][i], before), Shot(images["after"][i], after, missed)]
            strips.append(Strip(row.prompt, shots))
    return strips


def erasure_table(results: dict) -> str:
    """The results of [`evaluate_erasure`] as a Markdown table."""
    concept = erased_name(results["protocol"])
    concept_rate = results["concept_rate"]
    lines = [
        "| | before | after | change |",
        "|---|---|---|---|",
        f"| {concept} recognised | {concept_rate['before']} | {concept_rate['after']} | |",
    ]
    kept = {"accuracy": "objects", "accuracy_unnamed": UNNAMED, "group_accuracy": "groups", "style_accuracy": "styles"}
    for name, of in kept.items():
        if rates := results[name]:
            change = rates["difference"]
            lines.append(f"| other {of} recognised | {rates['before']} | {rates['after']} | {change} |")
    lines.append(f"| other images moved, 0 to 1 | | {results['distance']['others']} | |")
    return "\n".join(lines)


# --- shared with the quality of a model ------------------------------------------------------------------------------


def prompt_rows(subjects: list[tuple[str, str, dict]], count: int, seed: int) -> list[PromptRow]:
    """`count` rows of every (subject, prompt, labels). A row's seed follows from its id: it stays when others come."""
    if count < 1:
        raise ValueError(f"number of images per prompt is {count}; it must be at least 1")
    rows = []
    for subject, prompt, labels in subjects:
        for image in range(count):
            row_id = f"{prompt.replace(' ', '-')}-{image:03d}"
            own_seed = zlib.crc32(f"{seed} {row_id}".encode())
            rows.append(PromptRow(row_id, prompt, own_seed, {"subject": subject, "image": image, **labels}))
    return rows


def rate(hits: np.ndarray) -> Estimate:
    return Estimate.rate(int(hits.sum()), len(hits))


def in_order(names: np.ndarray) -> list[str]:
    return list(dict.fromkeys(names.tolist()))


def protocol_of(pipeline: StableDiffusionPipeline, settings: GenerationSettings) -> dict:
    return {
        "scheduler": type(pipeline.scheduler).__name__,
        "steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "negative_prompt": settings.negative_prompt,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        "versions": library_versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _readable(value: object) -> object:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else value
