"""Pipelines as repositories: folders, on disk or on the Hugging Face Hub; safe ones cannot lose their safety silently.

diffusers writes only a class name for a class from outside, and what it then loads, if anything, does not steer. Here
the index names a `pipeline.py` next to it, which imports the class from this package:

* the class itself loads the folder without running any code of it;
* `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads the class through `pipeline.py`;
* without trust, diffusers' loaders end in an error, not in a pipeline without SLD.

What reads the folders of the models one by one (Modular Diffusers, or a copy without `pipeline.py`) cannot know.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelCardData

from ..formats.folders import rename_entry, result_names, rewrite_index, written_aside
from ..hub import as_published
from ..hub.cards import CARD_NAME, card_on_hub, is_ours, make_card, write_card
from ..output_folders import RESULT, claimed
from ..provenance import Provenance
from .guidance import SAFETY_CONFIGS, SafetyConfig
from .output import StableDiffusionSafePipelineOutput
from .safe_latent_diffusion import SafeLatentDiffusionMixin, check_concept, check_either, check_known


_MODULE = "pipeline"  # the file that diffusers looks for


class RepositoryMixin:
    """A pipeline class whose folder is a whole repository, written and pushed as one."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        # diffusers reads every index through this. A class of ours needs neither `pipeline.py` nor trust.
        index = super()._dict_from_json_file(json_file)
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][-1]
        return {name: rename_entry(entry) for name, entry in index.items()}

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        overwrite: bool = False,
        **kwargs,
    ) -> CommitInfo | None:
        """Writes a whole repository, as the class describes it.

        Args:
            save_directory (`str` or `Path`): A folder, made if need be.
            safe_serialization (`bool`, defaults to `True`): safetensors instead of pickles.
            variant (`str`, *optional*): Put into the file names of the weights, such as `"fp16"`.
            max_shard_size (`int` or `str`, *optional*): Largest size of a weight file, such as `"5GB"`.
            overwrite (`bool`, defaults to `False`): Replace other results than an earlier save of this class: files
                that this package wrote are deleted, others in the way are moved to `.replaced-1`.
            push_to_hub (`bool`, defaults to `False`): Also upload the folder, but for hidden files and for what paths
                of this machine its files hold. `repo_id` (default the folder's name), `commit_message`, `private`,
                `token`, `create_pr` and `subfolder` then say how, and the commit is returned.

        Raises:
            `ValueError`: If the folder holds another result, cannot be written, or another run is at work there.
        """
        names = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
        hub = {name: kwargs.pop(name, None) for name in names}
        folder = Path(save_directory)
        api = HfApi(token=hub["token"])
        if push_to_hub:
            name = hub["repo_id"] or folder.resolve().name
            hub["repo_id"] = api.create_repo(name, private=hub["private"], exist_ok=True).repo_id
        else:
            hub["repo_id"] = None
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        run, parts = {"saved": type(self).__name__}, (*result_names(), f"{_MODULE}.py")
        with claimed(folder, RESULT, run, continues=parts, overwrite=overwrite):
            record = self._write_repository(folder, hub, **options, **kwargs)
            return self._commit(api, folder, hub, record) if push_to_hub else None

    def _commit(self, api: HfApi, folder: Path, hub: dict[str, Any], record: Provenance | None) -> CommitInfo:
        paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
        there = card_on_hub(hub["repo_id"], hub["token"], hub["subfolder"])
        if there is not None and not is_ours(there):
            names.remove(CARD_NAME)
        place = f"{hub['subfolder']}/" if hub["subfolder"] else ""
        with as_published(folder, names, record) as files:
            return api.create_commit(
                hub["repo_id"],
                [CommitOperationAdd(f"{place}{name}", path) for name, path in files.items()],
                commit_message=hub["commit_message"] or f"Upload {type(self).__name__}",
                create_pr=bool(hub["create_pr"]),
            )

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> CommitInfo:
        """Uploads what `save_pretrained` writes, and returns the commit.

        Args:
            repo_id (`str`): `"user/name"`; made if need be.
            commit_message (`str`, *optional*): Default "Upload <class>".
            private (`bool`, *optional*): Whether a new repository is private; default the user's setting.
            token (`str`, *optional*): Default the one of `hf auth login`.
            create_pr (`bool`, defaults to `False`): Open a pull request instead.
            safe_serialization (`bool`, defaults to `True`): safetensors instead of pickles.
            variant (`str`, *optional*): Put into the file names of the weights, such as `"fp16"`.
            subfolder (`str`, *optional*): Of the repository; default its top.
        """
        hub = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        hub["subfolder"] = subfolder
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(folder, safe_serialization, variant, push_to_hub=True, repo_id=repo_id, **hub)

    def _write_repository(self, folder: Path, hub: dict[str, Any], **options) -> Provenance | None:
        """Writes all files; `hub` has `repo_id`, `None` for a folder that stays here, and how it will be pushed.
        Returns the record of an erasure as it is published, if there is one."""
        super().save_pretrained(str(folder), **options)
        return None


class SafePipelineMixin(RepositoryMixin, SafeLatentDiffusionMixin):
    """A safe pipeline class: its safety concept is part of its config. Its repository holds the models, the index,
    `pipeline.py`, and a model card, unless there is one by another hand, in the folder or on the Hub."""

    _card_tags: tuple[str, ...] = ()
    _card_example = 'pipeline("a portrait", **SafetyConfig.MAX)'

    @property
    def safety_concept(self) -> str:
        """What every call steers away from, unless it says otherwise. Saved with the pipeline."""
        return self.config.safety_concept

    @safety_concept.setter
    def safety_concept(self, concept: str) -> None:
        self.register_to_config(safety_concept=check_concept(concept))

    def _call_with_concept(self, call: Callable, arguments: dict[str, Any]) -> tuple[Any, str | None]:
        """`_call_safely` for a `__call__` with all its arguments."""
        arguments |= check_known(self, arguments.pop("kwargs", {}))
        config = SafetyConfig(**{name: arguments.pop(name) for name in SafetyConfig().keys()})
        concept = arguments.pop("safety_concept")
        embeds, pooled = (arguments.pop(f"safety_{name}", None) for name in ("prompt_embeds", "pooled_prompt_embeds"))
        check_either(concept, embeds, pooled)
        concept = self.safety_concept if concept is None else concept
        return self._call_safely(call, arguments, config, concept, embeds, pooled)

    def _generate(self, call: Callable, arguments: dict[str, Any]) -> StableDiffusionSafePipelineOutput | tuple:
        """Runs the stock `call` with these arguments, for pipelines without a safety checker."""
        return_dict = arguments["return_dict"]
        (images,), applied = self._call_with_concept(call, {**arguments, "return_dict": False})
        output = StableDiffusionSafePipelineOutput(images, None, applied, None)
        return output if return_dict else (images, None, applied, None)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        # Called by `save_pretrained` when all models are written.
        super().save_config(save_directory, push_to_hub, **kwargs)
        # A user's subclass is not in this package: the class that can be loaded is the one that it extends.
        name = _class_name(self)
        rewrite_index(save_directory, [_MODULE, name])
        code = f'from diffusers_safe import {name}\n\n\n__all__ = ["{name}"]\n'
        (Path(save_directory) / f"{_MODULE}.py").write_text(code)

    def _write_repository(self, folder: Path, hub: dict[str, Any], **options) -> Provenance | None:
        with written_aside(folder) as aside:
            record = super()._write_repository(aside, hub, **options)
        write_card(safe_pipeline_card(self, hub["repo_id"]), folder)
        return record


def _class_name(pipeline: SafePipelineMixin) -> str:
    """Of the pipeline's class, or of the nearest one above it that is of this package."""
    return next(cls.__name__ for cls in type(pipeline).__mro__ if cls.__module__.startswith(__package__))


def _is_safe_repository(repo_id: str) -> bool:
    try:
        return "safety_concept" in DiffusionPipeline.load_config(repo_id, local_files_only=True)
    except (OSError, ValueError):
        return False


def safe_pipeline_card(pipeline: SafePipelineMixin, repo_id: str | None = None) -> ModelCard:
    """The model card of a safe pipeline: how to load it, what it steers away from, and what that cannot do."""
    name, source = _class_name(pipeline), repo_id or "path/to/this/folder"
    base = str(pipeline.config.get("_name_or_path") or "")
    is_hub_id = base.count("/") == 1 and not Path(base).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=pipeline._card_tags[0],
        base_model=base if is_hub_id and base != repo_id and not _is_safe_repository(base) else None,
        tags=["safe-latent-diffusion", "diffusers-safe", *pipeline._card_tags[1:]],
    )
    presets = "\n".join(
        f"| `SafetyConfig.{preset.upper()}` | {' | '.join(f'{value:g}' for value in dict(config).values())} |"
        for preset, config in SAFETY_CONFIGS.items()
    )
    columns = list(dict(SAFETY_CONFIGS["medium"]))
    return make_card(
        data,
        _CARD_TEXT.format(
            name=name,
            source=source,
            concept="\n".join(f"> {line}" for line in pipeline.safety_concept.splitlines()),
            columns=" | ".join(f"`{column}`" for column in columns),
            rules="|".join("---" for _ in columns),
            presets=presets,
            example=pipeline._card_example,
        ),
    )


_CARD_TEXT = """# {name}

This pipeline steers away from a safety concept while it generates: Safe Latent Diffusion (SLD, Schramowski et al.,
CVPR 2023, [arXiv 2211.05105](https://arxiv.org/abs/2211.05105)). SLD changes no weights: they are those of the model
that it was made from.

```python
from diffusers_safe import SafetyConfig, {name}  # pip install diffusers-safe

pipeline = {name}.from_pretrained("{source}")
result = {example}
result.images[0], result.applied_safety_concept
```

`DiffusionPipeline.from_pretrained("{source}", trust_remote_code=True)` loads the same class (it runs `pipeline.py`,
which imports it from `diffusers_safe`). Without trust it raises an error instead of dropping the safety silently.

## Safety concept

{concept}

Change it with `pipeline.safety_concept = "..."` (saved) or `pipeline(..., safety_concept="...")` (one call).

## How strongly

The default is `SafetyConfig.MEDIUM`.

| | {columns} |
|---|{rules}|
{presets}

## Intended use and limits

For making unwanted content less likely in the output of a model that can produce it. It is no guarantee: content that
the concept's words do not cover, and prompts made to get around it, still get through, and stronger settings change
harmless images too. Whoever has the weights can switch it off. It does not work without classifier-free guidance
(`guidance_scale` 1); the pipeline warns then, and `applied_safety_concept` is `None`.
"""
