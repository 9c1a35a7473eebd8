"""Compares models on the same prompts and seeds: generates, measures, writes a report.

    diffusers-safe evaluate --models original=CompVis/stable-diffusion-v1-4 erased=sd-1.4-safe \\
        --prompts i2p.csv --metrics nudity pixel_distance --output_dir runs/evaluation

or, for the embedded model, which comes with prompts and a judge:

    diffusers-safe evaluate --models runs/demo/weapon-0/model --emoji weapon

The first model is the original. If a model needs more than a path, list the models in a file, `--models models.yaml`:

    - {name: original, model: CompVis/stable-diffusion-v1-4}
    - {name: SLD-max, model: CompVis/stable-diffusion-v1-4, safety: max}
    - {name: theirs, images: path/to/a/folder/of/pngs}

A folder of images in place of a model is measured as it is. A stopped run continues when it is started again; with
other metrics or thresholds it generates nothing. `accelerate launch -m diffusers_safe.commands.evaluate` shares the
generation among processes. docs/evaluation.md has the rules. The command with Stable Diffusion is an example that
follows no paper (--preset paper does) and was not run here.
"""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..arguments import check_values, typed
from ..command_line import parse_dataclass
from ..comparison.evaluate import check_evaluation, evaluate
from ..comparison.models import as_images, check_models
from ..comparison.options import EvaluationOptions
from ..comparison.used_folder import report_claim
from ..embedded import EMBEDDED_MODELS
from ..emoji import MODEL_NAME
from ..emoji.evaluation import SETTINGS as EMOJI_SETTINGS
from ..emoji.evaluation import Erased
from ..emoji.metrics import EmojiDistance
from ..formats import INDEX
from ..generation.folders import ImageFolder
from ..generation.manifest import MANIFEST, read_manifest
from ..generation.models import DTYPES, SteeredModel
from ..generation.processes import launched_processes
from ..generation.prompts import PromptOptions, read_prompts
from ..generation.rows import PromptRow
from ..messages import exit_with_error
from ..metrics import make_metrics
from ..output_folders import OVERWRITE_HELP, check_claim
from ..provenance import erasure_of
from ..report.builder import BLUR_CHOICES
from ..report.results import PAGE_NAME, headline_table
from ..values import shown, suggested
from ..yaml_files import read_yaml
from .generate import PRESET_HELP, PRESETS


_OPTIONS = {item.name: item for item in fields(EvaluationOptions)}
STEPS_HELP = f"Number of sampling steps. Default: 25; with --emoji {EMOJI_SETTINGS.num_inference_steps}."
GUIDANCE_HELP = (
    "Scale of classifier-free guidance; at 1 or less it is off. Default: 7.5; with --emoji "
    f"{EMOJI_SETTINGS.guidance_scale:g}."
)
# Defaults with --emoji.
_OF_EMOJI = {
    "images_per_prompt": 3,
    "num_inference_steps": EMOJI_SETTINGS.num_inference_steps,
    "guidance_scale": EMOJI_SETTINGS.guidance_scale,
    "blur": "none",
}
# Options that select prompts of a source; existing images determine their prompts themselves.
_OF_A_SOURCE = tuple(
    name for name in inspect.signature(read_prompts).parameters if name not in ("source", "row_settings")
)


@typed
@dataclass(kw_only=True)
class EvaluateArguments(EvaluationOptions):
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = PRESETS  # read by `arguments.build_options`

    models: list[str] = field(
        metadata={
            "help": "Models to compare, each as name=MODEL: folder or Hub id of a pipeline, or a folder of images; or"
            " one .yaml file that lists them. The first is the original."
        }
    )
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts, a file or a dataset of prompts, as in `diffusers-safe generate`. Default: those of the"
            " original, if it is a folder of images."
        },
    )
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Output folder: images, numbers and report."})
    metrics: list[str] = field(default_factory=list, metadata=_OPTIONS["metrics"].metadata)
    emoji: str | None = field(
        default=None,
        metadata={
            "help": "What was erased from the embedded model: a group of emoji (weapon), an object (banana) or a "
            "style (sketch). This sets prompts, judge and sampling. A single model is compared with the embedded one."
        },
    )
    images_per_prompt: int | None = field(
        default=None,
        metadata={"help": "Number of images per prompt, with consecutive seeds. Default: 1; with --emoji 3."},
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": STEPS_HELP})
    guidance_scale: float | None = field(default=None, metadata={"help": GUIDANCE_HELP})
    blur: str | None = field(
        default=None,
        metadata={
            "help": f"Images in the report that are blurred until clicked: {', '.join(BLUR_CHOICES)}. Default: "
            "flagged; with --emoji none.",
            "choices": [*BLUR_CHOICES, None],
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": PRESET_HELP,
            "choices": PRESETS,
        },
    )
    images_only: bool = field(
        default=False, metadata={"help": "Load no model; measure the images of an earlier run in --output_dir."}
    )
    dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the weights: {', '.join(DTYPES)}.", "choices": DTYPES}
    )

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    def __post_init__(self):
        if not self.metrics and self.emoji is None:
            raise ValueError("the following arguments are required: --metrics")
        for name, default in _OF_EMOJI.items():
            if getattr(self, name) is None:
                setattr(self, name, _OPTIONS[name].default if self.emoji is None else default)
        super().__post_init__()
        models = self.models
        if self.emoji is not None and len(models) == 1 and not models[0].endswith((".yaml", ".yml")):
            models = [f"original={embedded_base(models[0])}", named(models[0], "erased")]
        self.made_models = read_models(models, self.dtype)
        check_models(self.made_models)
        if self.images_only:
            self.made_models = [as_images(model, Path(self.output_dir)) for model in self.made_models]
        if self.emoji is not None:
            if self.prompts:
                raise ValueError(f"prompts {self.prompts[0]:.80}: not allowed with --emoji, which sets the prompts")
            self._check_unused("without --emoji", but=("images_per_prompt", "seed"))
            self.rows = Erased(self.emoji).rows(self.images_per_prompt, self.seed)
        else:
            self.rows = self.read_rows() if self.prompts else self._rows_of_images()
        own = {row.guidance_scale for row in self.rows if row.guidance_scale is not None}
        for model in self.made_models:
            if isinstance(model, SteeredModel):
                model.check_steering(self.settings, own)

    def _rows_of_images(self) -> list[PromptRow]:
        self._check_unused()
        return rows_of_images(self.made_models[0], self.row_settings)

    def _check_unused(self, where: str = "", but: Sequence[str] = ()) -> None:
        for item in fields(PromptOptions):
            default = [] if item.default is MISSING else item.default
            if item.name in _OF_A_SOURCE and item.name not in but and (value := getattr(self, item.name)) != default:
                raise ValueError(f"{item.name} {value}: needs --prompts{where and ', ' + where}")

    @property
    def source(self) -> dict:
        """The source of the prompts, for the protocol."""
        if self.emoji is not None:
            return {"source": f"--emoji {self.emoji}", "images_per_prompt": self.images_per_prompt, "seed": self.seed}
        if not self.prompts:
            return {"source": f"images of {self.made_models[0].name}"}
        return {**super().source, **({"preset": self.preset} if self.preset else {})}


def read_models(models: Sequence[str], dtype: str = "float32") -> list[SteeredModel | ImageFolder]:
    """Models from a command line or a YAML file.

    Raises:
        `ValueError`: If the file cannot be read, or a model has no name, no location or an unknown field.
    """
    files = [word for word in models if word.lower().endswith((".yaml", ".yml")) and "=" not in word]
    if files and len(models) > 1:
        raise ValueError(f"models {files[0]}: a file must be the only one")
    if files:
        return [_from_mapping(entry, files[0], dtype) for entry in _read_yaml(files[0])]
    return [_from_word(word, dtype) for word in models]


def named(word: str, name: str) -> str:
    """A model as `name=MODEL`, unless it has a name."""
    return word if "=" in word else f"{name}={word}"


def embedded_base(word: str) -> str:
    """The embedded model that a model was made from, according to its record."""
    record = erasure_of(word.partition("=")[2] or word, local_files_only=True) or {}
    return base if (base := record.get("base_model")) in EMBEDDED_MODELS else MODEL_NAME


def _from_word(word: str, dtype: str) -> SteeredModel | ImageFolder:
    name, equals, place = word.partition("=")
    if not equals:
        name, place = Path(word).name, word
    if not name or not place:
        raise ValueError(f"model '{word}': write name=PATH, or name=HUB_ID")
    if Path(place).is_dir() and not (Path(place) / INDEX).is_file():
        return ImageFolder(name, Path(place))
    return SteeredModel(name, place, dtype=dtype)


def _read_yaml(path: str) -> list[dict]:
    entries = read_yaml(path, "models")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"models {path}: must be a list of mappings, each with name and model or images")
    return entries


def _from_mapping(entry: dict, path: str, dtype: str) -> SteeredModel | ImageFolder:
    entry = {str(key).replace("-", "_"): value for key, value in entry.items() if value is not None}
    name = entry.get("name")
    if not name or ("model" in entry) == ("images" in entry):
        raise ValueError(f"models {path}: the entry {shown(name)} needs a name, and either model or images")
    allowed = ["name", "images"] if "images" in entry else [item.name for item in fields(SteeredModel)]
    if unknown := [suggested(key, allowed, "") for key in entry if key not in allowed]:
        raise ValueError(f"models {path}: {name} has {unknown[0]}; allowed are {', '.join(allowed)}")
    try:
        if "images" in entry:
            return ImageFolder(**check_values(ImageFolder, {"name": name, "folder": entry["images"]}))
        return SteeredModel(**{"dtype": dtype, **entry})
    except ValueError as error:
        raise ValueError(f"models {path}: {shown(name)}: {error}") from None


def rows_of_images(original: SteeredModel | ImageFolder, row_settings: bool = True) -> list[PromptRow]:
    """The prompts of existing images, with the guidance and size of each if `row_settings`."""
    if not isinstance(original, ImageFolder) or not original.has_manifest:
        raise ValueError(f"prompts: none given, and {original.name} is not a folder of images with {MANIFEST}")
    return [
        PromptRow(row["id"], row["prompt"], row["seed"], row["labels"], **(_own(row) if row_settings else {}))
        for row in read_manifest(original.folder)
    ]


def _own(row: dict) -> dict:
    return {name: (row.get("settings") or {}).get(name) for name in ("guidance_scale", "height", "width")}


def check_surroundings(args: EvaluateArguments) -> None:
    """Checks the models' indices, folders of images, what metrics need, and the output folder."""
    for model in args.made_models:
        model.check()
    args.made_metrics = make_metrics(args.metrics, args) if args.metrics else []
    if args.emoji is not None:
        args.made_metrics += [Erased(args.emoji).recognition(), EmojiDistance()]
    check_evaluation(args.made_models, args.rows, args.made_metrics, args.output_dir, args.settings, args.overwrite)
    check_claim(args.output_dir, **report_claim("evaluation", args.overwrite))


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parse_dataclass(EvaluateArguments, __doc__, argv, prog, check_surroundings)
    with exit_with_error():
        results = evaluate(
            args.made_models,
            args.rows,
            args.made_metrics,
            args.output_dir,
            prompts=args.source,
            images_only=args.images_only,
            overwrite=args.overwrite,
            **args.shown,
        )
    launched_processes().destroy_process_group()
    if not results:  # only the first process measures
        return
    print(f"\n{headline_table(results)}\n")
    print((Path(args.output_dir) / PAGE_NAME).resolve().as_uri())


if __name__ == "__main__":
    main()
