"""From arguments to an erased model on disk; the same for every objective."""

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..backbones import load_pipeline, make_backbone
from ..evaluation.grid import save_grid
from ..hub import push_or_exit
from ..provenance import Provenance, fingerprint
from .arguments import ErasureArguments
from .loop import ErasureLoop
from .objectives import Objective
from .output import save_result
from .samples import sample_grid


def erase_and_save(
    accelerator: Accelerator, objective: Objective, args: ErasureArguments, ema_decay: float | None = None
) -> None:
    """Loads the base model, trains the objective, writes the result to `args.output_dir`, and publishes it if asked.

    A result that cannot be published is complete on disk; the program then ends with code `PUSH_FAILED`.
    """
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
            **args.recorded,
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        revision=args.revision,
    )
    loop = ErasureLoop(accelerator, backbone, objective, args, ema_decay)
    loop.run()
    if accelerator.is_main_process:
        backbone.denoiser.eval()
        save_result(pipeline, loop.weights.values("student"), provenance, args.output_dir, args.save)
        print(f"erased {', '.join(args.concepts)}; the result is in {args.output_dir}")
        if args.push_to_hub:
            kept = [*args.watch_prompts, *args.retain_prompts]
            pipeline.to(accelerator.device)
            picture = sample_grid(
                pipeline,
                loop.weights,
                args.concepts,
                kept,
                num_inference_steps=args.num_inference_steps,
                seed=args.seed,
            )
            save_grid(picture, args.output_dir)
    accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:  # the others need not wait for the network
        push_or_exit(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private)
