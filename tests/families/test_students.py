"""Students against the published models, and against removing the modules by hand."""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn

from closeness import ROUNDING, difference
from diffusers_safe import erase
from diffusers_safe.emoji import MODEL_FOLDER
from diffusers_safe.families import make_family
from diffusers_safe.families.students import (
    STUDENTS,
    TEACHER_CONFIGS,
    block_map,
    build_student,
    fitting_students,
    parameter_map,
    resolve_student,
    student_config,
)
from diffusers_safe.families.unet import UNetFamily
from diffusers_safe.weights.lora import LoRAWeights
from diffusers_safe.weights.trained import select_parameters


BK = ["bk-base", "bk-small", "bk-tiny"]
XL = ["ssd-1b", "koala-1b", "koala-700m", "segmind-vega"]
WITHOUT_MIDDLE = ["bk-small", "bk-tiny", "koala-700m"]


def on_meta(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def teachers():
    """Published teachers on the meta device."""
    return {name: on_meta(config) for name, config in TEACHER_CONFIGS.items()}


@pytest.fixture(scope="module")
def pipelines(make_tiny_pipeline, make_tiny_xl_pipeline):
    """Tiny pipelines that the students of a family fit; not to be changed."""
    xl = make_tiny_xl_pipeline()
    config = {**xl.unet.config, "transformer_layers_per_block": (1, 2, 10)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        xl.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    return {"sd": make_tiny_pipeline(), "xl": xl}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny(pipelines):
    """The function `(kind) -> UNet` that gives a tiny teacher; not to be changed."""
    return lambda kind: pipelines["sd" if kind in BK else "xl"].unet


def predict(unet):
    """A forward of any tiny UNet."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        sample, text = (
            torch.randn(2, unet.config.in_channels, 8, 8),
            torch.randn(2, 5, unet.config.cross_attention_dim),
        )
        added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.rand(2, 6)}
    return unet(sample, torch.tensor([1, 500]), text, added_cond_kwargs=added).sample


# The published sizes: of BK-SDM from its authors (issue 53 of their repository), of KOALA in millions from its paper.
SIZES = [
    ("sd-1.5", "bk-base", 579_384_964, 0),
    ("sd-1.5", "bk-small", 482_346_884, 0),
    ("sd-1.5", "bk-tiny", 323_384_964, 0),
    ("sdxl", "koala-1b", 1161, 6),
    ("sdxl", "koala-700m", 782, 6),
    ("sdxl", "ssd-1b", 13, 8),  # 1.3 B
    ("sdxl", "segmind-vega", 74, 7),  # 0.74 B
]


@pytest.mark.parametrize("teacher, kind, published, digits", SIZES)
def test_sizes_are_the_published_ones(teachers, teacher, kind, published, digits):
    student = build_student(teachers[teacher], kind)
    assert student.device.type == "meta"
    assert count(student) // 10**digits == published


def test_the_parts_of_vega_have_their_published_sizes(teachers):
    """247 M down, 31 M in the middle, 460 M up (blog.segmind.com/segmind-vega-2)."""
    student = build_student(teachers["sdxl"], "segmind-vega")
    parts = (student.down_blocks, student.mid_block, student.up_blocks)
    assert [round(count(part) / 1e6) for part in parts] == [247, 31, 460]


# What the configs of BK-SDM's authors say (src/unet_config*/ in their repository), without diffusers' defaults.
CROSS = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
PUBLISHED_CONFIGS = {
    ("sd-1.5", "bk-base"): {"cross_attention_dim": 768, "layers_per_block": 1},
    ("sd-1.5", "bk-small"): {"cross_attention_dim": 768, "layers_per_block": 1, "mid_block_type": None},
    ("sd-1.5", "bk-tiny"): {
        "cross_attention_dim": 768,
        "layers_per_block": 1,
        "mid_block_type": None,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": CROSS[0],
        "up_block_types": CROSS[1],
    },
    ("sd-2", "bk-small"): {
        "cross_attention_dim": 1024,
        "layers_per_block": 1,
        "mid_block_type": None,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    ("sd-2", "bk-tiny"): {
        "cross_attention_dim": 1024,
        "layers_per_block": 1,
        "mid_block_type": None,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": CROSS[0],
        "up_block_types": CROSS[1],
    },
}


@pytest.mark.parametrize("teacher, kind", PUBLISHED_CONFIGS)
def test_configs_and_weights_are_those_of_bk_sdm(teacher, kind):
    published = on_meta({"sample_size": 64, **PUBLISHED_CONFIGS[teacher, kind]})
    ours = on_meta(student_config(TEACHER_CONFIGS[teacher], kind))
    # As in a file: diffusers does not care for tuples or lists.
    assert json.loads(ours.to_json_string()) == json.loads(published.to_json_string())
    shapes = [{name: value.shape for name, value in unet.state_dict().items()} for unet in (ours, published)]
    assert shapes[0] == shapes[1]


# Transformer layers in each attention, as ComfyUI knows the published models: down, middle (None: no block), up.
DEPTHS = {
    "ssd-1b": ([2, 2, 4, 4], [], [4, 4, 10, 2, 1, 1]),
    "segmind-vega": ([1, 1, 2, 2], [], [2, 2, 2, 1, 1, 1]),
    "koala-1b": ([2, 6], [6], [6, 6, 2, 2]),
    "koala-700m": ([2, 5], None, [5, 5, 2, 2]),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_the_depths_are_those_of_the_published_sdxl_students(teachers, kind):
    student = build_student(teachers["sdxl"], kind)

    def depths(*blocks):
        return [len(a.transformer_blocks) for block in blocks for a in getattr(block, "attentions", [])]

    middle = None if student.mid_block is None else depths(student.mid_block)
    assert (depths(*student.down_blocks), middle, depths(*student.up_blocks)) == DEPTHS[kind]


def take_out(unet, kind):
    """A student made the way of distill-sd: modules are deleted, the config is not touched."""
    unet = copy.deepcopy(unet)
    if kind.startswith(("bk", "koala")):
        for block in unet.down_blocks:
            for layers in (block.resnets, getattr(block, "attentions", None)):
                if layers is not None:
                    del layers[1]
        for block in unet.up_blocks:
            for layers in (block.resnets, getattr(block, "attentions", None)):
                if layers is not None:
                    del layers[1]
    if kind in WITHOUT_MIDDLE:
        unet.mid_block = None
    if kind == "bk-tiny":
        del unet.down_blocks[3], unet.up_blocks[0]
        unet.down_blocks[2].downsamplers = None

    def keep(attention, *layers):
        attention.transformer_blocks = nn.ModuleList(attention.transformer_blocks[i] for i in layers)

    if kind.startswith("koala"):
        deep = [*unet.down_blocks[2].attentions, *unet.up_blocks[0].attentions]
        for attention in deep + ([] if unet.mid_block is None else [*unet.mid_block.attentions]):
            keep(attention, *range(6 if kind == "koala-1b" else 5))
    if kind in ("ssd-1b", "segmind-vega"):
        unet.mid_block.resnets, unet.mid_block.attentions = unet.mid_block.resnets[:1], nn.ModuleList()
    if kind == "ssd-1b":
        for attention in [*unet.down_blocks[2].attentions, *unet.up_blocks[0].attentions[:2]]:
            keep(attention, 0, 1, 2, 6)
        for attention in unet.up_blocks[1].attentions[1:]:
            keep(attention, 0)
    if kind == "segmind-vega":
        for attention in [*unet.down_blocks[2].attentions, *unet.up_blocks[0].attentions]:
            keep(attention, 0, 1)
        for attention in [*unet.down_blocks[1].attentions, *unet.up_blocks[1].attentions]:
            keep(attention, 0)
    return unet


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_computes_what_the_teacher_without_those_modules_computes(tiny, kind):
    teacher = tiny(kind)
    before = predict(teacher)
    student = build_student(teacher, kind)
    assert difference(predict(student), predict(take_out(teacher, kind))) < ROUNDING
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(predict(teacher), before)  # the student's weights are copies


@pytest.mark.parametrize("kind", BK)
def test_heads_by_level_and_another_text_width(make_tiny_sd_2_pipeline, kind):
    teacher = make_tiny_sd_2_pipeline().unet
    assert difference(predict(build_student(teacher, kind)), predict(take_out(teacher, kind))) < ROUNDING


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_reloads_as_a_stock_model(tiny, tmp_path, kind):
    student = build_student(tiny(kind), kind)
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel" and "_name_or_path" not in config
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert difference(predict(loaded), predict(student)) < ROUNDING
    assert all(torch.equal(value, student.get_parameter(name)) for name, value in loaded.named_parameters())


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_maps_name_the_teachers_blocks_and_parameters(tiny, kind):
    teacher = tiny(kind)
    student = build_student(teacher, kind)
    names = parameter_map(teacher.config, kind)
    own = dict(teacher.named_parameters())
    assert names.keys() == dict(student.named_parameters()).keys()
    assert len(set(names.values())) == len(names)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, own[names[name]]), name
    blocks = block_map(teacher.config, kind)
    assert {name for name, _ in student.named_modules()} >= blocks.keys()
    assert {name for name, _ in teacher.named_modules()} >= set(blocks.values())
    assert all(names[name].startswith(f"{blocks[b]}.") for b in blocks for name in names if name.startswith(f"{b}."))
    inside = {name for name in names if "blocks." in name or name.startswith("mid_block.")}
    assert inside == {name for name in names if name.startswith(tuple(f"{block}." for block in blocks))}


def test_which_blocks_bk_tiny_takes():
    blocks = block_map(TEACHER_CONFIGS["sd-1.5"], "sd_tiny")
    assert blocks == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1": "down_blocks.1",
        "down_blocks.2": "down_blocks.2",
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
        "up_blocks.2": "up_blocks.3",
    }
    name = STUDENTS["bk-tiny"].teacher_name
    assert name("up_blocks.0.attentions.1.proj_out") == "up_blocks.1.attentions.2.proj_out"
    assert name("up_blocks.0.upsamplers.0.conv.weight") == "up_blocks.1.upsamplers.0.conv.weight"
    assert name("down_blocks.2.attentions.0.proj_out.bias") == "down_blocks.2.attentions.0.proj_out.bias"


def test_a_pair_that_was_kept_computes_as_in_the_teacher(tiny):
    teacher = tiny("bk-tiny")
    student = build_student(teacher, "bk-tiny")
    torch.manual_seed(0)
    text, temb = torch.randn(2, 5, 32), torch.randn(2, 32)
    pairs = [(("down", 1, 0), ("down", 1, 0), 8), (("up", 1, 0), ("up", 2, 0), 32), (("up", 1, 1), ("up", 2, 2), 24)]
    for (side, block, place), (_, own_block, own_place), channels in pairs:
        inputs = torch.randn(2, channels, 4, 4)
        outputs = []
        for unet, i, j in ((student, block, place), (teacher, own_block, own_place)):
            level = getattr(unet, f"{side}_blocks")[i]
            outputs.append(level.attentions[j](level.resnets[j](inputs, temb), text).sample)
        assert difference(*outputs) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_and_mode_are_the_teachers_and_everything_trains(make_tiny_pipeline, dtype):
    teacher = make_tiny_pipeline().unet.to(dtype).train().requires_grad_(False)
    student = build_student(teacher, "bk-base")
    assert student.dtype == dtype and student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not build_student(teacher.eval(), "bk-base").training


def test_the_embedded_model_has_students():
    config = UNet2DConditionModel.load_config(MODEL_FOLDER / "unet")
    assert fitting_students(config) == BK
    teacher = UNet2DConditionModel.from_pretrained(MODEL_FOLDER / "unet")
    for kind in BK:
        assert torch.isfinite(predict(build_student(teacher, kind))).all()


def test_a_config_of_an_older_version_is_enough():
    """Stable Diffusion 1.4's file says nothing of the middle block, nor of transformer layers."""
    old = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.2.2",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "layers_per_block": [2, 2, 2, 2],
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    assert fitting_students(old) == BK
    assert count(on_meta(student_config(old, "bk-tiny"))) == 323_384_964


def test_both_vocabularies():
    assert [resolve_student(name) for name in ("sd_small", "sd_tiny", "ssd-1b")] == ["bk-base", "bk-tiny", "ssd-1b"]
    with pytest.raises(ValueError, match="student 'bk-huge': unknown; allowed are bk-base, .*segmind-vega, sd_small"):
        student_config(TEACHER_CONFIGS["sd-1.5"], "bk-huge")


@pytest.mark.parametrize(
    "teacher, change, kind, message",
    [
        ("sd-1.5", {}, "ssd-1b", "has down_block_types .*DownBlock2D'\\), not .*: bk-base, bk-small, bk-tiny$"),
        ("sdxl", {}, "sd_tiny", "'sd_tiny': this UNet has down_block_types .* fit it: ssd-1b, koala-1b, koala-700m, "),
        ("sd-1.5", {"layers_per_block": 1}, "bk-small", "has layers_per_block 1, not 2; .* fit it: none$"),
        ("sd-1.5", {"mid_block_type": None}, "bk-tiny", "has mid_block_type None, not UNetMid.* fit it: none$"),
        ("sdxl", {"transformer_layers_per_block": [1, 2, 4]}, "koala-1b", r"block \(1, 2, 4\), not \(1, 2, 10\)"),
        (
            "sd-1.5",
            {"block_out_channels": [320, 640, 960, 1280]},
            "bk-tiny",
            "the last two not equal; students that fit it: bk-base, bk-small$",
        ),
        ("sd-1.5", {"_class_name": "UNetMotionModel"}, "bk-base", "is a UNetMotionModel.* fit it: none$"),
    ],
)
def test_a_unet_that_does_not_fit_is_exit_with_error(teacher, change, kind, message):
    config = {**TEACHER_CONFIGS[teacher], **change}
    for function in (student_config, block_map, parameter_map):
        with pytest.raises(ValueError, match=message) as error:
            function(config, kind)
        assert "\n" not in str(error.value)


def test_what_is_no_plain_unet_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="the teacher is a AutoencoderKL; a UNet2DConditionModel is needed"):
        build_student(AutoencoderKL(block_out_channels=(4,), norm_num_groups=1), "bk-base")
    LoRAWeights(tiny_pipeline.unet, select_parameters(tiny_pipeline.unet, "xattn"), rank=2)
    with pytest.raises(ValueError, match=r"the teacher has adapters \(erasure\); fuse or unload them first"):
        build_student(tiny_pipeline.unet, "bk-base")


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_controlnet_of_a_student(tiny, kind):
    """diffusers copies the middle block; without one it says what it misses."""
    student = build_student(tiny(kind), kind)
    if kind in WITHOUT_MIDDLE:
        with pytest.raises(ValueError, match="^unknown mid_block_type : None$"):
            ControlNetModel.from_unet(student)
    else:
        controlnet = ControlNetModel.from_unet(student)
        assert torch.equal(controlnet.mid_block.resnets[0].conv1.weight, student.mid_block.resnets[0].conv1.weight)


def controlled(unet, controlnet):
    torch.manual_seed(0)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 5, unet.config.cross_attention_dim))
    added = {"text_embeds": torch.randn(1, 24), "time_ids": torch.rand(1, 6)}
    down, middle = controlnet(*inputs, torch.randn(1, 3, 64, 64), added_cond_kwargs=added, return_dict=False)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return unet(*inputs, added_cond_kwargs=added, **residuals).sample


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_controlnet_of_the_teacher_fits_students_with_all_of_its_pairs(tiny, kind):
    teacher = tiny(kind)
    controlnet, student = ControlNetModel.from_unet(teacher), build_student(teacher, kind)
    if kind in ("ssd-1b", "segmind-vega"):
        assert torch.isfinite(controlled(student, controlnet)).all()
    else:
        with pytest.raises(RuntimeError, match="size of tensor"):
            controlled(student, controlnet)


@pytest.mark.parametrize("kind", STUDENTS)
def test_train_methods_select_in_a_student_what_they_select_in_its_teacher(tiny, kind):
    teacher = tiny(kind)
    student, names = build_student(teacher, kind), parameter_map(teacher.config, kind)
    for name in UNetFamily.train_methods:
        if name in UNetFamily.by_number:
            with pytest.raises(ValueError, match=f"{name}.*this model has no such parameters; allowed are xattn"):
                select_parameters(student, name)
            continue
        selected = set(select_parameters(teacher, name))
        assert select_parameters(student, name) == [own for own, source in names.items() if source in selected]


@pytest.mark.parametrize("kind, changes", [("bk-small", {}), ("bk-tiny", {"rank": 2}), ("koala-700m", {"rank": 2})])
def test_a_student_can_be_erased(pipelines, on_cpu, kind, changes):
    pipeline = copy.copy(pipelines["sd" if kind in BK else "xl"])
    pipeline.unet = build_student(pipeline.unet, kind)
    before = predict(pipeline.unet)
    quick = {"max_train_steps": 2, "num_inference_steps": 2, "learning_rate": 1e-2, "watch_prompts": []}
    erase(pipeline, ["knife"], "esd", progress_bar=False, **quick, **changes)
    assert difference(predict(pipeline.unet), before) > 10 * ROUNDING


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_pipeline_with_a_student_is_of_its_family(pipelines, kind):
    pipeline = copy.copy(pipelines["sd" if kind in BK else "xl"])
    pipeline.unet = build_student(pipeline.unet, kind)
    family = make_family(pipeline)
    conditioning = family.encode(["a knife"])
    assert family.predict(family.denoiser, torch.randn(1, 4, 8, 8), torch.tensor([3]), conditioning).isfinite().all()
