import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_safe.weights import TRAIN_METHODS, TrainedWeights, select_parameters


@pytest.fixture(scope="module")
def sd_unet():
    """SD 1.x's UNet as it is, without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)


def test_published_sizes_on_sd_1(sd_unet):
    """80 tensors in `xattn`, 5 % of the UNet (SDD); 32 in `xattn-strict`."""
    sizes = {name: parameter.numel() for name, parameter in sd_unet.named_parameters()}
    chosen = select_parameters(sd_unet, "xattn")
    assert len(chosen) == 80
    assert 0.045 < sum(sizes[name] for name in chosen) / sum(sizes.values()) < 0.055
    assert len(select_parameters(sd_unet, "xattn-strict")) == 32
    assert len(select_parameters(sd_unet, "full")) == len(sizes) == 686


def test_rules(sd_unet):
    everything = set(select_parameters(sd_unet, "full"))
    chosen = {method: set(select_parameters(sd_unet, method)) for method in TRAIN_METHODS}
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
    with pytest.raises(ValueError, match="selects no parameter"):
        select_parameters(torch.nn.Linear(2, 2), "xattn")


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
            assert torch.equal(unet(*inputs).sample, base)
            with pytest.raises(RuntimeError, match="'frozen' are in use"), weights.use("ema"):
                pass
        with weights.use("student"):
            assert torch.equal(unet(*inputs).sample, student)
        with pytest.raises(KeyError), weights.use("frozen"):
            raise KeyError
        assert torch.equal(unet(*inputs).sample, student)
    assert not torch.equal(student, base)


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
