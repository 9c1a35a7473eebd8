"""Saves an erased model as something else, or what another program erased as something that loads everywhere.

    diffusers-safe export runs/knife --to lora --rank 16 --output_dir runs/knife-lora
    diffusers-safe export esd-dog-from-dog-esdx.safetensors --base_model user/base --to full --output_dir runs/dog

The source is a file, a folder or a Hub id: a whole pipeline, a denoiser, a file of erased weights (of this package, or
of ESD, 2023 and 2025), a CompVis checkpoint, a LoRA. An erasure.json is written with the result.

  full     a stock pipeline folder
  DENOISER the whole denoiser, a stock diffusers folder, by its name in the pipeline
  partial  the changed weights alone, with the base model's fingerprint
  lora     for load_lora_weights of a stock pipeline; its error is printed
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..arguments import typed
from ..command_line import parse_dataclass
from ..families import StoredModel, denoiser_names, load_pipeline, make_family
from ..formats import (
    LORA_NAME,
    PARTIAL_NAME,
    ErasedWeights,
    LoRA,
    assign,
    facts,
    fetch,
    full_rank,
    low_rank,
    read_erased_weights,
    result_names,
    save_model,
    save_partial,
    save_whole,
    written_aside,
)
from ..loading import ModelError
from ..messages import exit_with_error
from ..output_folders import OVERWRITE_HELP, RESULT, check_apart, check_claim, claimed
from ..provenance import fingerprint
from ..values import choose


DEFAULT_RANK = 16


def forms() -> tuple[str, ...]:
    """What an erased model is saved as; the denoiser alone by its name in the pipeline."""
    return ("full", *denoiser_names(), "partial", "lora")


@typed
@dataclass
class ExportArguments:
    source: str = field(metadata={"help": "The erased model: file, folder or Hub id. May be given without --source."})
    to: str = field(
        metadata={
            "help": f"What it becomes: {', '.join(forms())}.",
        }
    )
    output_dir: str = field(metadata={"help": "Where it goes; a folder without an erased model."})
    base_model: str | None = field(
        default=None, metadata={"help": "What it was erased from, folder or Hub id; default what the source says."}
    )
    base_revision: str | None = field(
        default=None, metadata={"help": "Of the base model on the Hub; default what the source says."}
    )
    revision: str | None = field(default=None, metadata={"help": "Of the source on the Hub."})
    weight_name: str | None = field(
        default=None, metadata={"help": "The file of the source that holds the erasure, if there are several."}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": f"Of the LoRA; default {DEFAULT_RANK}, or less where less is exact, which is the most."},
    )
    only_weights: bool = field(
        default=False,
        metadata={
            "help": "Leave changed biases and norms out of the LoRA. Biases need a loader that knows lora_B.bias "
            "(diffusers does, others may not, and such a LoRA cannot be fused); norms fit into no LoRA."
        },
    )

    overwrite: bool = field(default=False, metadata={"help": OVERWRITE_HELP})

    def __post_init__(self):
        self.to = choose("to", self.to, forms())
        if self.to != "lora" and (self.rank is not None or self.only_weights):
            given = f"rank {self.rank}" if self.rank is not None else "only_weights"
            raise ValueError(f"{given}: needs --to lora")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank {self.rank}: must be at least 1")

    @property
    def claim(self) -> dict:
        return {"kind": RESULT, "run": "export", "replaces": result_names(), "overwrite": self.overwrite}


def check_surroundings(args: ExportArguments) -> None:
    """The source's place, the base model where it is given, and the output folder. Nothing is made yet."""
    fetch(args.source, args.weight_name, only_records=True, **_revision(args))
    if args.base_model is not None:
        stored = StoredModel(args.base_model, argument="base_model", **_of_base(args.base_revision))
        stored.check_files()
    if os.path.realpath(args.output_dir) == os.path.realpath(args.source):
        raise ValueError(f"output_dir {args.output_dir}: is the source; give another")
    check_claim(args.output_dir, **args.claim)


def export(args: ExportArguments) -> LoRA | None:
    """Reads the source, finds its base model, writes the result; returns the LoRA if it is one.

    Raises:
        `ValueError`: If there is no erasure, its base model is not known or another one, or a LoRA cannot hold it.
            Nothing is written then.
    """
    erased = read_erased_weights(fetch(args.source, args.weight_name, **_revision(args)))
    base_model, base_revision = _base_model(args, erased)
    check_apart(args.output_dir, base_model, "the base model")
    hub = _of_base(base_revision)
    variant = erased.known.get("arguments", {}).get("variant") if args.base_model is None else None
    try:
        StoredModel(base_model, argument="base_model", **hub)
    except ValueError as error:
        named = "; the source names it, --base_model gives another" if args.base_model is None else ""
        raise ModelError(f"{error}{named}") from None
    pipeline = load_pipeline(base_model, **hub, **({"variant": variant} if variant else {}))
    family = make_family(pipeline)
    denoiser = family.denoiser
    if args.to in denoiser_names() and args.to != family.denoiser_name:
        raise ModelError(f"to {args.to}: {base_model} has none; its denoiser is called {family.denoiser_name}")
    changed = erased.changes(denoiser)
    own = erased.known.get("base_fingerprint") or fingerprint(denoiser)
    export = {"to": args.to}
    lora = None
    if args.to == "lora":
        rank = args.rank or min(DEFAULT_RANK, full_rank(denoiser, changed))
        lora = low_rank(denoiser, changed, rank, args.only_weights)
        export |= lora.report()
    provenance = replace(erased.provenance(base_model, base_revision, own), export=export)
    with written_aside(args.output_dir, provenance) as aside:
        if lora is not None:
            save_whole(lora.tensors, aside / LORA_NAME, {"format": "pt", **facts(provenance)})
        elif args.to == "partial":
            save_partial(changed, provenance, aside / PARTIAL_NAME)
        else:
            assign(denoiser, changed)
            save_model(pipeline, aside, only_denoiser=args.to in denoiser_names())
    return lora


def _revision(args: ExportArguments) -> dict[str, str]:
    return {"revision": args.revision} if args.revision else {}


def _of_base(revision: str | None) -> dict[str, str]:
    return {"revision": revision} if revision else {}


def _base_model(args: ExportArguments, erased: ErasedWeights) -> tuple[str, str | None]:
    if args.base_model is not None:
        return args.base_model, args.base_revision
    if (name := erased.known.get("base_model")) is None:
        raise ModelError(f"source {args.source}: does not say which model it was made from; give --base_model")
    return name, args.base_revision or erased.known.get("revision")


@exit_with_error()
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    description = __doc__.replace("DENOISER", " or ".join(denoiser_names()).ljust(8))
    args = parse_dataclass(ExportArguments, description, argv, prog, check_surroundings, positional="source")
    with exit_with_error(), claimed(args.output_dir, **args.claim):
        lora = export(args)
    if lora is not None:
        worst = lora.worst
        print(f"rank {lora.rank}: error {lora.error:.2%} of the change, at worst {lora.errors[worst]:.2%} ({worst})")
        if lora.left_out:
            print(f"left out: {len(lora.left_out)} changed biases and norms, such as {lora.left_out[0]}")
    print(f"{args.to} in {Path(args.output_dir).resolve()}")
