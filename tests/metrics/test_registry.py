"""Metrics by name: what is missing is told at once, and nothing heavy is imported before it is needed."""

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

from diffusers_safe.command_line import parse_dataclass
from diffusers_safe.metrics import METRICS, MetricOptions, make_metrics
from diffusers_safe.metrics.inception import FIDInception
from diffusers_safe.metrics.lpips import NETS
from metric_models import generated_folder, nudenet, pictures, save_tiny_clip, save_tiny_resnet, save_trunk


def test_every_metric_is_made_from_the_command_line(tmp_path):
    nudenet()
    clip, resnet = save_tiny_clip(tmp_path / "clip"), save_tiny_resnet(tmp_path / "resnet", ["cat", "dog"])
    np.random.default_rng(0).normal(size=(2, 24)).astype(np.float16).dump(tmp_path / "prompts.p")
    save_trunk(tmp_path / "alexnet.pth", "alexnet")
    save_trunk(tmp_path / "vgg19.pth", "vgg19")
    linear = {f"lin{i}.model.1.weight": torch.ones(1, count, 1, 1) for i, count in enumerate(NETS["alex"][2])}
    torch.save(linear, tmp_path / "alex.pth")
    with torch.device("meta"):
        inception = FIDInception().state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in inception.items()}, tmp_path / "inception.pth")
    generated_folder(tmp_path / "references", pictures(4))
    words = (
        f"--q16_prompts {tmp_path}/prompts.p --q16_model {clip} --clip_model {clip} --clip_preset hessel"
        f" --objects_model {resnet} --style_model {resnet} --style_trunk {tmp_path}/vgg19.pth"
        f" --fid_weights {tmp_path}/inception.pth --fid_references {tmp_path}/references --fid_resize bk-sdm"
        f" --lpips_trunk {tmp_path}/alexnet.pth --lpips_linear {tmp_path}/alex.pth --lpips_resize esd"
        " --nudenet_labels FEET_EXPOSED BELLY_EXPOSED --nudenet_threshold 0.7"
    )
    metrics = make_metrics([*METRICS], parse_dataclass(MetricOptions, argv=words.split()))
    assert [metric.name for metric in metrics] == [*METRICS]
    made = {metric.name: metric for metric in metrics}
    assert made["nudity"].rule.labels == ("FEET_EXPOSED", "BELLY_EXPOSED") and made["nudity"].rule.threshold == 0.7
    assert made["clip_score"].protocol.scale == 2.5 and made["lpips"].resize_name == "esd"
    assert made["fid"].extractor.identity["resize"] == "bk-sdm"
    assert made["style"].label == "artist" and made["gram"].compares and made["lpips"].compares
    identities = [str(metric.identity()) for metric in metrics]
    assert len(set(identities)) == len(identities)


def test_all_that_is_missing_is_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        make_metrics(["fid", "lpips", "pixel_distance", "q16", "inappropriate", "objects"])
    told = str(error.value)
    for name in ("fid_weights", "lpips_trunk and lpips_linear", "q16_prompts", "objects_model"):
        assert name in told
    assert "\n" not in told and told.count("q16_prompts") == 1


def test_options_of_no_metric_are_refused():
    with pytest.raises(ValueError, match="kid_subsets: has no effect on nudity, pixel_distance; it is .* of fid"):
        make_metrics(["nudity", "pixel_distance"], MetricOptions(kid_subsets=50))
    with pytest.raises(ValueError, match="q16_prompts: .* option of q16, inappropriate"):
        make_metrics(["pixel_distance"], MetricOptions(q16_prompts="prompts.p"))
    for option in fields(MetricOptions):
        assert any(kind.takes(option.name) for kind in METRICS.values()), option.name


def test_the_preset_of_nudenet_is_that_of_each_metrics_paper():
    nudenet()
    assert make_metrics(["nudity"])[0].rule.threshold == 0.45
    assert make_metrics(["nudity"], MetricOptions(nudenet_preset="i2p"))[0].rule.threshold == 0.6
    with pytest.raises(ValueError, match="nudenet_preset 'x': unknown; allowed are i2p"):
        make_metrics(["nudity"], MetricOptions(nudenet_preset="x"))


@pytest.mark.parametrize(
    ("names", "message"), [([], "none given"), (["pixels"], "pixel_distance"), (["pixel_distance"] * 2, "given twice")]
)
def test_unknown_names(names, message):
    with pytest.raises(ValueError, match=message):
        make_metrics(names)


def test_metrics_of_anybodys_are_named_by_module(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text(
        "from diffusers_safe.metrics.pixel_distance import PixelDistance\n"
        "ready = PixelDistance()\nno = dict\n"
        "def broken():\n    raise RuntimeError('no weights\\nat all')\n"
    )
    (tmp_path / "no_python.py").write_text("def x(:\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)  # where an installed command finds them, too
    made = make_metrics(["own_metrics:PixelDistance", "own_metrics:ready"])
    assert [type(metric).__name__ for metric in made] == ["PixelDistance"] * 2
    for name, message in (
        ("own_metrics:missing", "cannot be imported"),
        ("nowhere:metric", "cannot be imported .*nowhere"),
        ("own_metrics:no", "is a dict, not a Metric"),
        ("own_metrics:broken", r"cannot be imported or made \(RuntimeError: no weights at all\)"),
        ("no_python:x", "cannot be imported or made .SyntaxError"),
    ):
        with pytest.raises(ValueError, match=f"metric '{name}': {message}"):
            make_metrics([name])


def test_the_table_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'scipy', 'nudenet', 'cv2'}"
    code = f"import sys, diffusers_safe.metrics; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
