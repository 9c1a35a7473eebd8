"""From arguments to an erased model on disk; the same for every objective."""

from dataclasses import asdict

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..backbones import load_pipeline, make_backbone
from ..provenance import Provenance, fingerprint
from .arguments import ErasureArguments
from .loop import ErasureLoop
from .objectives import Objective
from .output import save_result


def erase_and_save(
    accelerator: Accelerator, objective: Objective, args: ErasureArguments, ema_decay: float | None = None
) -> None:
    """Loads the base model, trains the objective, writes the result to `args.output_dir`."""
    set_seed(args.seed)
    pipeline = load_pipeline(args.pretrained_model_name_or_path, **args.hub_arguments)
    backbone = make_backbone(pipeline)
    provenance = Provenance(
        base_model=args.pretrained_model_name_or_path,
        base_fingerprint=fingerprint(backbone.denoiser),
        concepts=args.concepts,
        method=objective.name,
        train_method=args.train_method,
        arguments={
            **{name: value for name, value in asdict(args).items() if name != "cache_dir"},
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        revision=args.revision,
    )
    loop = ErasureLoop(accelerator, backbone, objective, args, ema_decay)
    loop.run()
    if accelerator.is_main_process:
        backbone.denoiser.eval()
        save_result(pipeline, loop.weights, provenance, args.output_dir, args.save)
        print(f"erased {', '.join(args.concepts)}; the result is in {args.output_dir}")
    accelerator.wait_for_everyone()
