"""Sources of the samples of each optimizer step: new trajectories during training, or a pool sampled in advance.

Sampling is 93 % of the arithmetic of ESD and SDD when every sample has its own trajectory, as in the papers. Two
options reuse trajectories: `--latents_per_trajectory K` takes K latents from each, and `--trajectory_pool N` samples N
of them once. A pool is possible only for latents of the frozen model, which do not change during training.

A trajectory is a function of (seed, purpose, number). Which latent a sample takes is a function of its step and its
slot, its place among the samples of that step over all processes. So the number of processes, the batch size,
accumulation and resuming change no latent.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..diffusion.generators import sample_generator
from ..diffusion.trajectories import Trajectories
from ..methods import TrainingBatch
from ..methods.predictor import Predictor
from .options import SamplingOptions
from .resumable import Resumable


SAMPLED_AT_ONCE = 4  # of a pool: with guidance 8 rows, about what a step of training has room for
# A trajectory number and its generator to the prompt that guides it and the prompt to train on.
Prompts = Callable[[int, torch.Generator], tuple[str, str]]


class SampleSource(Resumable):
    """Gives the samples of each optimizer step for one term of the loss; a part of every checkpoint.

    Args:
        purpose (`str`): `"erase"` or `"retain"`: each has its own random numbers.
        weights (`str`): Whose weights sample the latents: `"student"`, `"ema"` or `"frozen"`.
        prompts (`Prompts`): As [`ConceptSchedule.prompts`].
        predictor (`Predictor`): Knows the prompts.
        trajectories (`Trajectories`): The sampler.
        sampling (`SamplingOptions`): Where trajectories stop, and how many latents each gives.
        seed (`int`): Of the run.
        samples_a_step (`int`): Of all processes together.
    """

    def __init__(
        self,
        purpose: str,
        weights: str,
        prompts: Prompts,
        predictor: Predictor,
        trajectories: Trajectories,
        sampling: SamplingOptions,
        seed: int,
        samples_a_step: int,
    ):
        self.purpose, self.weights, self.prompts = purpose, weights, prompts
        self.predictor, self.trajectories, self.sampling, self.seed = predictor, trajectories, sampling, seed
        self.samples_a_step = samples_a_step

    @abstractmethod
    def batch(self, step: int, slots: range) -> TrainingBatch:
        """The samples of a step, counted from 0, at these places among `samples_a_step`."""

    @torch.no_grad()
    def _sample(self, numbers: list[int]) -> list[TrainingBatch]:
        """Trajectories by number, each as the batch of its K latents."""
        count, fraction = self.sampling.latents_per_trajectory, self.sampling.sampling_fraction
        generators = [sample_generator(self.seed, self.purpose, number) for number in numbers]
        pairs = [self.prompts(number, generator) for number, generator in zip(numbers, generators)]
        model_input, timesteps = self.trajectories.sample(
            lambda *inputs: self.predictor.predict(*inputs, weights=self.weights),
            self.predictor.conditioning([sampled for sampled, _ in pairs], self.weights),
            self.predictor.conditioning([""], self.weights),
            [self.trajectories.draw_stops(generator, fraction, count) for generator in generators],
            generators,
            self.predictor.device,
        )
        parts = zip(model_input.split(count), timesteps.split(count), pairs)
        return [
            TrainingBatch(latents.clone(), times.clone(), [trained] * count, [sampled] * count)
            for latents, times, (sampled, trained) in parts
        ]

    def _pick(self, picks: list[tuple[TrainingBatch, int]]) -> TrainingBatch:
        """One latent of each of several trajectories."""
        device = self.predictor.device
        return TrainingBatch(
            torch.stack([trajectory.model_input[row] for trajectory, row in picks]).to(device),
            torch.stack([trajectory.timesteps[row] for trajectory, row in picks]).to(device),
            [trajectory.prompts[row] for trajectory, row in picks],
            [trajectory.trajectory_prompts[row] for trajectory, row in picks],
        )


class LiveSamples(SampleSource):
    """Samples during training: every K steps each slot gets a new trajectory, and takes one of its K latents per step.

    With K = 1 every sample has its own trajectory, as in the papers. With more, all K are sampled with the weights of
    the first of these steps: at the last one they are K - 1 steps old. The remaining ones are therefore part of a
    checkpoint; a resumed run could not sample them again.
    """

    def __init__(self, *source):
        super().__init__(*source)
        self._batches: dict[int, TrainingBatch] = {}

    def batch(self, step: int, slots: range) -> TrainingBatch:
        period, row = divmod(step, self.sampling.latents_per_trajectory)
        numbers = [period * self.samples_a_step + slot for slot in slots]
        if missing := [number for number in numbers if number not in self._batches]:
            current = {n: batch for n, batch in self._batches.items() if n >= period * self.samples_a_step}
            self._batches = current | dict(zip(missing, self._sample(missing)))
        return self._pick([(self._batches[number], row) for number in numbers])

    def prepare(self) -> None:
        """Nothing is sampled in advance."""

    def state_dict(self) -> dict:
        if self.sampling.latents_per_trajectory == 1:
            return {}
        own = [(n, *_on_cpu(batch)) for n, batch in self._batches.items()]
        return {"drawn": gather_object(own)}  # every process has sampled those of its own slots

    def load_state_dict(self, state: dict) -> None:
        self._batches = {number: TrainingBatch(*batch) for number, *batch in state.get("drawn", [])}


class PooledSamples(SampleSource):
    """Samples N trajectories once and takes all samples from them: one latent of each in turn, then the next latent of
    each, and after K rounds the first again.

    Trajectory n of the pool is trajectory n of a run without one, so as long as N lasts and K = 1 nothing changes.

    Args:
        source: As [`SampleSource`].
        size (`int`): N.
        num_samples (`int`): Of the whole run, over all processes.
    """

    def __init__(self, *source, size: int, num_samples: int):
        super().__init__(*source)
        self.size = min(size, num_samples)  # no more are ever used
        self._pool: dict[int, TrainingBatch] | None = None

    def batch(self, step: int, slots: range) -> TrainingBatch:
        self.prepare()
        turns = [divmod(step * self.samples_a_step + slot, self.size) for slot in slots]
        return self._pick([(self._pool[n], turn % self.sampling.latents_per_trajectory) for turn, n in turns])

    def prepare(self) -> None:
        """Samples the pool, once; it is kept on the CPU. Every process samples a part of it."""
        if self._pool is not None:
            return
        processes = PartialState()
        numbers = list(range(processes.process_index, self.size, processes.num_processes))
        sampled = []
        name = f"trajectories to {self.purpose}"
        with tqdm(total=len(numbers), desc=name, disable=not processes.is_main_process) as bar:
            for start in range(0, len(numbers), SAMPLED_AT_ONCE):
                chosen = numbers[start : start + SAMPLED_AT_ONCE]
                sampled += [(n, *_on_cpu(batch)) for n, batch in zip(chosen, self._sample(chosen))]
                bar.update(len(chosen))
        self._pool = {number: TrainingBatch(*batch) for number, *batch in gather_object(sampled)}

    def state_dict(self) -> dict:
        """Nothing: the frozen model samples the same pool again."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Does nothing."""


def _on_cpu(batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    return batch.model_input.cpu(), batch.timesteps.cpu(), batch.prompts, batch.trajectory_prompts
