"""Metrics of generated images, one file each, and the registry of their names.

    metrics = make_metrics(["nudity", "lpips"], MetricOptions(lpips_trunk="alexnet.pth", lpips_linear="alex.pth"))

Nothing heavy is imported before a metric is made.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import ClassVar

from ..arguments import typed
from ..values import choose
from .base import Metric, check_once


logger = logging.getLogger(__name__)


@typed
@dataclass
class MetricOptions:
    """Options of the metrics. A metric that lacks one says which, what to get, and where."""

    TITLE: ClassVar[str] = "metrics"

    nudenet_preset: str | None = field(
        default=None,
        metadata={
            "help": "Detections of NudeNet that count: i2p, esd, unlearndiffatk. Default: unlearndiffatk; for the"
            " metric inappropriate, i2p.",
            "choices": ("i2p", "esd", "unlearndiffatk"),
        },
    )
    nudenet_labels: list[str] | None = field(
        default=None, metadata={"help": "Labels of NudeNet v3 that count, instead of those of --nudenet_preset."}
    )
    nudenet_threshold: float | None = field(
        default=None,
        metadata={"help": "Minimum score of a detection, 0.25 to 1, instead of that of --nudenet_preset."},
    )
    q16_prompts: str | None = field(
        default=None, metadata={"help": "File with Q16's two vectors for ViT-L/14: prompts.p or a .safetensors file."}
    )
    q16_model: str = field(
        default="openai/clip-vit-large-patch14", metadata={"help": "CLIP ViT-L/14 for Q16: folder or Hub id."}
    )
    fid_references: str | None = field(
        default=None, metadata={"help": "Folder of reference images for FID and KID, real or generated."}
    )
    fid_weights: str | None = field(
        default=None, metadata={"help": "Inception weights for FID and KID: pt_inception-2015-12-05-6726825d.pth."}
    )
    fid_resize: str = field(
        default="clean",
        metadata={
            "help": "How FID and KID resize images to 299 pixels: clean, bk-sdm, pytorch-fid, torchmetrics.",
            "choices": ("clean", "bk-sdm", "pytorch-fid", "torchmetrics"),
        },
    )
    kid_subsets: int = field(default=100, metadata={"help": "Number of subsets for KID."})
    kid_subset_size: int = field(
        default=1000, metadata={"help": "Number of images per subset for KID, at most half of all."}
    )
    lpips_net: str = field(
        default="alex", metadata={"help": "LPIPS network: alex or vgg.", "choices": ("alex", "vgg")}
    )
    lpips_trunk: str | None = field(
        default=None,
        metadata={"help": "Weights of torchvision's AlexNet (alexnet-owt-7be5be79.pth) or VGG-16, for LPIPS."},
    )
    lpips_linear: str | None = field(
        default=None,
        metadata={"help": "Linear weights of LPIPS: alex.pth or vgg.pth of the lpips package, version 0.1."},
    )
    lpips_resize: str = field(
        default="none",
        metadata={
            "help": "How LPIPS resizes images: none, or esd (shorter side to 64 pixels).",
            "choices": ("none", "esd"),
        },
    )
    clip_preset: str = field(
        default="sdd",
        metadata={
            "help": "Model, prompt prefix and scale of the CLIP score: sdd, hessel, torchmetrics.",
            "choices": ("sdd", "hessel", "torchmetrics"),
        },
    )
    clip_model: str | None = field(
        default=None, metadata={"help": "CLIP model instead of that of --clip_preset: folder or Hub id."}
    )
    objects_model: str | None = field(
        default=None, metadata={"help": "Classifier of objects, such as microsoft/resnet-50: folder or Hub id."}
    )
    objects_label: str = field(default="class", metadata={"help": "Column of --prompts that names the object."})
    objects_erased: list[str] = field(
        default_factory=list, metadata={"help": "Erased classes of --objects_model; all others are retained."}
    )
    style_model: str | None = field(default=None, metadata={"help": "Classifier of styles: folder or Hub id."})
    style_label: str = field(default="artist", metadata={"help": "Column of --prompts that names the style."})
    style_erased: list[str] = field(
        default_factory=list, metadata={"help": "Erased styles of --style_model; all others are retained."}
    )
    style_trunk: str | None = field(
        default=None, metadata={"help": "Weights of torchvision's VGG-19 (vgg19-dcbb9e9d.pth), for the metric gram."}
    )
    style_references: str | None = field(
        default=None,
        metadata={"help": "Folder of images of a style, for the metric gram. Default: the original model's images."},
    )
    gram_resize: str = field(
        default="esd",
        metadata={
            "help": "How the metric gram resizes images: esd (shorter side to 512 pixels) or none.",
            "choices": ("esd", "none"),
        },
    )


@dataclass(frozen=True)
class MetricKind:
    """A registered metric.

    Attributes:
        description (`str`): What it measures, in a few words.
        make (`Callable[[MetricOptions], Metric]`): Loads what the metric needs and makes it; raises a `ValueError`
            that says what is missing.
        options (`tuple[str, ...]`, *optional*): Prefixes of the names of its options.
    """

    description: str
    make: Callable[[MetricOptions], Metric]
    options: tuple[str, ...] = ()

    def takes(self, option: str) -> bool:
        return option.startswith(self.options)


def _pixel_distance(options: MetricOptions) -> Metric:
    from .pixel_distance import PixelDistance

    return PixelDistance()


def _nudity(options: MetricOptions, preset: str = "unlearndiffatk") -> Metric:
    from .nudity import Nudity, nudity_rule

    preset = options.nudenet_preset or preset
    return Nudity(nudity_rule(preset, options.nudenet_labels, options.nudenet_threshold))


def _q16(options: MetricOptions) -> Metric:
    from .q16 import Q16

    return Q16(options.q16_prompts, options.q16_model)


def _inappropriate(options: MetricOptions) -> Metric:
    from .inappropriate import Inappropriate

    return Inappropriate(_q16(options), _nudity(options, "i2p"))


def _fid(options: MetricOptions) -> Metric:
    from .fid import FID, inception

    extractor = inception(options.fid_weights, options.fid_resize)
    return FID(extractor, options.fid_references, options.kid_subsets, options.kid_subset_size)


def _lpips(options: MetricOptions) -> Metric:
    from .lpips import LPIPS

    return LPIPS(options.lpips_net, options.lpips_trunk, options.lpips_linear, options.lpips_resize)


def _clip_score(options: MetricOptions) -> Metric:
    from .clip_score import CLIPScore

    return CLIPScore(options.clip_preset, options.clip_model)


def _objects(options: MetricOptions) -> Metric:
    from .objects import Classification

    return Classification(options.objects_model, options.objects_label, "objects", options.objects_erased)


def _style(options: MetricOptions) -> Metric:
    from .objects import Classification

    return Classification(options.style_model, options.style_label, "style", options.style_erased)


def _gram(options: MetricOptions) -> Metric:
    from .style import GramDistance

    return GramDistance(options.style_trunk, options.style_references, options.gram_resize)


METRICS: dict[str, MetricKind] = {
    "nudity": MetricKind("images with nudity, by NudeNet v3", _nudity, ("nudenet_",)),
    "q16": MetricKind("inappropriate images, by Q16", _q16, ("q16_",)),
    "inappropriate": MetricKind(
        "inappropriate images by Q16 or NudeNet, as I2P counts them", _inappropriate, ("q16_", "nudenet_")
    ),
    "objects": MetricKind("objects recognised by a classifier", _objects, ("objects_",)),
    "style": MetricKind("styles recognised by a classifier", _style, ("style_model", "style_label", "style_erased")),
    "gram": MetricKind("distance in style, by Gram matrices", _gram, ("style_trunk", "style_references", "gram_")),
    "clip_score": MetricKind("how well images match their prompts", _clip_score, ("clip_",)),
    "fid": MetricKind("FID and KID to reference images", _fid, ("fid_", "kid_")),
    "lpips": MetricKind("perceptual distance to the original model's images", _lpips, ("lpips_",)),
    "pixel_distance": MetricKind("difference of pixels to the original model's images", _pixel_distance),
}


@typed
def make_metrics(names: Sequence[str], options: MetricOptions | None = None) -> list[Metric]:
    """Makes metrics from their names, and loads everything they need.

    Args:
        names (`Sequence[str]`): Names of `METRICS`, or `"module:name"` of a [`Metric`] or a function without arguments
            that makes one, in a module that is installed or in the current folder; at least one, each once.
        options (`MetricOptions`, *optional*): Their options.

    Returns:
        `list[Metric]`: In the order of `names`.

    Raises:
        `ValueError`: If a name is unknown or occurs twice, an option belongs to none of the metrics, or a metric lacks
            a library or weights: everything that is missing in one line, with what to get and where to put it.
    """
    if not names:
        raise ValueError(f"metrics: none given; known are {', '.join(METRICS)}")
    names = [name if ":" in name else choose("metric", name, METRICS) for name in names]
    check_once("metric", names)
    options = options or MetricOptions()
    kinds = [METRICS[name] for name in names if name in METRICS]
    untouched = MetricOptions()
    for option in fields(MetricOptions):  # not the other options of a command
        given = getattr(options, option.name) != getattr(untouched, option.name)
        if given and not any(kind.takes(option.name) for kind in kinds):
            users = ", ".join(name for name, kind in METRICS.items() if kind.takes(option.name))
            raise ValueError(f"{option.name}: has no effect on {', '.join(names)}; it is an option of {users}")
    made, problems = [], []
    for name in names:
        try:
            made.append(METRICS[name].make(options) if name in METRICS else _imported(name))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return made


def _imported(name: str) -> Metric:
    """A metric from the user's module."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # installed commands do not add it
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
        metric = found if isinstance(found, Metric) else found()
    except Exception as error:  # the user's code may raise anything
        logger.debug("traceback:", exc_info=True)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"metric '{name}': cannot be imported or made ({type(error).__name__}: {reason})") from None
    if not isinstance(metric, Metric):
        raise ValueError(f"metric '{name}': is a {type(metric).__name__}, not a Metric")
    return metric
