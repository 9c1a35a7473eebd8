"""Erasures as LoRAs (Hu et al., arXiv 2106.09685): a diffusers file to a difference of weights, and back.

A LoRA adds `scale * B @ A` to the weight of a linear or convolution layer (of a convolution, to its weight as a
matrix, `(out, in * height * width)`), and, where it has one, `scale * b` to its bias.
"""

import functools
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from torch import nn

from ..families import ModelFamily, denoiser_names, families, family_of_denoiser, family_of_names
from ..model_files import describe_weights, read_json_object


logger = logging.getLogger(__name__)
_PEFT = "base_model.model."
_ADAPTER = re.compile(r"\.lora_([AB])\.[^.]+\.(?=weight|bias)")  # peft's names with the adapter's in them
_TEXT_ROOTS = ("text_model.", "encoder.layers.")
_RELATIVES = ("hada_", "lokr_", "oft_", "dora_scale", "lora_mid", "lora_magnitude_vector")
_LAYERS = (nn.Linear, nn.Conv2d)  # that a LoRA can change
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<which>A\.weight|B\.weight|B\.bias)")
_MATRIX = re.compile(r"(?P<layer>.+[._]lora[._])(?P<which>A|B|down|up)\.weight")
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
_UP = re.compile(r"(?P<layer>.+?)(\.lora_up|\.lora_B|[._]lora\.up)\.weight")


def is_lora(names: list[str]) -> bool:
    return any(".lora" in name or "_lora" in name for name in names)


def plain_names(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA by names that diffusers reads, with the scales of kohya-ss (alphas) and of peft as part of
    them: diffusers loses alphas that differ between layers, and peft's own files name neither the component nor the
    scale, which is in an `adapter_config.json` in their folder.

    Raises:
        `ValueError`: If it is a relative of LoRA that changes weights in another way, a matrix has no partner, or a
            value is not a finite number.
    """
    if any(part in name for name in tensors for part in _RELATIVES):
        raise ValueError(f"{describe_weights(list(tensors))}: only plain LoRAs can be read")
    renamed = {}
    for name, value in tensors.items():
        plain = _ADAPTER.sub(r".lora_\1.", name.removeprefix(_PEFT))
        if (family := family_of_names([plain])) is not None:
            plain = f"{family.denoiser_name}.{plain}"
        elif plain.startswith(_TEXT_ROOTS):
            plain = f"text_encoder.{plain}"
        if plain in renamed:
            raise ValueError(f"{name}: is there twice, by two names")
        renamed[plain] = value
    renamed = _without_alphas(renamed)
    _check_pairs(renamed)
    if not any(name.startswith(_PEFT) for name in tensors):
        return renamed
    path = folder / "adapter_config.json"
    if not path.is_file():
        _warn_of_no_config(path)
        return renamed
    config = read_json_object(path)
    _check_config(config, str(path))
    ranks = {name: value.shape[0] for name, value in renamed.items() if ".lora_A." in name}
    for name, rank in ranks.items():
        layer = _without_component(name).partition(".lora_A.")[0]
        other = name.replace(".lora_A.", ".lora_B.")
        if other in renamed:
            renamed[other] = renamed[other] * (_alpha(config, layer, rank) / rank)
    return renamed


def _check_pairs(tensors: dict[str, torch.Tensor]) -> None:
    matches = {name: match for name in tensors if (match := _MATRIX.fullmatch(name))}
    others = {name: f"{match['layer']}{_OTHER[match['which']]}.weight" for name, match in matches.items()}
    if alone := [name for name in others if others[name] not in others]:
        raise ValueError(
            f"{len(alone)} of its {len(others)} matrices have no partner: {others[alone[0]]} is missing, which "
            f"{alone[0]} is multiplied with"
        )
    for name, value in tensors.items():
        if not (value.is_floating_point() and value.float().isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite numbers")
        if name in matches and matches[name]["which"] in ("A", "down"):
            down, up = value.shape, tensors[others[name]].shape
            if len(down) < 2 or len(up) < 2 or down[0] != up[1] or not down[0]:
                raise ValueError(f"{name} {tuple(down)} and {others[name]} {tuple(up)} do not make a pair")


@functools.cache  # a file is read several times
def _warn_of_no_config(path: Path) -> None:
    logger.warning("no %s next to the LoRA: its alpha is not known, and is taken for its rank", path.name)


def _without_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    alphas = {name.removesuffix(".alpha"): value for name, value in tensors.items() if name.endswith(".alpha")}
    if odd := [layer for layer, alpha in alphas.items() if alpha.numel() != 1]:
        raise ValueError(f"{odd[0]}.alpha: has shape {tuple(alphas[odd[0]].shape)}; one number is needed")
    kept = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    for name, value in kept.items():
        if (match := _UP.fullmatch(name)) and match["layer"] in alphas and value.ndim > 1:
            kept[name] = value * (alphas.pop(match["layer"]).item() / value.shape[1])
    if alphas:
        raise ValueError(f"{next(iter(alphas))}.alpha: has no matrices")
    return kept


def by_module_names(differences: dict[str, torch.Tensor], denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Differences by the names of a denoiser's parameters, where kohya-ss' scripts have `_` for `.` in these or in the
    names that its authors have for them."""
    family, plain = family_of_denoiser(denoiser), getattr(denoiser, "_orig_mod", denoiser)
    pairs = [*((name, name) for name, _ in plain.named_modules()), *family.original_layers(plain).items()]
    names = {f"{family.kohya_name(written)}.weight": f"{name}.weight" for name, written in pairs}
    return {names.get(name, name): value for name, value in differences.items()}


def kohya_tensors(lora: "LoRA", denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA by the names that ComfyUI and A1111 read: `lora_down`, `lora_up`, `alpha` of each layer.

    A reader multiplies by `alpha / rank`, with the rank of the layer. Diffusers' own keeps one alpha for all layers,
    so there is one, the largest rank, and `lora_up` makes up for smaller ranks.

    Raises:
        `ValueError`: If these programs do not know a layer, or there is a bias.
    """
    names = family_of_denoiser(denoiser).kohya_layers(denoiser)
    tensors = {}
    for name, value in lora.tensors.items():
        match = _FACTOR.fullmatch(_without_component(name))
        if (layer := match["layer"]) not in names:
            raise ValueError(f"{layer}: ComfyUI and A1111 know no such layer; use another format")
        if match["which"] == "A.weight":
            tensors[f"{names[layer]}.lora_down.weight"] = value
        elif match["which"] == "B.weight":
            tensors[f"{names[layer]}.lora_up.weight"] = value * (value.shape[1] / lora.rank)
            tensors[f"{names[layer]}.alpha"] = torch.tensor(float(lora.rank))
        else:
            raise ValueError(f"{layer}: ComfyUI and A1111 read no biases of a LoRA")
    return tensors


def read_differences(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], folder: Path = Path()
) -> dict[str, torch.Tensor]:
    """What a LoRA adds to a denoiser's parameters, by their names; of kohya-ss' names see [`by_module_names`]; fp32.

    Args:
        tensors (`dict[str, torch.Tensor]`): Of the file; peft's names (`lora_A`, `lora_B`), diffusers' older ones, or
            those of kohya-ss.
        metadata (`dict[str, str]`): Of the file; may hold diffusers' `lora_adapter_metadata`.
        folder (`Path`, *optional*): Where the file is, for the `adapter_config.json` of peft.

    Raises:
        `ValueError`: If there is a weight of something else than the denoiser, or anything but pairs of matrices.
    """
    tensors = plain_names(tensors, folder)
    matching = (family for family in families() if any(_is_of(family, name) for name in tensors))
    family = next(matching, families()[0])
    for name in tensors:
        if not _is_of(family, name):
            raise ValueError(
                f"{name}: changes another component than the denoiser ({family.denoiser_name}); an erasure that is "
                "read is the denoiser's alone (generate and evaluate take the whole LoRA, as --lora)"
            )
    tensors = {name.removeprefix(f"{family.denoiser_name}."): value.float() for name, value in tensors.items()}
    tensors = {_factor_name(name, family): value for name, value in tensors.items()}
    if not any(".lora_A." in name for name in tensors):
        tensors = family.rename_lora(tensors)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{name}: not a matrix of a plain LoRA (lora_A.weight, lora_B.weight, lora_B.bias)")
        layers.setdefault(match["layer"], {})[match["which"]] = value
    config = _adapter_config(metadata)
    differences = {}
    for layer, factors in layers.items():
        if "A.weight" not in factors:
            raise ValueError(f"{layer}: a bias without matrices")
        down, up = factors["A.weight"], factors["B.weight"]
        scale = _alpha(config, layer, down.shape[0]) / down.shape[0]
        product = up.flatten(1) @ down.flatten(1)
        differences[f"{layer}.weight"] = scale * product.reshape(up.shape[0], *down.shape[1:])
        if "B.bias" in factors:
            differences[f"{layer}.bias"] = scale * factors["B.bias"]
    # A file with biases has one for each layer, 0 for layers without.
    return {name: value for name, value in differences.items() if not name.endswith(".bias") or value.any()}


def largest_rank(tensors: dict[str, torch.Tensor]) -> int | None:
    """The largest rank among the pairs of matrices of a LoRA file."""
    matches = {name: _MATRIX.fullmatch(_ADAPTER.sub(r".lora_\1.", name)) for name in tensors}
    downs = [tensors[name] for name, match in matches.items() if match and match["which"] in ("A", "down")]
    return max((down.shape[0] for down in downs), default=None)


def _adapter_config(metadata: dict[str, str]) -> dict:
    raw = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if not raw:
        return {}
    try:
        config = {_without_component(name): value for name, value in json.loads(raw).items()}
    except (json.JSONDecodeError, AttributeError, RecursionError):
        raise ValueError(f"metadata {LORA_ADAPTER_METADATA_KEY}: not a JSON object") from None
    _check_config(config, f"metadata {LORA_ADAPTER_METADATA_KEY}")
    return config


def _check_config(config: dict, what: str) -> None:
    if odd := [name for name in ("use_dora", "use_rslora") if config.get(name)]:
        raise ValueError(f"{what}: {odd[0]} is not supported")
    if not isinstance(patterns := config.get("alpha_pattern") or {}, dict):
        raise ValueError(f"{what}: alpha_pattern {str(patterns)[:60]}: must be an object")
    for name, alpha in {**patterns, "lora_alpha": config.get("lora_alpha", 1)}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise ValueError(f"{what}: {name} {str(alpha)[:60]!r}: must be a number")


def _is_of(family: type[ModelFamily], name: str) -> bool:
    return name.startswith((f"{family.denoiser_name}.", family.kohya_prefix))


def _without_component(name: str) -> str:
    component, _, rest = name.partition(".")
    return rest if component in denoiser_names() else name


def _factor_name(name: str, family: type[ModelFamily]) -> str:
    if not name.startswith(family.kohya_prefix):
        return name
    return name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


def _alpha(config: dict, layer: str, rank: int) -> float:
    """As peft would: the layer's own alpha, or the config's, or, without a config, the rank."""
    patterns = config.get("alpha_pattern") or {}
    return patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank))


@dataclass(frozen=True)
class LoRA:
    """A LoRA of given rank next to a difference of weights.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): As stock `load_lora_weights` reads them.
        rank (`int`): Largest rank of a layer.
        error (`float`): Relative Frobenius error over all changed parameters: 0 is exact, 1 is no erasure at all.
        errors (`dict[str, float]`): The same of each changed parameter.
        left_out (`list[str]`): Changed parameters that the LoRA does not hold at all.
        lost (`float`): The part of the change that is in these (ratio of Frobenius norms).
    """

    tensors: dict[str, torch.Tensor]
    rank: int
    error: float
    errors: dict[str, float]
    left_out: list[str]
    lost: float

    @property
    def worst(self) -> str:
        """The name of the parameter with the largest error among those that the LoRA holds."""
        held = [name for name in self.errors if name not in self.left_out]
        return max(held, key=self.errors.get)

    def report(self) -> dict:
        """What is recorded with the facts of the erasure."""
        worst = {"parameter": self.worst, "error": self.errors[self.worst]}
        return {"rank": self.rank, "error": self.error, "worst": worst, "left_out": self.left_out, "lost": self.lost}


def full_rank(denoiser: nn.Module, erased: dict[str, torch.Tensor]) -> int:
    """The least rank with which a LoRA holds any change of these weights exactly; arguments as of [`low_rank`]."""
    modules = dict(denoiser.named_modules())
    weights = [value.flatten(1) for name, value in erased.items()
               if name.endswith(".weight") and isinstance(modules[name.removesuffix(".weight")], _LAYERS)]  # fmt: skip
    return max((min(weight.shape) for weight in weights), default=1)


@torch.no_grad()
def low_rank(
    denoiser: nn.Module,
    erased: dict[str, torch.Tensor],
    rank: int,
    only_weights: bool = False,
    biases: bool = False,
    component: str | None = None,
) -> LoRA:
    """The best LoRA of a rank for the difference between erased weights and a base model's (Eckart and Young, 1936).

    Weights of linear and convolution layers become pairs of matrices. Biases of these layers are left out, so that
    every program reads the LoRA and `fuse_lora` can fuse it; or, with `biases`, they are held exactly (`lora_B.bias`,
    which diffusers and peft load). Nothing in a LoRA can hold a norm's parameters. What is left out counts in `error`.

    Args:
        denoiser (`nn.Module`): The base model's.
        erased (`dict[str, torch.Tensor]`): The changed parameters, by name.
        rank (`int`): From 1 to [`full_rank`]; a layer's own full rank is enough where that is less.
        only_weights (`bool`, defaults to `False`): Leave out changed norms, too.
        biases (`bool`, defaults to `False`): Hold changed biases.
        component (`str`, *optional*): The denoiser's name in the pipeline, which begins the names of the tensors; its
            family's by default.

    Raises:
        `ValueError`: If the rank is out of its range, a norm is changed and `only_weights` is not given, or no changed
            parameter can be held.
    """
    modules, parameters = dict(denoiser.named_modules()), dict(denoiser.named_parameters())
    differences = {name: value.double().cpu() - parameters[name].double().cpu() for name, value in erased.items()}
    sizes = {name: value.norm().item() for name, value in differences.items()}
    total = sum(size**2 for size in sizes.values()) ** 0.5
    layers: dict[str, dict[str, torch.Tensor]] = {}
    left_out, never = [], []
    for name, value in differences.items():
        layer, _, kind = name.rpartition(".")
        if not isinstance(modules[layer], _LAYERS):
            never.append(name)
        elif kind == "bias" and not biases:
            left_out.append(name)
        else:
            layers.setdefault(layer, {})[kind] = value
    if never and not only_weights:
        lost = sum(sizes[name] ** 2 for name in never) ** 0.5 / total
        raise ValueError(
            f"a LoRA cannot hold {never[0]}{f' and {len(never) - 1} more' if never[1:] else ''}: "
            f"{lost:.1%} of the change would be lost; allow it with --only_weights, or use another format"
        )
    if not layers:
        asked = "; --biases stores biases" if left_out else ""
        left_out += never
        raise ValueError(
            f"a LoRA cannot hold any of the {len(left_out)} changed parameters, such as {left_out[0]}{asked}"
        )
    left_out += never
    lost = sum(sizes[name] ** 2 for name in left_out) ** 0.5 / total
    most = full_rank(denoiser, erased)
    if not 1 <= rank <= most:
        raise ValueError(f"rank {rank}: must be from 1 to {most}, with which a LoRA holds this change exactly")
    with_bias = any("bias" in parts for parts in layers.values())
    prefix = f"{component or family_of_denoiser(denoiser).denoiser_name}."
    tensors, squares, largest = {}, {name: sizes[name] ** 2 for name in left_out}, 0
    for layer, parts in layers.items():
        weight = modules[layer].weight
        change = parts.get("weight", torch.zeros(weight.shape, dtype=torch.double))
        factors = _factors(change.flatten(1), rank if "weight" in parts else 1)
        up, down = (factor.float() for factor in factors)
        largest = max(largest, len(down))
        tensors[f"{prefix}{layer}.lora_A.weight"] = down.reshape(-1, *weight.shape[1:])
        tensors[f"{prefix}{layer}.lora_B.weight"] = up.reshape(*up.shape, *(1 for _ in weight.shape[2:]))
        if "weight" in parts:
            rest = change.flatten(1) - up.double() @ down.double()
            squares[f"{layer}.weight"] = rest.norm().item() ** 2
        if with_bias:  # peft has a bias in every layer or in none
            bias = parts.get("bias", torch.zeros(weight.shape[0], dtype=torch.double)).float()
            tensors[f"{prefix}{layer}.lora_B.bias"] = bias
            if "bias" in parts:
                squares[f"{layer}.bias"] = (parts["bias"] - bias).norm().item() ** 2
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    errors = {name: square**0.5 / (sizes[name] or 1) for name, square in squares.items()}
    return LoRA(tensors, largest, sum(squares.values()) ** 0.5 / total, errors, left_out, lost)


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`B (out, r)` and `A (r, in)` whose product is the best of that rank, of about the same length each, so that both
    survive half precision.

    The singular vectors of the smaller side are the eigenvectors of its Gram matrix: on an SD convolution this takes a
    twentieth of the time of `torch.linalg.svd`, and in fp64 what squaring loses is below fp32.
    """
    if matrix.shape[0] > matrix.shape[1]:
        up, down = _factors(matrix.T, rank)
        return down.T, up.T
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    down = vectors.T @ matrix
    balance = down.norm(dim=1).clamp_min(1e-12).sqrt()
    return vectors * balance, down / balance[:, None]
