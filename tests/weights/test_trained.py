import pytest
import torch
from diffusers import UNet2DConditionModel

from closeness import ROUNDING, difference
from diffusers_safe.families.unet import UNetFamily
from diffusers_safe.weights.trained import TrainedWeights, select_parameters


@pytest.fixture(scope="module")
def sd_unet():
    """SD 1.x's UNet as it is, without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


@pytest.fixture(scope="module")
def xl_unet():
    """SDXL's."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


# Tensors and parameters that each method trains.
SIZES = {
    "sd_unet": {
        "xattn": (80, 43_962_560),  # 5 % of the UNet (SDD)
        "xattn-strict": (32, 19_169_280),
        "noxattn": (598, 813_495_680),
        "selfattn": (80, 49_574_080),
        "full": (686, 859_520_964),
        "notime": (678, 857_458_240),
        "esd-u": (388, 815_358_084),
        "xlayer": (10, 3_605_760),
        "selflayer": (10, 8_193_920),
    },
    "xl_unet": {
        "xattn": (350, 545_670_400),  # 70 transformer blocks, 21 % of the UNet
        "xattn-strict": (140, 340_787_200),
        "noxattn": (1322, 2_019_730_560),
        "selfattn": (350, 409_683_200),
        "full": (1680, 2_567_463_684),
        "notime": (1672, 2_565_400_960),
        "esd-u": (818, 2_021_205_124),
        "xlayer": None,
        "selflayer": None,
    },
}


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("train_method", UNetFamily.train_methods)
def test_sizes_of_the_real_models(request, model, train_method):
    unet, expected = request.getfixturevalue(model), SIZES[model][train_method]
    if expected is None:
        with pytest.raises(ValueError, match=f"'{train_method}'.*has no such parameters; allowed are xattn, "):
            select_parameters(unet, train_method)
        return
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    chosen = select_parameters(unet, train_method)
    assert (len(chosen), sum(sizes[name] for name in chosen)) == expected


def test_what_embeds_sdxls_pooled_text_is_no_cross_attention_and_no_time_embedding(xl_unet):
    """It carries the prompt, too: methods that leave it alone leave that way open."""
    embedding = {name for name, _ in xl_unet.named_parameters() if name.startswith("add_embedding.")}
    for method in UNetFamily.train_methods:
        if SIZES["xl_unet"][method]:
            trained = embedding & set(select_parameters(xl_unet, method))
            assert trained == (embedding if method in ("noxattn", "full", "notime", "esd-u") else set()), method


def test_rules(sd_unet):
    everything = set(select_parameters(sd_unet, "full"))
    chosen = {method: set(select_parameters(sd_unet, method)) for method in UNetFamily.train_methods}
    assert chosen["xattn"] == {name for name in everything if ".attn2." in name}
    assert chosen["selfattn"] == {name for name in everything if ".attn1." in name}
    assert {name.split(".")[0] for name in everything - chosen["notime"]} == {
        "time_embedding",
        "conv_out",
        "conv_norm_out",
    }
    assert chosen["noxattn"] == chosen["notime"] - chosen["xattn"]
    assert not any("norm" in name or "attn2" in name for name in chosen["esd-u"])
    assert {"conv_in.weight", "time_embedding.linear_1.bias"} <= chosen["esd-u"]
    assert len(chosen["xlayer"]) == 10 and all(name.startswith("up_blocks.2.") for name in chosen["xlayer"])
    assert len(chosen["selflayer"]) == 10 and all(name.startswith("down_blocks.") for name in chosen["selflayer"])


@pytest.mark.parametrize("alias, name", [("esd-x", "xattn"), ("esd-x-strict", "xattn-strict"), ("esd-all", "full")])
def test_aliases(sd_unet, alias, name):
    assert select_parameters(sd_unet, alias) == select_parameters(sd_unet, name)


def test_unknown_name_and_empty_selection_are_errors(sd_unet):
    with pytest.raises(ValueError, match="train_method 'cross'.*xattn.*esd-x"):
        select_parameters(sd_unet, "cross")
    with pytest.raises(ValueError, match="Linear: not a supported denoiser; supported are UNet2DConditionModel"):
        select_parameters(torch.nn.Linear(2, 2), "xattn")
    blocks = {"down_block_types": ("DownBlock2D",), "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
    with torch.device("meta"):
        plain = UNet2DConditionModel(block_out_channels=(32,), **blocks)
    with pytest.raises(ValueError, match="cross-attention.*selects no parameter of UNet2DConditionModel"):
        select_parameters(plain, "xattn")


def test_only_selected_parameters_require_gradients(tiny_pipeline):
    unet = tiny_pipeline.unet
    names = select_parameters(unet, "xattn")
    TrainedWeights(unet, names)
    assert [name for name, parameter in unet.named_parameters() if parameter.requires_grad] == names


def test_swapping_changes_predictions_and_comes_back(tiny_pipeline):
    unet = tiny_pipeline.unet
    weights = TrainedWeights(unet, select_parameters(unet, "xattn"), ema_decay=0.5)
    inputs = (torch.randn(1, 4, 8, 8), 10, torch.randn(1, 32, 32))
    with torch.no_grad():
        base = unet(*inputs).sample
        for parameter in weights.student.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        student = unet(*inputs).sample
        with weights.use("frozen"):
            assert difference(unet(*inputs).sample, base) < ROUNDING
            with pytest.raises(RuntimeError, match="'frozen' are in use"), weights.use("ema"):
                pass
        with weights.use("student"):
            assert torch.equal(unet(*inputs).sample, student)
        with pytest.raises(KeyError), weights.use("frozen"):
            raise KeyError
        assert torch.equal(unet(*inputs).sample, student)
    assert difference(student, base) > 10 * ROUNDING


def test_ema_formula():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    weights = TrainedWeights(layer, ["weight"], ema_decay=0.9)
    expected = 1.0
    for value in (2.0, -1.0, 4.0):
        layer.weight.data.fill_(value)
        weights.update_ema()
        expected = 0.9 * expected + 0.1 * value
    assert weights.ema["weight"].item() == pytest.approx(expected)
    assert weights.frozen["weight"].item() == 1.0


def test_no_ema_and_bad_decay():
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="weights 'ema'"):
        TrainedWeights(layer, ["weight"]).values("ema")
    with pytest.raises(ValueError, match="ema_decay 1.0"):
        TrainedWeights(layer, ["weight"], ema_decay=1.0)


def test_state_restores_student_and_ema_and_refuses_another_selection():
    def trained(names, decay=0.9):
        return TrainedWeights(torch.nn.Linear(2, 2), names, decay)

    source, target = trained(["weight"]), trained(["weight"])
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.student["weight"], source.student["weight"])
    assert torch.equal(target.ema["weight"], source.ema["weight"])
    for other in (trained(["bias"]), trained(["weight"], None)):
        with pytest.raises(ValueError, match="checkpoint"):
            other.load_state_dict(source.state_dict())
