"""Conversion of an erased model to another format."""

import os
from dataclasses import dataclass, replace

from ..arguments import build_options, option, required
from ..embedded import check_revision
from ..families import (
    TEXT_ENCODERS,
    ModelFamily,
    StoredModel,
    denoiser_names,
    families,
    load_pipeline,
    make_family,
)
from ..model_errors import ModelError
from ..output_folders import OVERWRITE_HELP, RESULT, check_apart, check_claim, claimed
from ..provenance import fingerprint
from ..values import choose
from .folders import result_names, save_model, written_aside
from .lora import LoRA, full_rank, kohya_tensors, low_rank
from .read import ErasedWeights, assign, read_erased_weights
from .source import fetch
from .write import CHECKPOINT_NAME, KOHYA_NAME, LORA_NAME, PARTIAL_NAME, facts, save_partial, save_whole


DEFAULT_RANK = 16
LORAS = ("lora", "kohya")
_FILE_NAMES = {"lora": LORA_NAME, "kohya": KOHYA_NAME, "single-file": CHECKPOINT_NAME}


def forms() -> tuple[str, ...]:
    """The forms of an erased model; the denoiser alone has its name in the pipeline."""
    return ("full", *denoiser_names(), "partial", *LORAS, "single-file")


@dataclass(kw_only=True)
class ExportOptions:
    """What is exported, and as what."""

    source: str = required("The erased model: file, folder or Hub id. The name --source may be omitted.")
    to: str = required(f"Format of the result: {', '.join(forms())}.")
    output_dir: str = required("Output folder. It must not hold another erased model, unless --overwrite is given.")
    base_model: str | None = option(
        None, "Base model, before the erasure: folder or Hub id. Default: as recorded in the source."
    )
    base_revision: str | None = option(
        None, "Revision of the base model on the Hub. Default: as recorded in the source."
    )
    revision: str | None = option(None, "Revision of the source on the Hub.")
    weight_name: str | None = option(None, "File of the source that holds the changed weights, if there are several.")
    rank: int | None = option(
        None,
        f"Rank of the LoRA. Default: that of the source if it is a LoRA, else {DEFAULT_RANK}; or the full rank of the "
        "changes if that is less.",
        at_least=1,
    )
    only_weights: bool = option(
        False,
        "Leave changed norms out of the LoRA, which cannot store them. What is lost is printed.",
    )
    biases: bool = option(
        False,
        "Store changed biases in the LoRA (lora_B.bias): diffusers reads them, other programs do not, and fuse_lora "
        "refuses such a LoRA. Default: they are left out, and what is lost is printed.",
    )
    overwrite: bool = option(False, OVERWRITE_HELP)

    def __post_init__(self):
        self.to = choose("to", self.to, forms())
        given = [f"rank {self.rank}"] if self.rank is not None else []
        given += [name for name in ("only_weights", "biases") if getattr(self, name)]
        if given and self.to not in LORAS:
            raise ValueError(f"{given[0]}: needs --to {' or '.join(LORAS)}")
        if self.biases and self.to != "lora":
            raise ValueError("biases: needs --to lora; ComfyUI and A1111 read no biases of a LoRA")
        if self.biases and self.only_weights:
            raise ValueError("biases: a LoRA cannot have only_weights and biases; give one of them")

    @property
    def claim(self) -> dict:
        return {"kind": RESULT, "run": "export", "replaces": result_names(), "overwrite": self.overwrite}

    def check_surroundings(self) -> None:
        """Checks the source's place, the base model if it is given, and the output folder. Nothing is made yet.

        Raises:
            `ValueError`: One line that says what is wrong.
        """
        check_revision(self.revision, self.source)
        check_revision(self.base_revision, self.base_model, "base_revision")
        fetch(self.source, self.weight_name, only_records=True, **_revision(self.revision))
        if self.base_model is not None:
            stored = StoredModel(self.base_model, argument="base_model", **_revision(self.base_revision))
            stored.check_files()
        if os.path.isdir(self.source):
            check_apart(self.output_dir, self.source, "the source")
        elif os.path.realpath(self.output_dir) == os.path.realpath(self.source):
            raise ValueError(f"output_dir {self.output_dir}: is the source; give another")
        check_claim(self.output_dir, **self.claim)


def export(source: str, output_dir: str, to: str = "full", **options) -> LoRA | None:
    """Saves an erased model in another format, with its `erasure.json`: what `diffusers-safe export` does.

        export("runs/knife", "runs/knife-lora", "lora", rank=16)

    Args:
        source (`str`): File, folder or Hub id: a pipeline, a denoiser, erased weights of this package or of ESD, a
            CompVis checkpoint, a LoRA.
        output_dir (`str`): The folder of the result.
        to (`str`, defaults to `"full"`): `"full"`, a stock pipeline folder; the denoiser's name in the
            pipeline, the denoiser alone; `"partial"`, the changed weights; `"lora"`; `"kohya"`, the same LoRA by the
            names that ComfyUI and A1111 read; `"single-file"`, a checkpoint for these programs.
        options: Those of `diffusers-safe export --help`.

    Returns:
        `LoRA`, *optional*: The LoRA with its errors, if it is one.

    Raises:
        `ValueError`: If there is no erasure, its base model is unknown or another one, or a LoRA cannot hold it.
            Nothing is written then.
    """
    settings = build_options(ExportOptions, {"source": source, "output_dir": output_dir, "to": to, **options})
    settings.check_surroundings()
    return run_export(settings)


def run_export(options: ExportOptions) -> LoRA | None:
    """Reads the source, finds its base model and writes the result; returns the LoRA if it is one."""
    with claimed(options.output_dir, **options.claim):
        erased = read_erased_weights(fetch(options.source, options.weight_name, **_revision(options.revision)))
        if erased.known.get("train_method") == TEXT_ENCODERS:
            raise ModelError(f"source {options.source}: its text encoders were erased, which have no other format")
        base_model, base_revision = _base_model(options, erased)
        check_apart(options.output_dir, base_model, "the base model")
        hub = _revision(base_revision)
        variant = erased.known.get("arguments", {}).get("variant") if options.base_model is None else None
        try:
            stored = StoredModel(base_model, argument="base_model", **hub)
        except ValueError as error:
            named = "; the source names it, --base_model gives another" if options.base_model is None else ""
            raise ModelError(f"{error}{named}") from None
        _check_form(options.to, base_model, stored.family)
        pipeline = load_pipeline(base_model, **hub, **({"variant": variant} if variant else {}))
        family = make_family(pipeline)
        denoiser = family.denoiser
        own = erased.known.get("base_fingerprint") or fingerprint(denoiser)
        changed, lora, tensors, record = erased.changes(denoiser), None, {}, {"to": options.to}
        try:
            if options.to in LORAS:
                rank = options.rank or min(erased.rank or DEFAULT_RANK, full_rank(denoiser, changed))
                lora = low_rank(denoiser, changed, rank, options.only_weights, options.biases)
                tensors = lora.tensors if options.to == "lora" else kohya_tensors(lora, denoiser)
                record |= lora.report()
            elif options.to == "single-file":
                assign(denoiser, changed)
                tensors = family.to_original(pipeline)
        except ValueError as error:
            raise ModelError(str(error)) from None
        provenance = replace(erased.provenance(base_model, base_revision, own), export=record)
        with written_aside(options.output_dir, provenance) as aside:
            if name := _FILE_NAMES.get(options.to):
                more = family.kohya_metadata(denoiser) if options.to == "kohya" else {}
                save_whole(tensors, aside / name, {"format": "pt", **facts(provenance), **more})
            elif options.to == "partial":
                save_partial(changed, provenance, aside / PARTIAL_NAME)
            else:
                assign(denoiser, changed)
                save_model(pipeline, aside, only_denoiser=options.to in denoiser_names())
    return lora


def _check_form(to: str, base_model: str, family: type[ModelFamily]) -> None:
    """
    Raises:
        [`ModelError`]: If models of this family have no such form.
    """
    if to in denoiser_names() and to != family.denoiser_name:
        raise ModelError(f"to {to}: {base_model} has none; its denoiser is called {family.denoiser_name}")
    if to == "single-file" and not family.single_file:
        able = " or ".join(kind.__name__ for one in families() if one.single_file for kind in one.pipeline_classes)
        raise ModelError(
            f"to single-file: {base_model} is a {family.pipeline_classes[0].__name__}; allowed are {able}"
        )


def _revision(revision: str | None) -> dict[str, str]:
    return {"revision": revision} if revision else {}


def _base_model(options: ExportOptions, erased: ErasedWeights) -> tuple[str, str | None]:
    if options.base_model is not None:
        return options.base_model, options.base_revision
    if (name := erased.known.get("base_model")) is None:
        raise ModelError(f"source {options.source}: does not say which model it was made from; give --base_model")
    return name, options.base_revision or erased.known.get("revision")
