"""What an erasure would do, from the model's configs alone, without its weights: `--dry_run`."""

from typing import Any

import torch
from torch import nn

from ..diffusion.trajectories import Trajectories
from ..families import StoredModel
from ..families.cost import training_cost
from ..methods import TrainingBatch, method_label
from ..methods.retention import retention_loss
from ..training.loop import make_weights
from ..training.plan import Plan, blank_batch, training_memory, trajectory_forwards
from .job import ErasureOptions, TrainedErasureOptions, trained_module


def make_plan(options: ErasureOptions, num_processes: int = 1) -> Plan | str:
    """The plan of a run; reads configs and the tokenizer, no weights."""
    goal = f"{', '.join(options.concept.concepts)} by {method_label(options.method.name)}"
    if not options.method.trains:
        name = options.model.pretrained_model_name_or_path
        denoiser = StoredModel(name, options.model.resolution, **options.model.index_arguments).denoiser
        sizes = {name: value.numel() for name, value in denoiser.named_parameters()}
        edited = options.method.edited(denoiser)
        count, total = sum(sizes[name] for name in edited), sum(sizes.values())
        lines = {
            "erase": goal,
            "from": name,
            "train": "nothing: the method edits the weights",
            **(
                {
                    "edit": f"{len(edited)} of {len(sizes)} tensors, {count:,} of {total:,} parameters "
                    f"({count / total:.1%})"
                }
                if edited
                else {}
            ),
            "result": f"{options.output.output_dir} ({options.output.save})",
        }
        return "\n".join(f"{name:10} {text}" for name, text in lines.items()) + "\nnothing was edited or written"
    model, sampling = options.model, options.sampling
    stored = StoredModel(model.pretrained_model_name_or_path, model.resolution, **model.index_arguments)
    denoiser = stored.denoiser.train()
    trained = trained_module(stored, options.weights.train_method)
    total = [parameter.numel() for parameter in trained.parameters()]
    weights = make_weights(trained, options.weights, options.output.seed, options.ema_decay)
    batch = blank_batch(denoiser, stored, options.run)
    if trained is not denoiser:
        _require_gradients(denoiser, batch)
    if options.run.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    trajectories = Trajectories(
        stored.make_scheduler,
        stored.latent_shape,
        sampling.num_inference_steps,
        sampling.sampling_guidance_scale,
        stored.family.guidance_name,
    )
    forwards = _forwards(options, trajectories, options.run.num_samples * num_processes)
    forward, backward, activations = training_cost(denoiser, batch)
    return Plan(
        options,
        ("erase", goal),
        (len(weights.student), sum(map(torch.numel, weights.student.values()))),
        (len(total), sum(total)),
        forwards,
        len(forwards) - 1,
        {
            **training_memory({denoiser, trained}, weights, options.optimizer.use_8bit_adam),
            "activations": activations,
        },
        forward * sum(forwards.values()) + backward * (len(forwards) - 1),
        num_processes,
    )


def _require_gradients(denoiser: nn.Module, batch: dict[str, Any]) -> None:
    """Makes gradients pass through a denoiser to what it is given, not to its parameters."""
    denoiser.requires_grad_(False)
    for value in [*batch.values()][1:]:  # the first are the latents
        for tensor in value.values() if isinstance(value, dict) else [value]:
            tensor.requires_grad_(tensor.is_floating_point())


class _Counter:
    """Stands in for a predictor, and counts what it is asked for."""

    def __init__(self):
        self.forwards = 0

    def __call__(self, model_input, timesteps, prompts, weights):
        self.forwards += len(prompts)
        return torch.zeros_like(model_input)


def _forwards(options: TrainedErasureOptions, trajectories: Trajectories, num_samples: int) -> dict[str, float]:
    batch = TrainingBatch(torch.zeros(1, 1, 1, 1), torch.zeros(1), ["concept"])
    loss, kept = _Counter(), _Counter()
    options.method.objective(options.concept.concepts).loss(loss, batch)
    retention_loss(kept, batch)
    forwards = {
        "sampling latents": _sampling("erase", options, trajectories, num_samples),
        "the loss": loss.forwards,
    }
    if options.retention.trained_prompts:
        forwards["retention"] = _sampling("retain", options, trajectories, num_samples) + kept.forwards
    if options.retention.keeps_unconditional:
        forwards["unconditional retention"] = kept.forwards
    return forwards


def _sampling(term: str, options: TrainedErasureOptions, trajectories: Trajectories, num_samples: int) -> float:
    """Mean number of forward passes for the latent of one sample: trajectories run to their last stop, and may serve
    several."""
    each = trajectory_forwards(options.sampling, trajectories)
    if term in options.pooled_terms():
        return each * min(options.sampling.trajectory_pool, num_samples) / num_samples
    return each / options.sampling.latents_per_trajectory
