"""Students: UNets with some of the teacher's blocks, initialised with its weights.

What is published of each, and what is not:

* bk-base, bk-small, bk-tiny: Kim et al., BK-SDM, ECCV 2024 (arXiv 2305.15798). The authors' code has the configs, and
  says which block of the teacher each of the student's is. Segmind's distill-sd calls base sd_small and tiny sd_tiny.
* koala-1b, koala-700m: Lee et al., NeurIPS 2024 (arXiv 2312.04005). The published models have a pair of blocks less on
  every level, and 6 or 5 of 10 transformer layers; 700M has no middle block. Which weights they began with is in no
  published code. Here it is the pairs of BK-SDM, whose authors KOALA's acknowledge, and the first layers.
* ssd-1b, segmind-vega: Gupta et al., 2024 (arXiv 2401.02677). The shapes are those of the published models, and no
  published code says which layers were kept. A comparison of SSD-1B's weights with SDXL's by cosine similarity
  (huggingface.co/furusu/SSD-1B-anime) finds layers 0, 1, 2 and 6 where 4 of 10 are left, and the first where 1 of 2
  is; of the middle block there is the first residual block. That is copied here. Of Vega no such comparison is known;
  here it is the first layers.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from ..arguments import typed
from ..values import choose


@dataclass(frozen=True)
class Student:
    """How a student differs from its teacher.

    Attributes:
        description (`str`): What is taken out.
        teacher (`dict[str, Any]`): What the teacher's config must say.
        changes (`dict[str, Any]`): What the student's config says instead.
        removed_levels (`int`): Deepest levels that are gone.
        kept_layers (`dict[str, tuple[int, ...]]`): The teacher's transformer layers that are kept, by the name of the
            attention; elsewhere the first ones.
    """

    description: str
    teacher: dict[str, Any]
    changes: dict[str, Any]
    removed_levels: int = 0
    kept_layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def teacher_name(self, name: str) -> str:
        """The teacher's name for a module or parameter of the student."""
        parts = name.split(".")
        block, place = parts[0], ".".join(parts[:4])
        if block == "up_blocks":
            parts[1] = str(int(parts[1]) + self.removed_levels)
            if self.changes.get("layers_per_block") == 1 and parts[2:4] in (["resnets", "1"], ["attentions", "1"]):
                parts[3] = "2"  # the middle one of three goes: only the last fits the skip from the level above
        if place in self.kept_layers and parts[4:5] == ["transformer_blocks"] and len(parts) > 5:
            parts[5] = str(self.kept_layers[place][int(parts[5])])
        return ".".join(parts)

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """What in a complete config keeps a UNet from being the teacher; `None` if nothing does."""
        if (kind := config.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
            return f"is a {kind}, not a UNet2DConditionModel"
        levels = len(config["block_out_channels"])
        for name, needed in self.teacher.items():
            if _as_tuple(config[name]) not in (needed, (needed,) * levels):
                return f"has {name} {_as_tuple(config[name])}, not {needed}"
        channels = config["block_out_channels"][-2:]
        if self.removed_levels and channels[0] != channels[1]:
            return f"has block_out_channels {config['block_out_channels']}, the last two not equal"
        return None


_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_WHOLE = {
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "reverse_transformer_layers_per_block": None,
}
_SD = {
    "down_block_types": (_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP),
    **_WHOLE,
}
_SDXL = {
    "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN),
    "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    **_WHOLE,
}
_SSD_1B_ATTENTIONS = [f"{block}.attentions.{place}" for block in ("down_blocks.2", "up_blocks.0") for place in (0, 1)]

STUDENTS: dict[str, Student] = {
    "bk-base": Student("a pair of blocks on every level, down and up", _SD, {"layers_per_block": 1}),
    "bk-small": Student("the same, and the middle block", _SD, {"layers_per_block": 1, "mid_block_type": None}),
    "bk-tiny": Student(
        "the same, and the deepest level", _SD, {"layers_per_block": 1, "mid_block_type": None}, removed_levels=1
    ),
    "ssd-1b": Student(
        "36 of 70 transformer layers, and of the middle block all but a residual block",
        _SDXL,
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": (1, 2, 4),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        },
        kept_layers=dict.fromkeys(_SSD_1B_ATTENTIONS, (0, 1, 2, 6)),
    ),
    "koala-1b": Student(
        "a pair of blocks on every level, and 4 of 10 transformer layers",
        _SDXL,
        {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)},
    ),
    "koala-700m": Student(
        "a pair of blocks on every level, 5 of 10 transformer layers, and the middle block",
        _SDXL,
        {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None},
    ),
    "segmind-vega": Student(
        "1 of each 2 and 8 of each 10 transformer layers; of the middle block all but one residual block",
        _SDXL,
        {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": (1, 1, 2)},
    ),
}
ALIASES = {"sd_small": "bk-base", "sd_tiny": "bk-tiny"}
# Configs of published teachers, where they are not diffusers' defaults.
TEACHER_CONFIGS: dict[str, dict[str, Any]] = {
    "sd-1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "sd-2": {
        "sample_size": 64,  # of 2.1-base; 96 of 2.1
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": _SDXL["down_block_types"],
        "up_block_types": _SDXL["up_block_types"],
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Where a config may have a value for each level, from the shallowest to the deepest.
_BY_LEVEL = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)


def resolve_student(kind: str) -> str:
    """The name in `STUDENTS` of a student or of its alias.

    Raises:
        `ValueError`: If the name is unknown.
    """
    name = choose("student", kind, [*STUDENTS, *ALIASES])
    return ALIASES.get(name, name)


def fitting_students(config: Mapping[str, Any]) -> list[str]:
    """The names of the students that a UNet with this config can teach; empty if there are none."""
    complete = _complete(config)
    return [name for name, student in STUDENTS.items() if student.misfit(complete) is None]


def student_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The config of a student, for `UNet2DConditionModel.from_config`.

    Args:
        config (`Mapping[str, Any]`): The teacher's, of a loaded model or from its JSON file.
        kind (`str`): A name of `STUDENTS`, or an alias.

    Raises:
        `ValueError`: If the kind is unknown or does not fit the teacher.
    """
    name, complete = resolve_student(kind), _complete(config)
    student = STUDENTS[name]
    if misfit := student.misfit(complete):
        fitting = ", ".join(fitting_students(config)) or "none"
        raise ValueError(f"student '{kind}': this UNet {misfit}; students that fit it: {fitting}")
    # What begins with an underscore is the teacher's own: its class, its version, its path.
    changed = {key: value for key, value in complete.items() if not key.startswith("_")} | student.changes
    if levels := student.removed_levels:
        by_level = {key: changed[key] for key in _BY_LEVEL if isinstance(changed[key], (list, tuple))}
        changed |= {key: value[:-levels] for key, value in by_level.items()}
        changed["up_block_types"] = changed["up_block_types"][levels:]
    return changed


def block_map(config: Mapping[str, Any], kind: str) -> dict[str, str]:
    """The student's blocks (`down_blocks.0`, `mid_block`, ...) and the teacher's that each comes from.

    The arguments and errors are those of [`student_config`].
    """
    changed = student_config(config, kind)
    down, up = ([f"{side}_blocks.{i}" for i in range(len(changed["down_block_types"]))] for side in ("down", "up"))
    return _from_teacher([*down, *(["mid_block"] if changed["mid_block_type"] else []), *up], kind)


def parameter_map(config: Mapping[str, Any], kind: str) -> dict[str, str]:
    """The student's parameters and the teacher's that each is a copy of, by name.

    For the names of modules between blocks and parameters there is `STUDENTS[kind].teacher_name`. The arguments and
    errors are those of [`student_config`].
    """
    return _from_teacher((name for name, _ in empty_student(config, kind).named_parameters()), kind)


def _from_teacher(names: Iterable[str], kind: str) -> dict[str, str]:
    student = STUDENTS[resolve_student(kind)]
    return {name: student.teacher_name(name) for name in names}


@typed
def build_student(unet: UNet2DConditionModel, kind: str) -> UNet2DConditionModel:
    """Builds a smaller UNet with copies of the teacher's weights; a stock model, saved and loaded as any other.

    Its images are not usable before it is trained: layers after a removed block get inputs that they do not know.

    Args:
        unet (`UNet2DConditionModel`): The teacher, which stays as it is; on any device, meta too, of any dtype, which
            are the student's, too.
        kind (`str`): A name of `STUDENTS`, or an alias. bk-small, bk-tiny and koala-700m have no middle block, and
            `ControlNetModel.from_unet` takes no such UNet ("unknown mid_block_type : None").

    Raises:
        `ValueError`: If the kind is unknown or does not fit the teacher, or the teacher is no UNet or has adapters.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"the teacher is a {type(unet).__name__}; a UNet2DConditionModel is needed")
    if present := list(getattr(unet, "peft_config", {})):
        raise ValueError(f"the teacher has adapters ({', '.join(present)}); fuse or unload them first")
    student = empty_student(unet.config, kind)
    names, weights = _from_teacher(student.state_dict(), kind), unet.state_dict()
    student.load_state_dict({name: weights[source].clone() for name, source in names.items()}, assign=True)
    return student.train(unet.training)


def empty_student(config: Mapping[str, Any], kind: str) -> UNet2DConditionModel:
    """A student's structure, without weights. The arguments and errors are those of [`student_config`]."""
    with init_empty_weights(include_buffers=False):
        return UNet2DConditionModel.from_config(student_config(config, kind))


def known_limits(student: UNet2DConditionModel) -> list[str]:
    """What a student cannot be used for."""
    has_middle = student.config.mid_block_type is not None
    return [] if has_middle else ["it has no middle block, so ControlNetModel.from_unet does not take it"]


def published_teacher(name: str) -> UNet2DConditionModel:
    """The UNet of a published teacher, a name of `TEACHER_CONFIGS`: on the meta device, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**TEACHER_CONFIGS[name])


def latent_shape(denoiser: UNet2DConditionModel) -> tuple[int, int, int]:
    """Channels, height and width of one latent of a UNet, by its own config."""
    size = denoiser.config.sample_size
    return denoiser.config.in_channels, *((size, size) if isinstance(size, int) else size)


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults for what it leaves out, as files of older versions do."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {name: item.default for name, item in parameters.items() if name != "self"} | dict(config)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value
