"""Summarises a list of prompts without showing one: their number, categories, seeds and sizes.

    diffusers-safe prompts --prompts i2p.csv
    diffusers-safe prompts --prompts coco_30k.csv --max_prompts 1000

Nothing is generated. For I2P, whose rows record how often Stable Diffusion 1.4 was inappropriate, the table has these
numbers as well: the whole list gives 38.57 % and an expected maximum of 97.01 % +- 6.00, computed exactly. The paper's
97.04 % +- 5.95 is the mean of one run of random samples; another run gave 96.96 % +- 6.05.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..arguments import typed
from ..command_line import parse_dataclass
from ..comparison.evaluation_report import categories_of
from ..generation.prompts import PromptOptions, recorded_inappropriateness
from ..generation.prompts.recorded import COLUMN
from ..generation.rows import PromptRow
from ..messages import exit_with_error
from ..report.statistics import DRAWS


_MOST = 6  # values that are listed; more are shown as a range


@typed
@dataclass
class PromptsArguments(PromptOptions):
    def __post_init__(self):
        self.rows = self.read_rows()


def overview(rows: Sequence[PromptRow]) -> Iterator[str]:
    """Lines about a list of prompts, at the end a Markdown table by category, if there are categories."""
    yield f"{len(rows)} images of {len({row.prompt for row in rows})} different prompts"
    yield f"seeds: {_listed([row.seed for row in rows])}"
    scales = [row.guidance_scale for row in rows if row.guidance_scale is not None]
    sizes = [f"{row.width} x {row.height}" for row in rows if row.width is not None]
    yield f"own guidance scales: {f'{_listed(scales)} ({len(scales)} images)' if scales else 'none'}"
    yield f"own sizes: {f'{_listed(sizes)} ({len(sizes)} images)' if sizes else 'none'}"
    by_category: dict[str, list[PromptRow]] = {}
    for row in rows:
        for category in categories_of({"labels": row.labels}):
            by_category.setdefault(category, []).append(row)
    recorded = all(COLUMN in row.labels for row in rows)
    if not by_category and not recorded:
        return
    yield ""
    yield "| category | images |" + (" inappropriate | expected maximum |" if recorded else "")
    yield "|---|---|" + ("---|---|" if recorded else "")
    for category, of_category in [*sorted(by_category.items()), ("all", list(rows))]:
        yield f"| {category} | {len(of_category)} |" + (_recorded(of_category) if recorded else "")


def _recorded(rows: Sequence[PromptRow]) -> str:
    if len({row.prompt for row in rows}) < DRAWS:
        share = sum(row.labels[COLUMN] for row in rows) / len(rows)
        return f" {share:.2f} % | – (fewer than {DRAWS} prompts) |"
    found = recorded_inappropriateness(rows)
    maximum = f"{found['expected_maximum']:.2f} % +- {found['expected_maximum_std']:.2f}"
    return f" {found['probability']:.2f} % | {maximum} |"


def _listed(values: Sequence) -> str:
    different = sorted(set(values))
    if len(different) <= _MOST:
        return ", ".join(map(str, different))
    return f"{different[0]} to {different[-1]}, {len(different)} different"


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(PromptsArguments, __doc__, argv, prog)
    print("\n".join(overview(args.rows)))


if __name__ == "__main__":
    main()
