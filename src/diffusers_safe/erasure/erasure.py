"""The result of an erasure."""

import html
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..arguments import typed
from ..embedded import locate_model
from ..families import TEXT_ENCODERS, denoiser_of
from ..formats import result_names
from ..hub import push_result
from ..output_folders import RESULT, check_apart, check_output_dir, claimed
from ..provenance import Provenance
from ..training.output import save_result
from ..values import choose
from ..weights.lora import LoRAWeights
from ..weights.trained import TrainedWeights


# The mark of the last erasure of each denoiser.
_marks: "weakref.WeakKeyDictionary[nn.Module, object]" = weakref.WeakKeyDictionary()
# Denoisers whose weights are being changed, or are the base model's for a while.
_busy: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@contextmanager
def alone_with(denoiser: nn.Module) -> Iterator[None]:
    """Refuses a second erasure of a denoiser inside the block.

    Raises:
        `ValueError`: If it is inside such a block already.
    """
    if denoiser in _busy:
        raise ValueError(
            "the pipeline is being erased, or its erasure is disabled at the moment; wait until that ends"
        )
    _busy.add(denoiser)
    try:
        yield
    finally:
        _busy.discard(denoiser)


def was_erased(pipeline: DiffusionPipeline) -> bool:
    """Whether concepts were erased from a loaded pipeline in this process."""
    return denoiser_of(pipeline) in _marks


class Erasure:
    """A pipeline whose concepts were erased, with the record of it.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]): With the erased weights.
        record ([`~diffusers_safe.provenance.Provenance`]): What was done, as in `erasure.json`.
        trained (`TrainedWeights`): Of its denoiser, or its text encoders.
        output_dir (`str`, *optional*): Where it was saved.
        measured (`dict[str, float]`, *optional*): Of a training: `concept_left`, how much of the concepts' effect on
            the prediction is left (1: all, 0: none), and `drift`, how far unrelated prompts moved.

    Attributes:
        weights (`dict[str, torch.Tensor]`): The changed weights by the names of the denoiser's parameters; of a LoRA
            those of its adapters; of text encoders `"text_encoder."` and the parameter's name.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        record: Provenance,
        trained: TrainedWeights,
        output_dir: str | None = None,
        measured: dict[str, float] | None = None,
    ):
        self.pipeline, self.record, self.output_dir = pipeline, record, output_dir
        self.measured = measured or {}
        self._trained, self._is_disabled, self._mark = trained, False, object()
        _marks[denoiser_of(pipeline)] = self._mark

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self._trained.student)

    @property
    def is_lora(self) -> bool:
        """Whether the erasure is a LoRA, which is active in the pipeline."""
        return isinstance(self._trained, LoRAWeights)

    @contextmanager
    def disabled(self) -> Iterator[DiffusionPipeline]:
        """Gives the pipeline the base model's weights inside the block."""
        self._check_enabled()
        if self.is_lora and self._trained.is_fused():
            raise ValueError("the LoRA of the erasure is fused, so it cannot be disabled; call unfuse_lora first")
        with alone_with(denoiser_of(self.pipeline)), self._base_weights():
            self._is_disabled = True
            try:
                yield self.pipeline
            finally:
                self._is_disabled = False

    @contextmanager
    def _base_weights(self) -> Iterator[None]:
        if self.is_lora:
            with self._trained.use("frozen"):
                yield
            return
        parameters = self._trained.student
        erased = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._trained.frozen[name].to(erased[name])
            yield
        finally:
            for name, parameter in parameters.items():  # which may have moved to another device or dtype
                parameter.data = erased[name].to(parameter.data)

    def _check_enabled(self) -> None:
        """
        Raises:
            `ValueError`: If the pipeline does not have this erasure's weights.
        """
        if self._is_disabled:
            raise ValueError("the erasure is disabled here; leave the block of disabled() first")
        if _marks.get(denoiser_of(self.pipeline)) is not self._mark:
            raise ValueError("the pipeline was erased again since; only its last erasure can be saved")
        if self.is_lora and not self._trained.is_in_place():
            raise ValueError(
                "the LoRA of the erasure is not active in the pipeline as it was trained: it was unloaded, disabled "
                "or scaled; undo that first"
            )

    @typed
    def save(self, output_dir: str, form: str | None = None, overwrite: bool = False) -> str:
        """Saves the result with its record, whole or not at all.

        Args:
            output_dir (`str`): The folder; results of others in it are refused.
            form (`str`, *optional*): `"full"`, a stock pipeline folder; `"denoiser"`, its denoiser; `"partial"`, the
                changed weights; `"lora"`, of a LoRA; `"both"`, the full one and the smallest. Default `"full"`, of a
                LoRA `"lora"`.
            overwrite (`bool`, defaults to `False`): Replace another result in the folder.

        Returns:
            `str`: The folder.

        Raises:
            `ValueError`: If there is no such form, the folder holds other results or the base model, or the pipeline
                does not have the erasure's weights.
        """
        allowed = ("lora", "full", "both", "denoiser") if self.is_lora else ("full", "partial", "both", "denoiser")
        if self.record.train_method == TEXT_ENCODERS:
            allowed = ("full",)
        form = choose("form", form, allowed) if form is not None else allowed[0]
        self._check_enabled()
        check_output_dir(output_dir)
        if Path(base := locate_model(self.record.base_model)).is_dir():
            check_apart(output_dir, base, "the base model")
        claim = {"kind": RESULT, "run": {"erasure": self.record.created}, "replaces": result_names(), "at_once": True}
        with claimed(output_dir, **claim, overwrite=overwrite):
            save_result(self.pipeline, self._trained, self.record, output_dir, form)
        self.output_dir = output_dir
        return output_dir

    @typed
    def push(self, hub_model_id: str | None = None, token: str | None = None, private: bool = False) -> str:
        """Publishes the result on the Hugging Face Hub with a model card; see [`~diffusers_safe.hub.push_result`].

        Args:
            hub_model_id (`str`, *optional*): `"user/name"` or a name in the account of the token; default: the name of
                the folder that it was saved in.
            token (`str`, *optional*): Default `HF_TOKEN`, or the one of `hf auth login`.
            private (`bool`, defaults to `False`): Make a new repository private.

        Returns:
            `str`: The repository's URL.

        Raises:
            `ValueError`: If it has no name, or there is no token.
            [`~diffusers_safe.hub.PushError`]: If the Hub cannot be reached or refuses.
        """
        if self.output_dir is not None:
            return push_result(self.output_dir, hub_model_id, token, private)
        if hub_model_id is None:
            raise ValueError("hub_model_id: is missing; the result was not saved, so no folder has a name for it")
        self._check_enabled()
        with tempfile.TemporaryDirectory() as folder:
            save_result(self.pipeline, self._trained, self.record, folder)
            return push_result(Path(folder), hub_model_id, token, private)

    def __repr__(self) -> str:
        changed = sum(value.numel() for value in self._trained.student.values())
        return (
            f"Erasure(concepts={self.record.concepts}, method={self.record.method!r}, "
            f"train_method={self.record.train_method!r}, parameters={changed:,}, output_dir={self.output_dir!r})"
        )

    def _repr_html_(self) -> str:
        changed = sum(value.numel() for value in self._trained.student.values())
        rows = {
            "erased": ", ".join(self.record.concepts),
            "from": self.record.base_model,
            "method": f"{self.record.method}, {self.record.train_method}",
            "changed parameters": f"{changed:,}",
            **{name.replace("_", " "): f"{value:.0%}" for name, value in self.measured.items()},
            "saved in": self.output_dir or "not saved",
        }
        cells = (f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(cells)}</table>"
