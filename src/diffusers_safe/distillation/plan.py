"""What a distillation would do, from the models' configs alone: `--dry_run`."""

import torch

from ..diffusion.trajectories import Trajectories
from ..families import StoredModel
from ..families.cost import forward_flops, training_cost
from ..training.loop import make_weights
from ..training.plan import Plan, blank_batch, training_memory, trajectory_forwards
from .options import DistillationOptions


def make_plan(options: DistillationOptions, num_processes: int = 1) -> Plan:
    """The plan of a distillation; forward passes of the autoencoder and the text encoders are not counted."""
    model, sampling, loss = options.model, options.sampling, options.loss
    teacher = StoredModel(model.pretrained_model_name_or_path, model.resolution, **model.index_arguments)
    student = options.check_base_model().train()
    total = [parameter.numel() for parameter in student.parameters()]
    weights = make_weights(student, options.weights, options.output.seed, options.ema_decay, options.KEEPS_FROZEN)
    if options.run.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    inputs = blank_batch(student, teacher, options.run)
    forward, backward, activations = training_cost(student, inputs)
    forwards, flops = {"the student": 1.0}, forward + backward
    memory = {**training_memory({student}, weights, options.optimizer.use_8bit_adam), "activations": activations}
    if loss.objective().needs_teacher:
        forwards["the teacher"] = 1.0
        flops += forward_flops(teacher.denoiser, inputs)
        memory["teacher"] = 4 * sum(parameter.numel() for parameter in teacher.denoiser.parameters())
    if loss.sdd_weight:
        scheduled = (teacher.make_scheduler, (1, 1, 1), sampling.num_inference_steps, sampling.sampling_guidance_scale)
        # The loss takes one for the target and one that learns.
        trajectory = trajectory_forwards(sampling, Trajectories(*scheduled))
        forwards["SDD"] = trajectory / sampling.latents_per_trajectory + 2
        flops += forward * forwards["SDD"] + backward
    return Plan(
        options,
        ("distil", f"{options.student.student or options.student.from_student}"),
        (len(weights.student), sum(map(torch.numel, weights.student.values()))),
        (len(total), sum(total)),
        forwards,
        2 if loss.sdd_weight else 1,
        memory,
        flops,
        num_processes,
    )
