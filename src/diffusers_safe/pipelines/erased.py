"""Pipeline classes that load erased models and can disable the erasure.

They are subclasses of the stock classes, and save a stock repository, which any diffusers user can load, with
`erasure.json`. In addition, they load an erasure in every format in which it can be saved, together with its base
model, and `erasure_disabled` gives back the base model's weights for comparison.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from ..families import TEXT_ENCODERS, ModelFamily, family_of_pipeline
from ..formats import (
    INDEX,
    ErasedWeights,
    assign,
    fetch,
    plain_parameters,
    read_erased_weights,
    rewrite_index,
    stock_class,
    stock_class_name,
    written_aside,
)
from ..hub import erasure_card, find_base, published_record
from ..hub.cards import write_card
from ..loading import HUB_ARGUMENTS, load_pipeline
from ..model_files import read_index
from ..provenance import FILE_NAME, UNKNOWN, Provenance, fingerprint, stored_path
from .repository import RepositoryMixin


class ErasedPipelineMixin(RepositoryMixin):
    """A stock pipeline class with an erasure. Its repository is the stock pipeline's, in safetensors, and
    `erasure.json`."""

    _erasure: Provenance | None = None
    _base: dict[str, Any] | None = None  # how the base model's denoiser is loaded, where that was not needed yet
    _other_values: dict[str, torch.Tensor] | None = None  # of the changed parameters: the base model's
    _erasure_is_off = False

    @classmethod
    def _family(cls) -> type[ModelFamily]:
        return family_of_pipeline(cls)

    @property
    def _denoiser(self) -> torch.nn.Module:
        return getattr(self, self._family().denoiser_name)

    @property
    def erasure(self) -> Provenance | None:
        """What was erased from which model, and how; `None` for a pipeline that was not loaded as an erased one."""
        return self._erasure

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        base_model: str | Path | None = None,
        *,
        base_revision: str | None = None,
        weight_name: str | None = None,
        **kwargs,
    ) -> "ErasedPipelineMixin":
        """Loads an erased model in any format.

        Args:
            source (`str` or `Path`): A file, a folder or a Hub id: a whole erased pipeline, or what
                [`read_erased_weights`] reads.
            base_model (`str` or `Path`, *optional*): Folder or Hub id of the model that the erasure was made from;
                default what `erasure.json` or the file's metadata names. Of a whole pipeline it is loaded, in part,
                when the erasure is first disabled.
            base_revision (`str`, *optional*): Of the base model on the Hub; default the recorded one, for a base model
                that is recorded.
            weight_name (`str`, *optional*): The file of a folder or repository that holds the erasure, if there are
                several.
            kwargs: As of [`~DiffusionPipeline.from_pretrained`]; `revision` is the source's, all else counts for both
                models.

        Raises:
            `ValueError`: If there is no erased model, its base model is not known or not the one that it was made
                from, or a weight does not fit.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        path = fetch(source, weight_name, only_records=True, **hub)
        if (path / INDEX).is_file():
            return cls._from_whole(str(source), path, base_model, base_revision, **kwargs)
        erased = read_erased_weights(fetch(source, weight_name, **hub))
        base = _base_arguments(base_model, base_revision, erased.known, kwargs)
        if base["name"] is None:
            raise ValueError(f"{source}: does not say which model it was made from; give base_model")
        try:
            found = fetch(base["name"], only_records=True, **base["hub"])
        except ValueError as error:
            asked = "; give base_model, where it is" if base_model is None else ""
            raise ValueError(f"base model of {source}: {error}{asked}") from None
        cls._check_index(f"base model of {source}: {base['name']}", found)
        return cls._from_base(base, erased, **kwargs)

    @classmethod
    def _from_whole(
        cls, source: str, path: Path, base_model: str | Path | None, base_revision: str | None, **kwargs
    ) -> "ErasedPipelineMixin":
        cls._check_index(source, path)
        record = Provenance.load(path) if (path / FILE_NAME).is_file() else None
        if record is None and base_model is None:
            raise ValueError(
                f"{source}: has no {FILE_NAME}, so nothing says that anything was erased; "
                "give base_model if it is an erased model"
            )
        pipeline = load_pipeline(source, source, cls, super().from_pretrained, **kwargs)
        known = {} if record is None else vars(record)
        pipeline._base = _base_arguments(base_model, base_revision, known, kwargs)
        pipeline._erasure = record or Provenance(
            base_model=stored_path(str(base_model)), base_fingerprint=None, revision=base_revision, **UNKNOWN
        )
        return pipeline

    @classmethod
    def _from_base(cls, base: dict[str, Any], erased: ErasedWeights, **kwargs) -> "ErasedPipelineMixin":
        # The weights meet in fp32, where fingerprints are taken; a smaller dtype comes last.
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.float32
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        name, default = cls._family().denoiser_name, dtypes.get("default", torch.float32)
        wanted = dtypes.get(name, default)
        dtypes = {**dtypes, "default": default, name: torch.float32}
        kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "variant")}
        options = {"dtype": dtypes, **base["hub"], **base["variant"]}
        pipeline = load_pipeline(
            base["name"], f"base model '{base['name']}'", cls, super().from_pretrained, **{**kwargs, **options}
        )
        denoiser = pipeline._denoiser
        changes, parameters = erased.changes(denoiser), plain_parameters(denoiser)
        pipeline._other_values = {name: parameters[name].detach().to("cpu", copy=True) for name in changes}
        own = erased.known.get("base_fingerprint") or fingerprint(denoiser)
        pipeline._erasure = erased.provenance(base["name"], base["hub"].get("revision"), own)
        assign(denoiser, changes)
        # Not diffusers' own `to`, which warns of modules that want fp32 even where there are none.
        torch.nn.Module.to(denoiser, wanted)
        return pipeline

    @classmethod
    def _check_index(cls, source: str, path: Path) -> None:
        stock = stock_class(cls).__name__
        found = read_index(path, source)["_class_name"]
        if found not in (stock, cls.__name__):
            raise ValueError(f"{source}: a pipeline of class {found}; {cls.__name__} takes {stock}")

    # --- the way back ------------------------------------------------------------------------------------------------

    @contextmanager
    def erasure_disabled(self) -> Iterator[None]:
        """Inside the block the pipeline is the base model; after it the erased weights are back, unchanged.

        Blocks may be nested. Only the changed weights are in memory twice, the ones not in use on the CPU. Of a whole
        pipeline the base model's denoiser is read when the first block is entered.

        Raises:
            `ValueError`: If the base model is not known, not there, or another one than the erasure was made from; or
                its text encoders were erased.
            `RuntimeError`: If the denoiser's weights are not in memory, as with sequential offloading.
        """
        if self._erasure_is_off:
            yield
            return
        if any(parameter.device.type == "meta" for parameter in self._denoiser.parameters()):
            raise RuntimeError(
                "erasure_disabled: the denoiser's weights are not in memory, as with sequential offloading"
            )
        if self._other_values is None:
            self._other_values = self._base_values()
        self._exchange()
        self._erasure_is_off = True
        try:
            yield
        finally:
            self._exchange()
            self._erasure_is_off = False

    def _base_values(self) -> dict[str, torch.Tensor]:
        if self._base is None or self._base["name"] is None:
            raise ValueError("the base model of this pipeline is not known; load it with from_pretrained(base_model=)")
        name, hub = self._base["name"], self._base["hub"]
        if self._erasure.train_method == TEXT_ENCODERS:
            raise ValueError(f"erasure_disabled: the text encoders were erased, not the denoiser; load {name} instead")
        try:
            denoiser = self._family().load_denoiser(name, **hub, **self._base["variant"])
        except ValueError as error:
            raise ValueError(
                f"base model of the erasure: {error}; give base_model to from_pretrained, where it is"
            ) from None
        own, expected = fingerprint(denoiser), self._erasure.base_fingerprint
        if expected not in (None, own):
            raise ValueError(f"base_model {name}: its fingerprint is {own}, the erasure was made from {expected}")
        self._erasure.base_fingerprint = own
        changes = ErasedWeights(dict(denoiser.named_parameters()), "whole", name).changes(self._denoiser)
        return {key: value.cpu() for key, value in changes.items()}

    @torch.no_grad()
    def _exchange(self) -> None:
        """The parameters' values and the others change places, so neither is ever lost."""
        parameters = plain_parameters(self._denoiser)
        if foreign := self._other_values.keys() - parameters.keys():
            raise RuntimeError(
                f"erasure_disabled: the denoiser is not the one that was loaded, it has no {min(foreign)}"
            )
        for name, other in self._other_values.items():
            held = parameters[name].detach().to("cpu", copy=True)
            parameters[name].copy_(other)
            self._other_values[name] = held
        torch.clear_autocast_cache()  # it knows parameters by identity, and their values have just changed

    # --- saving ------------------------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        # Called by `save_pretrained` when all models are written.
        super().save_config(save_directory, push_to_hub, **kwargs)
        rewrite_index(save_directory, stock_class_name(self))

    def _write_repository(self, folder: Path, hub: dict[str, Any], **options) -> Provenance | None:
        if self._erasure is None:
            raise ValueError("nothing is known of an erasure of this pipeline; save it as the stock pipeline it is")
        if self._erasure_is_off:
            raise ValueError("the erasure is disabled; leave the block of erasure_disabled before saving")
        if not options["safe_serialization"]:
            raise ValueError("safe_serialization False: an erased model is saved as safetensors only")
        with written_aside(folder, self._erasure) as aside:
            super()._write_repository(aside, hub, **options)
        if hub["repo_id"] is None:
            return None
        base = find_base(self._erasure.base_model, self._erasure.revision, hub["token"])
        write_card(erasure_card(folder, hub["repo_id"], base), folder)
        return published_record(self._erasure, base)


def _base_arguments(
    base_model: str | Path | None, base_revision: str | None, known: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """How the base model is loaded: `name`, `hub` arguments with its revision, and `variant`."""
    recorded = base_model is None
    name = known.get("base_model") if recorded else str(base_model)
    revision = base_revision or (known.get("revision") if recorded else None)
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs and key != "revision"}
    variant = kwargs.get("variant") or (known.get("arguments", {}).get("variant") if recorded else None)
    return {
        "name": name,
        "hub": {**hub, **({"revision": revision} if revision else {})},
        "variant": {"variant": variant} if variant else {},
    }


class ErasedStableDiffusionPipeline(ErasedPipelineMixin, StableDiffusionPipeline):
    """[`~diffusers.StableDiffusionPipeline`] with concepts erased from its weights.

    ```python
    pipeline = ErasedStableDiffusionPipeline.from_pretrained("user/erased", base_model="user/base")
    print(pipeline.erasure.concepts)
    erased = pipeline("a knife", generator=torch.Generator().manual_seed(0)).images[0]
    with pipeline.erasure_disabled():
        original = pipeline("a knife", generator=torch.Generator().manual_seed(0)).images[0]
    pipeline.push_to_hub("user/no-knives")
    ```
    """


class ErasedStableDiffusionXLPipeline(ErasedPipelineMixin, StableDiffusionXLPipeline):
    """[`~diffusers.StableDiffusionXLPipeline`] with concepts erased from its weights, see
    [`ErasedStableDiffusionPipeline`]."""


class ErasedStableDiffusion3Pipeline(ErasedPipelineMixin, StableDiffusion3Pipeline):
    """[`~diffusers.StableDiffusion3Pipeline`] with concepts erased from its weights, see
    [`ErasedStableDiffusionPipeline`]."""


class ErasedFluxPipeline(ErasedPipelineMixin, FluxPipeline):
    """[`~diffusers.FluxPipeline`] with concepts erased from its weights, see [`ErasedStableDiffusionPipeline`]."""
