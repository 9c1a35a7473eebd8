"""Where (z_t, t) comes from: the first steps of a sampler, stopped at a latent whose timestep is known.

Latents and timestep always belong together, for every scheduler: 0 steps give the initial noise, the timestep is the
one the scheduler would pass next with this latent, and the latent is scaled as the scheduler would scale it. (Each
reference implementation breaks one of these: clean latents trained at t near 1000, jittered or shifted timesteps,
unscaled Euler latents.)
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from diffusers import SchedulerMixin

from ..families import Conditioning


class Trajectories:
    """Samples noisy latents by running a scheduler for part of its way.

    Args:
        make_scheduler (`Callable[[int], SchedulerMixin]`): Gives a new scheduler that is set up for this number of
            steps, as [`ModelFamily.make_scheduler`] does; each sample runs its own, so that samples of one batch can
            stop at different steps whatever history the scheduler keeps.
        latent_shape (`tuple[int, int, int]`): `(C, H, W)`.
        num_inference_steps (`int`, defaults to 50): Length of the schedule.
        guidance_scale (`float`, defaults to 3.0): Classifier-free guidance while sampling; at most 1 turns it off.
        guidance_name (`str`, *optional*): [`ModelFamily.guidance_name`]: where the scale is an input of the denoiser,
            which then predicts once per step.

    Attributes:
        positions (`list[int]`): The numbers of steps after which a sample can stop: 0 (initial noise) and, for
            schedulers that visit a timestep twice (PNDM, Heun), only the last visit.
    """

    def __init__(
        self,
        make_scheduler: Callable[[int], SchedulerMixin],
        latent_shape: tuple[int, int, int],
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        guidance_name: str | None = None,
    ):
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps}: must be at least 1")
        self._scheduler = partial(make_scheduler, num_inference_steps)
        self.latent_shape = latent_shape
        self.num_inference_steps = num_inference_steps
        self.guidance_scale, self.guidance_name = guidance_scale, guidance_name
        timesteps = self._scheduler().timesteps.tolist()
        self.positions = [i for i, t in enumerate(timesteps) if t not in timesteps[i + 1 :]]

    @property
    def forwards_per_step(self) -> int:
        """How many predictions a sample needs for each step."""
        return 2 if self.guidance_scale > 1 and self.guidance_name is None else 1

    def stop_choices(self, fraction: float = 1.0, count: int = 1) -> list[list[int]]:
        """All ways to stop `count` times within the first `fraction` of `positions`, a number in (0, 1]: spread evenly
        around these positions, from each of them on. Over all ways, each of the stops is uniform.

        Raises:
            `ValueError`: If there are fewer positions than `count`.
        """
        available = self.positions[: max(1, round(fraction * len(self.positions)))]
        size = len(available)
        if count > size:
            raise ValueError(f"latents_per_trajectory {count}: must be at most {size}, the stops of a trajectory")
        return [[available[(first + i * size // count) % size] for i in range(count)] for first in range(size)]

    def draw_stops(self, generator: torch.Generator, fraction: float = 1.0, count: int = 1) -> list[int]:
        """One of [`~Trajectories.stop_choices`]."""
        choices = self.stop_choices(fraction, count)
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    @torch.no_grad()
    def sample(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor],
        prompts: Conditioning,
        empty: Conditioning,
        stops: list[list[int]],
        generators: list[torch.Generator],
        device: torch.device | str = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs each sample as far as its last stop; what is still under way is predicted as one batch.

        Args:
            predict (`Callable`): `(model_input, timesteps, conditioning) -> noise_pred`.
            prompts (`Conditioning`): Of the B prompts that guide the samples.
            empty (`Conditioning`): Of the empty prompt, batch size 1.
            stops (`list[list[int]]`): For each of B samples, one or more members of `positions`.
            generators (`list[torch.Generator]`): B generators on the CPU, for the noise of each sample.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The latents at all stops, in the order of `stops`, as the denoiser
            takes them (after `scale_model_input`), `(number of stops, C, H, W)`, and their timesteps.
        """
        schedulers = [self._scheduler() for _ in stops]
        latents = [
            torch.randn((1, *self.latent_shape), generator=generator).to(device)
            * getattr(scheduler, "init_noise_sigma", 1.0)
            for scheduler, generator in zip(schedulers, generators)
        ]
        timesteps = schedulers[0].timesteps.to(device)
        last = [max(own) for own in stops]
        reached = {}  # (sample, stop) -> its latent
        for step in range(max(last) + 1):
            t = timesteps[step]
            inputs = {i: _scaled(schedulers[i], latents[i], t) for i, end in enumerate(last) if step <= end}
            reached.update({(i, step): model_input for i, model_input in inputs.items() if step in stops[i]})
            active = [i for i in inputs if step < last[i]]
            if not active:
                break
            noise_pred = self._guided(predict, torch.cat([inputs[i] for i in active]), t, prompts, empty, active)
            for row, i in enumerate(active):
                extra = _step_arguments(schedulers[i], generators[i])
                latents[i] = schedulers[i].step(noise_pred[row : row + 1], t, latents[i], return_dict=False, **extra)[
                    0
                ]
        model_inputs = [reached[i, stop] for i, own in enumerate(stops) for stop in own]
        return torch.cat(model_inputs), timesteps[[stop for own in stops for stop in own]]

    def _guided(self, predict, model_input, t, prompts, empty, active) -> torch.Tensor:
        conditional = select(prompts, active)
        count = len(active)
        if self.guidance_name is not None:
            scale = torch.full_like(conditional[self.guidance_name], self.guidance_scale)
            conditional = {**conditional, self.guidance_name: scale}
        if self.forwards_per_step == 1:
            return predict(model_input, t.expand(count), conditional)
        both = concatenate(repeat(empty, count), conditional)
        uncond, cond = predict(model_input.repeat(2, 1, 1, 1), t.expand(2 * count), both).chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


def _scaled(scheduler: SchedulerMixin, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Schedulers of flow matching take latents as they are, and have no method for it."""
    return scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents


def _step_arguments(scheduler: SchedulerMixin, generator: torch.Generator) -> dict:
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generator} if takes_generator else {}


def select(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    return {name: value[rows] for name, value in conditioning.items()}


def repeat(conditioning: Conditioning, count: int) -> Conditioning:
    """Batch size 1 to batch size `count`."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in conditioning.items()}


def concatenate(*conditionings: Conditioning) -> Conditioning:
    return {name: torch.cat([conditioning[name] for conditioning in conditionings]) for name in conditionings[0]}
