"""What a training would do, from the model's configs alone, without its weights: `--dry_run`."""

from dataclasses import dataclass
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ..backbones import StoredModel
from ..trajectories import Trajectories
from ..weights import TRAIN_METHODS
from .arguments import ErasureArguments
from .loop import make_weights, peak_learning_rate
from .objectives import TrainingBatch
from .objectives.retention import retention_loss


GIB = 2**30


@dataclass
class Plan:
    """Attributes:
    args (`ErasureArguments`): Of the run.
    selected, total (`tuple[int, int]`): Tensors and parameters: those that train, and all.
    forwards (`dict[str, float]`): Mean sample-forwards of the denoiser for one training sample, by what they are for.
    backwards (`int`): The same, for the backward.
    memory (`dict[str, float]`): Bytes on the device, by what they are for; all in float32.
    flops (`float`): Of one training sample, forwards and backward.
    num_processes (`int`): As launched.
    """

    args: ErasureArguments
    selected: tuple[int, int]
    total: tuple[int, int]
    forwards: dict[str, float]
    backwards: int
    memory: dict[str, float]
    flops: float
    num_processes: int

    @property
    def num_samples(self) -> int:
        args = self.args
        return args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps * self.num_processes

    def __str__(self) -> str:
        args, per_sample = self.args, sum(self.forwards.values())
        method = TRAIN_METHODS[args.train_method].description
        if args.rank is not None:
            method = f"a LoRA of rank {args.rank} on {method}"
        petaflops = self.flops * self.num_samples / 1e15
        rows = {
            "erase": f"{', '.join(args.concepts)} by {args.make_objective().name.upper()}",
            "from": args.pretrained_model_name_or_path,
            "train": f"{args.train_method} ({method}): {self.selected[0]} of {self.total[0]} tensors, "
            f"{self.selected[1] / 1e6:,.2f} of {self.total[1] / 1e6:,.2f} M parameters",
            "steps": f"{args.max_train_steps:,} of {_counted(self.num_samples // args.max_train_steps, 'sample')} "
            f"({_counted(self.num_processes, 'process', 'es')} x batch {args.train_batch_size} x accumulation "
            f"{args.gradient_accumulation_steps}), learning rate {peak_learning_rate(args, self.num_processes):g}, "
            f"{args.lr_scheduler}",
            "forwards": f"{per_sample:.1f} a sample ({_parts(self.forwards, '{:.1f}')}), "
            f"{per_sample * self.num_samples:,.0f} in all; backwards {self.backwards} a sample",
            "arithmetic": f"{petaflops:,.3g} PFLOP: {told_duration(petaflops * 100)} at 10 TFLOP/s, "
            f"{told_duration(petaflops * 10)} at 100",
            "memory": f"{sum(self.memory.values()) / GIB:.2f} GiB a device "
            f"({_parts(self.memory, '{:.2f}', 1 / GIB)}), computed for float32",
            "result": f"{args.output_dir} ({args.save})",
        }
        return "\n".join(f"{name:10} {text}" for name, text in rows.items()) + "\nnothing was trained or written"


def make_plan(args: ErasureArguments, num_processes: int = 1) -> Plan:
    """The plan of a run; reads configs and the tokenizer, no weights."""
    model = StoredModel(args.pretrained_model_name_or_path, args.resolution, **args.index_arguments)
    unet = model.denoiser.train()
    total = [parameter.numel() for parameter in unet.parameters()]
    weights = make_weights(unet, args, args.ema_decay)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    trajectories = Trajectories(
        model.make_scheduler, model.latent_shape, args.num_inference_steps, args.sampling_guidance_scale
    )
    num_samples = args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps * num_processes
    forwards = _forwards(args, trajectories, num_samples)
    tokens = model.tokenizers[0].model_max_length
    inputs = _blank_inputs(unet, (args.train_batch_size, *model.latent_shape), tokens)
    forward, backward, activations = _measure(unet, inputs)
    selected = [value.numel() for value in weights.student.values()]
    resident = list(unet.parameters())  # a LoRA's are among them by now
    own = set(map(id, resident))
    copies = [
        value.numel()
        for side in (weights.frozen, weights.ema or {})
        for value in side.values()
        if id(value) not in own
    ]
    trained = sum(selected)
    return Plan(
        args,
        (len(selected), trained),
        (len(total), sum(total)),
        forwards,
        len(forwards) - 1,
        {
            "model": 4 * sum(parameter.numel() for parameter in resident),
            "copies and gradients": 4 * (sum(copies) + trained),
            "Adam": (2 if args.use_8bit_adam else 8) * trained,
            "activations": activations,
        },
        forward * sum(forwards.values()) + backward * (len(forwards) - 1),
        num_processes,
    )


class _Counter:
    """Stands in for a predictor, and counts what it is asked for."""

    def __init__(self):
        self.forwards = 0

    def __call__(self, model_input, timesteps, prompts, weights):
        self.forwards += len(prompts)
        return torch.zeros_like(model_input)


def _forwards(args: ErasureArguments, trajectories: Trajectories, num_samples: int) -> dict[str, float]:
    batch = TrainingBatch(torch.zeros(1, 1, 1, 1), torch.zeros(1), ["concept"])
    loss, kept = _Counter(), _Counter()
    args.make_objective().loss(loss, batch)
    retention_loss(kept, batch)
    forwards = {"drawing latents": _drawing("erase", args, trajectories, num_samples), "the loss": loss.forwards}
    if args.retain_weight > 0 and args.retain_prompts:
        forwards["retention"] = _drawing("retain", args, trajectories, num_samples) + kept.forwards
    if args.retain_weight > 0 and args.retain_unconditional:
        forwards["unconditional retention"] = kept.forwards
    return forwards


def _drawing(purpose: str, args: ErasureArguments, trajectories: Trajectories, num_samples: int) -> float:
    """Mean forwards for the latent of one sample: trajectories run to their last stop, and may serve several."""
    choices = trajectories.stop_choices(args.sampling_fraction, args.latents_per_trajectory)
    each = sum(map(max, choices)) / len(choices) * (2 if args.sampling_guidance_scale > 1 else 1)
    if purpose in args.pooled_purposes():
        return each * min(args.trajectory_pool, num_samples) / num_samples
    return each / args.latents_per_trajectory


def _measure(unet: UNet2DConditionModel, inputs: dict) -> tuple[float, float, float]:
    """FLOPs of a sample's forward and backward, and the bytes that a batch keeps for its backward."""
    own = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    # The attention for meta tensors keeps the matrix of weights; the kernels of CPUs and GPUs do not.
    with patch.object(functional, "scaled_dot_product_attention", lambda q, k, v, **_: _Attention.apply(q, k, v)):
        with FlopCounterMode(display=False) as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
            output = unet(**inputs, return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    activations = sum(storage.nbytes() for storage in kept.values())
    batch_size = len(inputs["sample"])
    return forward.get_total_flops() / batch_size, backward.get_total_flops() / batch_size, activations


def _blank_inputs(unet: UNet2DConditionModel, shape: tuple[int, int, int, int], tokens: int) -> dict:
    config, batch_size = unet.config, shape[0]
    widths = config.cross_attention_dim
    width = widths if isinstance(widths, int) else widths[0]
    inputs = {
        "sample": torch.empty(shape, device="meta"),
        "timestep": torch.empty(batch_size, dtype=torch.long, device="meta"),
        "encoder_hidden_states": torch.empty(batch_size, tokens, width, device="meta"),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch_size, pooled, device="meta"),
            "time_ids": torch.empty(batch_size, 6, device="meta"),
        }
    return inputs


class _Attention(torch.autograd.Function):
    """The matrix products of attention that keeps its inputs only, and nothing else of it."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return query @ key.transpose(-1, -2) @ value

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        weights = query @ key.transpose(-1, -2)
        weights_gradient = gradient @ value.transpose(-1, -2)
        return (
            weights_gradient @ key,
            weights_gradient.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ gradient,
        )


def _parts(values: dict[str, float], pattern: str, factor: float = 1) -> str:
    return ", ".join(f"{name} {pattern.format(factor * value)}" for name, value in values.items())


def _counted(count: int, unit: str, plural: str = "s") -> str:
    return f"{count} {unit}{plural if count != 1 else ''}"


def told_duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
