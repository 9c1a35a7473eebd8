"""From a pipeline to an erased one: the same way for every method, from Python and from the command line."""

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from ..arguments import declared_options, typed
from ..concepts import names_concept
from ..diffusion.trajectories import Trajectories
from ..families import (
    StoredModel,
    denoiser_of,
    family_around,
    family_of_pipeline,
    load_pipeline,
    make_family,
)
from ..formats import fetch, read_erased_weights
from ..generation.generate import GenerationSettings
from ..hub import check_push, push_or_exit, push_result
from ..messages import exit_with_error, is_first_process, note, num_launched
from ..methods import DEFAULT_METHOD, Objective, find_method
from ..methods.predictor import Predictor
from ..model_errors import ModelError
from ..progress import ProgressCallback
from ..provenance import Provenance, erasure_of, fingerprint, stored_path
from ..training.environment import in_float32, isolated_from_caller, make_accelerator, restore_forward
from ..training.output import save_result
from ..training.samples import Samples, Validation, save_card_image, with_validation
from ..values import suggested
from ..weights.trained import TrainedWeights
from .erasure import Erasure, alone_with, was_erased
from .job import ErasureOptions, check_run, erasure_options, parse_options
from .loop import ErasureLoop
from .plan import make_plan
from .strength import find_strength
from .watch import DRIFT_WARNING, LEFT_WARNING, Watch


IN_MEMORY = "a pipeline in memory"
MEASURED_STEPS = 10  # of the schedule whose first timestep is measured
MOST_PROMPTS = 4  # of the grid, where no validation prompts are given


@typed
def erase(
    pipeline: DiffusionPipeline | str,
    concepts: list[str],
    method: str = DEFAULT_METHOD,
    *,
    output_dir: str | None = None,
    progress_bar: bool = True,
    callback: ProgressCallback | None = None,
    **options: Any,
) -> Erasure:
    """Erases concepts from a pipeline, in place: what `diffusers-safe erase` does, in one call.

        erasure = erase("CompVis/stable-diffusion-v1-4", ["Van Gogh"], method="esd", preset="esd-2025")
        image = erasure.pipeline("a painting of sunflowers").images[0]

    (The settings are those of github.com/rohitgandikota/erasing, 2025. Not run here.)

    Random generators of the caller keep their states; if the call raises, the pipeline keeps its weights.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`] or `str`): A loaded pipeline of a supported family, whose denoiser
            is changed, or a folder or Hub id.
        concepts (`list[str]` or `str`): What to erase, at least one name; a text is one concept.
        method (`str`, defaults to `"text_edit"`): A name of [`~diffusers_safe.methods.METHODS`].
        output_dir (`str`, *optional*): Where to save the result, erasure.json, a log and checkpoints; without it
            nothing is written.
        progress_bar (`bool`, defaults to `True`): Whether to show progress and time left.
        callback (`Callable[[Progress], None]`, *optional*): Called after every step with a [`Progress`]. What it
            raises ends the run, and the pipeline keeps its weights.
        options: Any option of the method (`diffusers-safe erase --method esd --help`), such as `max_train_steps=200`.

    Returns:
        [`Erasure`]: With the pipeline on the device and in the dtype that it had; with `rank`, the LoRA is active in
        it (`diffusers_safe.weights.lora.fused` gives a plain one).

    Raises:
        `ValueError`: If the method, an option or a value is unknown or out of its range, or the family of the pipeline
            is not supported.
        `FloatingPointError`: If the loss is not finite any more.
        [`~diffusers_safe.hub.PushError`]: If it could not be published; the result is complete on disk.
    """
    pipeline = os.fspath(pipeline) if isinstance(pipeline, os.PathLike) else pipeline
    if not isinstance(pipeline, (str, DiffusionPipeline)):
        raise ValueError(f"pipeline ({type(pipeline).__name__}): must be a DiffusionPipeline, a folder or a Hub id")
    settings = _make_options(pipeline, concepts, method, output_dir, options)
    with isolated_from_caller():
        accelerator = make_accelerator(settings)
        if isinstance(pipeline, str):
            check_run(settings, StoredModel(pipeline, settings.model.resolution, **settings.model.index_arguments))
            settings.check_files()
        else:
            check_run(settings, make_family(pipeline, settings.model.resolution))
        if output_dir is not None:
            settings.check_output()
        with settings.claimed_output():
            if isinstance(pipeline, str):
                pipeline = load_pipeline(pipeline, **settings.model.hub_arguments)
            erasure = run_erasure(accelerator, pipeline, settings, progress_bar, callback)
    if settings.hub.push_to_hub and accelerator.is_main_process:
        push_result(output_dir, settings.hub.hub_model_id, settings.hub.hub_token, settings.hub.hub_private)
    return erasure


def _make_options(
    pipeline: DiffusionPipeline | str, concepts: list[str], method: str, output_dir: str | None, values: dict[str, Any]
) -> ErasureOptions:
    kind = erasure_options(find_method(method))
    names = declared_options(kind).keys() - {"pretrained_model_name_or_path", "concepts", "output_dir"}
    if unknown := [suggested(name, sorted(names), "") for name in sorted(values.keys() - names)]:
        command = f"diffusers-safe erase --method {method} --help"
        raise ValueError(f"{', '.join(unknown)}: no option of method '{method}'; see {command}")
    name = pipeline if isinstance(pipeline, str) else pipeline.config.get("_name_or_path") or IN_MEMORY
    if not isinstance(pipeline, str) and family_around(pipeline) is not None and was_erased(pipeline):
        note("the pipeline was erased before, so the record names no model on disk as its base model")
        name = IN_MEMORY
    known = {"pretrained_model_name_or_path": name, "concepts": concepts, "output_dir": output_dir}
    options = kind.of(**known, **values)
    options.resolve()
    if options.output.dry_run:
        raise ValueError("dry_run: only for the command line")
    for name in ("resume_from_checkpoint", "report_to"):
        if output_dir is None and values.get(name, "none") != "none":
            raise ValueError(f"{name} {values[name]}: needs an output_dir")
    if options.hub.push_to_hub:
        check_push(options.hub.hub_model_id, options.hub.hub_token)
    return options


@exit_with_error()
def run_command(name: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Runs the command line of a method."""
    options = parse_options(name, argv, prog)
    model, output, hub = options.model, options.output, options.hub
    if output.dry_run:
        if is_first_process():
            print(make_plan(options, num_launched()))
        return
    with options.claimed_output():
        accelerator = make_accelerator(options)
        pipeline = load_pipeline(model.pretrained_model_name_or_path, **model.hub_arguments)
        erasure = run_erasure(accelerator, pipeline, options)
    if accelerator.is_main_process:
        print(_summary(erasure))
        if hub.push_to_hub:  # the other processes need not wait for the network
            push_or_exit(output.output_dir, hub.hub_model_id, hub.hub_token, hub.hub_private)


def _summary(erasure: Erasure) -> str:
    """What a command prints at its end: how much of the concepts is left, and where the result is."""
    concepts, measured = ", ".join(erasure.record.concepts), erasure.measured
    trains = find_method(erasure.record.method).trains
    text = f"{concepts}: {measured['concept_left']:.0%} of their effect on the prediction is left"
    if measured["concept_left"] > LEFT_WARNING:
        advice = (
            "give more steps or a higher learning rate" if trains else "give other anchors, or take another method"
        )
        text += f" (not erased: {advice})"
    if "drift" in measured:
        text += f", unrelated prompts moved by {measured['drift']:.0%}"
        if measured["drift"] > DRIFT_WARNING:
            advice = "a lower learning rate" if trains else "fewer concepts at once"
            text += f" (the model may be damaged: give {advice}, or --retain_prompts)"
    return f"{text}; the result is in {erasure.output_dir}"


def run_erasure(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    options: ErasureOptions,
    progress_bar: bool = True,
    callback: ProgressCallback | None = None,
) -> Erasure:
    """Erases from a loaded pipeline; where there is an output folder, writes the result, as it is to be published.

    If the run is stopped or fails, the pipeline keeps its weights.
    """
    set_seed(options.output.seed)
    with alone_with(denoiser_of(pipeline)), in_float32(pipeline):
        run = MethodRun(accelerator, pipeline, options, progress_bar, callback)
        try:
            options.method.erase(run)
            run.measure_edit()
            erasure = run.result()
            run.show_edit()
        except BaseException:
            run.undo()
            raise
        if options.output.output_dir is not None and accelerator.is_main_process:
            save_result(pipeline, run.weights, erasure.record, options.output.output_dir, options.output.save)
            if options.hub.push_to_hub:
                save_card_image(run.samples, accelerator.device, options.output.output_dir)
        accelerator.wait_for_everyone()
    return erasure


class MethodRun:
    """What a method works with, see [`~diffusers_safe.methods.Run`].

    Args:
        accelerator (`Accelerator`): Devices, processes, mixed precision.
        pipeline (`DiffusionPipeline`): Its denoiser is changed in place.
        options (`ErasureOptions`): Of the run.
        progress_bar (`bool`, defaults to `True`): Whether to show one.
        callback (`Callable[[Progress], None]`, *optional*): As [`erase`] takes it.

    Attributes:
        weights (`TrainedWeights`, *optional*): What the method changed.
        samples (`Samples`, *optional*): Images before and after.
        anchors (`list[str]`, *optional*): What each concept became by an edit.
        measured (`dict[str, float]`): `concept_left` and `drift` at the end, see [`Watch`].
        reached (`dict[str, int | float]`): For the record, with a target: `trained_steps` of a training, `strength` of
            an edit.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: DiffusionPipeline,
        options: ErasureOptions,
        progress_bar: bool = True,
        callback: ProgressCallback | None = None,
    ):
        self.accelerator, self.pipeline, self.options = accelerator, pipeline, options
        self.progress_bar, self.callback = progress_bar, callback
        self.family = make_family(pipeline, options.model.resolution)
        self.concepts, self.retained = options.concept.concepts, options.retention.retain_prompts
        self.base_fingerprint = fingerprint(self.family.denoiser)
        self.weights: TrainedWeights | None = None
        self.samples: Samples | None = None
        self.anchors: list[str] | None = None
        self.measured: dict[str, float] = {}
        self.reached: dict[str, int | float] = {}

    @cached_property
    def erased_before(self) -> list[str]:
        """Concepts that the record of the base model names; looked for when a method asks."""
        model = self.options.model
        record = None
        if (name := model.pretrained_model_name_or_path) != IN_MEMORY:
            record = erasure_of(name, **({"revision": model.revision} if model.revision else {}))
        before = [concept for concept in (record or {}).get("concepts", []) if isinstance(concept, str)]
        return [concept for concept in before if concept not in self.concepts]

    def train(self, objective: Objective) -> None:
        denoiser = self.family.denoiser
        own_forward = vars(denoiser).get("forward")
        try:
            loop = ErasureLoop(self.accelerator, self.family, objective, self.options)
            self.weights, self.samples = loop.weights, make_samples(self.pipeline, loop.weights, self.options)
            self._start()
            loop.run(self.progress_bar, with_validation(self._validation(objective), self.callback))
            self.measured = loop.last_measured
            self._report_end(loop)
        finally:
            restore_forward(denoiser, own_forward)

    def _start(self) -> None:
        """Gives the student the weights of the erased model that the run starts from, if there is one; a checkpoint
        replaces them."""
        if (source := self.options.concept.start_from) is None:
            return
        try:
            self.weights.start_from(read_erased_weights(fetch(source)).changes(self.family.denoiser))
        except ValueError as error:
            raise ModelError(f"start_from '{source}': {error}") from None

    def _report_end(self, loop: ErasureLoop) -> None:
        """With a target: keeps when it was reached for the record, or notes that it was not."""
        if (target := self.options.concept.target) is None:
            return
        self.reached = {"trained_steps": loop.steps}
        if (left := self.measured["concept_left"]) > target:
            note("target %g: not reached in %d steps, %.2g is left; give more steps or a higher learning rate",
                 target, loop.steps, left)  # fmt: skip

    @torch.no_grad()
    def edit(self, values: Mapping[str, torch.Tensor], anchors: list[str] | None = None) -> None:
        self.anchors = anchors
        method, parameters = self.options.method.name, dict(self.family.denoiser.named_parameters())
        for name, value in values.items():
            if name not in parameters or getattr(value, "shape", None) != parameters[name].shape:
                raise ValueError(f"method '{method}': edits {name}, which is no parameter of this shape")
            if value.data_ptr() == parameters[name].data_ptr():
                raise ValueError(f"method '{method}': {name} was changed in place; give new tensors")
            if not value.is_floating_point() or not value.to(parameters[name].dtype).isfinite().all():
                raise FloatingPointError(f"method '{method}': {name} is not finite")
        # A method may edit in several steps: what all of them started from is kept.
        base = self.weights.frozen if self.weights is not None else {}
        names = list(dict.fromkeys([*base, *values]))
        self.weights = TrainedWeights(self.family.denoiser, names)
        self.weights.frozen.update(base)
        self.samples = make_samples(self.pipeline, self.weights, self.options)
        for name, value in values.items():
            self.weights.student[name].copy_(value)

    def measure_edit(self) -> None:
        """Measures what a method that does not train has changed, at pure noise; trainings measure at their steps."""
        options = self.options
        if options.method.trains or self.weights is None:
            return
        device = next(self.family.denoiser.parameters()).device
        watched = options.retention.watch_prompts
        predictor = Predictor(self.family, self.weights, [*self.concepts, *watched, *(self.anchors or [])], device)
        scheduled = Trajectories(self.family.make_scheduler, self.family.latent_shape, MEASURED_STEPS)
        seed = options.output.seed
        watch = Watch(predictor, scheduled, self.concepts, watched, seed, progress=0, anchors=self.anchors)
        target = options.concept.target
        if target is not None:
            self.reached = {"strength": find_strength(self.weights, watch, target)}
        self.measured = watch.measure("student")
        if target is not None and (left := self.measured["concept_left"]) > target:
            note("target %g: not reached, %.2g is left at the best strength, %.2f; give other anchors, or train from "
                 "this edit (--start_from)", target, left, self.reached["strength"])  # fmt: skip

    def show_edit(self) -> None:
        """Generates the validation prompts of a method that does not train; a training has done so at its steps."""
        options, folder = self.options, self.options.output.output_dir
        if options.validation.validation_prompts and not options.method.trains:
            Validation(self.accelerator, self.samples, "student", folder, options.validation).after_step(1, True)

    def undo(self) -> None:
        """Gives the denoiser its weights back."""
        if self.weights is not None:
            self.weights.undo()

    def result(self) -> Erasure:
        """The erased pipeline with its record."""
        if self.weights is None or not self.weights.student:
            raise ValueError(f"method '{self.options.method.name}': neither trained nor edited anything")
        if not self.options.method.trains:
            with self.weights.use("frozen"):
                if fingerprint(self.family.denoiser) != self.base_fingerprint:
                    raise ValueError(
                        f"method '{self.options.method.name}': changed parameters in place, which cannot be undone; "
                        "change them by run.edit only, and load the pipeline anew"
                    )
        options, processes = self.options, self.accelerator
        training = {
            "num_processes": processes.num_processes,
            "mixed_precision": processes.mixed_precision,
        }
        if options.method.trains:
            train_method = options.weights.train_method
        else:
            train_method = self.family.find_train_method(self.family.denoiser, self.weights.student.keys()) or "full"
        record = Provenance(
            base_model=stored_path(options.model.pretrained_model_name_or_path),
            base_fingerprint=self.base_fingerprint,
            concepts=self.concepts,
            method=options.method.name,
            train_method=train_method,
            arguments={
                **options.recorded,
                **(training if options.method.trains else self._chosen),
                **self.reached,
            },
            revision=options.model.revision,
        )
        return Erasure(self.pipeline, record, self.weights, options.output.output_dir, self.measured)

    @property
    def _chosen(self) -> dict[str, list[str]]:
        """Anchors that a method has chosen, by the option that would give them."""
        names = self.options.recorded.keys() & {"anchor_prompts"}
        return {name: [anchor.strip() for anchor in self.anchors] for name in names if self.anchors is not None}

    def _validation(self, objective: Objective) -> Validation | None:
        """Images of the validation prompts during the training, if there are any."""
        options = self.options
        if not options.validation.validation_prompts:
            return None
        folder = options.output.output_dir
        return Validation(self.accelerator, self.samples, objective.output_weights, folder, options.validation)


def make_samples(pipeline: DiffusionPipeline, weights: TrainedWeights, options: ErasureOptions) -> Samples:
    """The validation prompts; a few of the concepts and of what should stay, if there are none."""
    concepts, retention = options.concept.concepts, options.retention
    prompts = options.validation.validation_prompts
    erased = [prompt for prompt in prompts if any(names_concept(prompt, concept) for concept in concepts)]
    kept = [prompt for prompt in prompts if prompt not in erased]
    if not prompts:
        count = min(len(concepts), MOST_PROMPTS)
        erased = [concepts[i * len(concepts) // count] for i in range(count)]
        kept = [*retention.watch_prompts, *retention.retain_prompts][:MOST_PROMPTS]
    size = options.model.resolution
    steps = options.sampling.num_inference_steps if options.method.trains else GenerationSettings().num_inference_steps
    settings = GenerationSettings(steps, family_of_pipeline(pipeline).guidance_scale, size, size)
    count, seed = options.validation.num_validation_images, options.output.seed
    return Samples(pipeline, weights, erased, kept, count, seed, settings)
