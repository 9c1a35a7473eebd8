"""What a training would do, from the model's configs alone, without its weights: `--dry_run`."""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from ..diffusion.trajectories import Trajectories
from ..distillation.arguments import DistillationArguments
from ..families import StoredModel
from ..families.cost import forward_flops, training_cost
from ..methods import TrainingBatch
from ..methods.retention import retention_loss
from ..training.arguments import SamplingArguments, TrainingArguments
from ..training.loop import make_weights, peak_learning_rate
from ..weights.trained import TRAIN_METHODS, TrainedWeights
from .arguments import ErasureArguments


GIB = 2**30


@dataclass
class Plan:
    """Attributes:
    args (`TrainingArguments`): Of the run.
    goal (`tuple[str, str]`): What is done, and to what.
    selected, total (`tuple[int, int]`): Tensors and parameters: those that train, and all.
    forwards (`dict[str, float]`): Mean sample-forwards of denoisers for one training sample, by what they are for.
    backwards (`int`): The same, for the backward.
    memory (`dict[str, float]`): Bytes on the device, by what they are for; all in float32.
    flops (`float`): Of one training sample, forwards and backward.
    num_processes (`int`): As launched.
    """

    args: TrainingArguments
    goal: tuple[str, str]
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
            self.goal[0]: self.goal[1],
            "from": args.pretrained_model_name_or_path,
            "train": f"{args.train_method} ({method}): {self.selected[0]} of {self.total[0]} tensors, "
            f"{self.selected[1] / 1e6:,.2f} of {self.total[1] / 1e6:,.2f} M parameters",
            "steps": f"{args.max_train_steps:,} of {_counted(self.num_samples // args.max_train_steps, 'sample')} "
            f"({_counted(self.num_processes, 'process', 'es')} x batch {args.train_batch_size} x accumulation "
            f"{args.gradient_accumulation_steps}), learning rate {peak_learning_rate(args, self.num_processes):g}, "
            f"{args.lr_scheduler}",
            "forwards": f"{per_sample:.1f} a sample ({_parts(self.forwards, '{:.1f}')}), "
            f"{per_sample * self.num_samples:,.0f} in all; backwards {self.backwards} a sample",
            "arithmetic": f"{petaflops:,.3g} PFLOP: {format_duration(petaflops * 100)} at 10 TFLOP/s, "
            f"{format_duration(petaflops * 10)} at 100",
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
    forward, backward, activations = training_cost(unet, _blank_batch(unet, model, args))
    return Plan(
        args,
        ("erase", f"{', '.join(args.concepts)} by {args.make_objective().name.upper()}"),
        (len(weights.student), sum(map(torch.numel, weights.student.values()))),
        (len(total), sum(total)),
        forwards,
        len(forwards) - 1,
        {**_training_memory(unet, weights, args), "activations": activations},
        forward * sum(forwards.values()) + backward * (len(forwards) - 1),
        num_processes,
    )


def make_distillation_plan(args: DistillationArguments, num_processes: int = 1) -> Plan:
    """The plan of a distillation; the forwards of the autoencoder and the text encoders are not counted."""
    teacher = StoredModel(args.pretrained_model_name_or_path, args.resolution, **args.index_arguments)
    student = args.check_base_model().train()
    total = [parameter.numel() for parameter in student.parameters()]
    weights = make_weights(student, args, args.ema_decay if args.use_ema else None)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    inputs = _blank_batch(student, teacher, args)
    forward, backward, activations = training_cost(student, inputs)
    forwards, flops = {"the student": 1.0}, forward + backward
    memory = {**_training_memory(student, weights, args), "activations": activations}
    if args.make_objective().needs_teacher:
        forwards["the teacher"] = 1.0
        flops += forward_flops(teacher.denoiser, inputs)
        memory["teacher"] = 4 * sum(parameter.numel() for parameter in teacher.denoiser.parameters())
    if args.sdd_weight:
        scheduled = (teacher.make_scheduler, (1, 1, 1), args.num_inference_steps, args.sampling_guidance_scale)
        # The loss takes one for the target and one that learns.
        forwards["SDD"] = _live_drawing(args, Trajectories(*scheduled)) / args.latents_per_trajectory + 2
        flops += forward * forwards["SDD"] + backward
    return Plan(
        args,
        ("distil", f"{args.student or args.from_student}"),
        (len(weights.student), sum(map(torch.numel, weights.student.values()))),
        (len(total), sum(total)),
        forwards,
        2 if args.sdd_weight else 1,
        memory,
        flops,
        num_processes,
    )


def _blank_batch(unet: UNet2DConditionModel, model: StoredModel, args: TrainingArguments) -> dict:
    """A batch of the run, without values."""
    shape = (args.train_batch_size, *model.latent_shape)
    return model.family.blank_inputs(unet, shape, model.tokenizers[0].model_max_length)


def _training_memory(unet: UNet2DConditionModel, weights: TrainedWeights, args: TrainingArguments) -> dict[str, float]:
    """Bytes beside those of the activations."""
    resident = list(unet.parameters())  # a LoRA's are among them by now
    own = set(map(id, resident))
    copies = [
        value.numel()
        for side in (weights.frozen or {}, weights.ema or {})
        for value in side.values()
        if id(value) not in own
    ]
    trained = sum(map(torch.numel, weights.student.values()))
    return {
        "model": 4 * sum(parameter.numel() for parameter in resident),
        "copies and gradients": 4 * (sum(copies) + trained),
        "Adam": (2 if args.use_8bit_adam else 8) * trained,
    }


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
    each = _live_drawing(args, trajectories)
    if purpose in args.pooled_purposes():
        return each * min(args.trajectory_pool, num_samples) / num_samples
    return each / args.latents_per_trajectory


def _live_drawing(args: SamplingArguments, trajectories: Trajectories) -> float:
    """Mean forwards of one trajectory, which runs to its last stop."""
    choices = trajectories.stop_choices(args.sampling_fraction, args.latents_per_trajectory)
    return sum(map(max, choices)) / len(choices) * (2 if args.sampling_guidance_scale > 1 else 1)


def _parts(values: dict[str, float], pattern: str, factor: float = 1) -> str:
    return ", ".join(f"{name} {pattern.format(factor * value)}" for name, value in values.items())


def _counted(count: int, unit: str, plural: str = "s") -> str:
    return f"{count} {unit}{plural if count != 1 else ''}"


def format_duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} seconds"
