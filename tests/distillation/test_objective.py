import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_safe.distillation.objective import (
    FEATURE_MAPS,
    DistillationObjective,
    FeatureTap,
    feature_pairs,
)
from diffusers_safe.families.students import build_student


LEVELS = range(4)
INPUTS = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900]))
STATES = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(make_tiny_pipeline):
    return make_tiny_pipeline().unet.eval()


def naive_features(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """A forward of a UNet written out, with what every block puts out."""
    sample, timesteps = INPUTS
    features, emb = {}, unet.time_embedding(unet.time_proj(timesteps))
    hidden = unet.conv_in(sample)
    skips = [hidden]
    for level, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for place, (resnet, attention) in enumerate(zip(block.resnets, attentions)):
            hidden = resnet(hidden, emb)
            if attention is not None:
                before = hidden
                hidden = attention(hidden, encoder_hidden_states=STATES, return_dict=False)[0]
                features[f"down_blocks.{level}.attentions.{place}.proj_out"] = hidden - before
            skips.append(hidden)
        if block.downsamplers is not None:
            hidden = block.downsamplers[0](hidden)
            skips.append(hidden)
        features[f"down_blocks.{level}"] = hidden
    if unet.mid_block is not None:
        hidden = unet.mid_block(hidden, emb, encoder_hidden_states=STATES)
        features["mid_block"] = hidden
    for level, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions):
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), emb)
            if attention is not None:
                hidden = attention(hidden, encoder_hidden_states=STATES, return_dict=False)[0]
        if block.upsamplers is not None:
            hidden = block.upsamplers[0](hidden)
        features[f"up_blocks.{level}"] = hidden
    return features


def alike(pairs):
    return [(name, name) for name in pairs]


DOWN, UP = [f"down_blocks.{i}" for i in LEVELS], [f"up_blocks.{i}" for i in LEVELS]
SHIFTED = [("up_blocks.0", "up_blocks.1"), ("up_blocks.1", "up_blocks.2"), ("up_blocks.2", "up_blocks.3")]
LAST_ATTENTIONS = ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out")
EXPECTED = {
    ("bk-base", "bk"): alike(DOWN + UP),
    ("bk-small", "bk"): alike(DOWN + UP),
    ("bk-tiny", "bk"): [*alike(DOWN[:2]), LAST_ATTENTIONS, *SHIFTED],
    ("bk-base", "bk+mid"): alike([*DOWN, "mid_block", *UP]),
    ("bk-base", "segmind"): alike([*DOWN, "mid_block", *UP]),
    ("bk-small", "segmind"): alike(DOWN + UP),
    ("bk-tiny", "segmind"): [*alike(DOWN[:2]), ("down_blocks.2", "up_blocks.0"), *SHIFTED],
}


@pytest.mark.parametrize(("kind", "feature_map"), EXPECTED)
def test_feature_maps_catch_what_the_blocks_put_out(teacher, kind, feature_map):
    student = build_student(teacher, kind)
    pairs = feature_pairs(student.config, teacher.config, feature_map)
    assert pairs == EXPECTED[kind, feature_map]
    for unet, names in zip((student, teacher), map(list, zip(*pairs))):
        tap = FeatureTap(unet, names)
        with torch.no_grad():
            expected = naive_features(unet)
            with tap:
                unet(*INPUTS, STATES)
        for name, caught in zip(names, tap.take(), strict=True):
            torch.testing.assert_close(caught, expected[name], atol=1e-4, rtol=1e-4)
    shapes = [[feature.shape for feature in naive_features(unet).values()] for unet in (student, teacher)]
    assert shapes[0] != shapes[1]  # they differ, and yet every pair fits
    objective = DistillationObjective()
    with tap, torch.no_grad():
        taught = teacher(*INPUTS, STATES).sample
    own = FeatureTap(student, [name for name, _ in pairs])
    with own:
        noise_pred = student(*INPUTS, STATES).sample
    losses = objective.losses(noise_pred, torch.zeros_like(noise_pred), taught, own.take(), tap.take())
    assert all(value.shape == (2,) and (value > 0).all() for value in losses.values())


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_teacher_that_teaches_itself_leaves_nothing_to_learn(teacher, feature_map):
    names = [name for name, _ in feature_pairs(teacher.config, teacher.config, feature_map)]
    tap, forwards = FeatureTap(teacher, names), []
    with torch.no_grad():
        for _ in range(2):
            with tap:
                forwards.append((teacher(*INPUTS, STATES).sample, tap.take()))
    (own, own_features), (taught, features) = forwards
    losses = DistillationObjective(task_weight=0).losses(own, torch.zeros_like(own), taught, own_features, features)
    assert losses.keys() == {"output", "feature"} and all(value.max() < 1e-9 for value in losses.values())


def test_the_terms_are_means_of_squares():
    def full(*values):
        return torch.tensor(values).view(2, 1, 1, 1).expand(2, 4, 3, 3)

    losses = DistillationObjective().losses(
        full(1.0, 2.0), full(0.0, 0.0), full(1.0, 5.0), [full(1.0, 1.0), full(2.0, 2.0)], [full(0.0, 1.0)] * 2
    )
    assert {name: value.tolist() for name, value in losses.items()} == {
        "task": [1, 4], "output": [0, 9], "feature": [1 + 4, 0 + 1],
    }  # fmt: skip


def test_a_tap_hears_only_inside_its_block(teacher):
    tap = FeatureTap(teacher, ["mid_block"])
    with torch.no_grad():
        with tap:
            teacher(*INPUTS, STATES)
        teacher(INPUTS[0] + 1, INPUTS[1], STATES)
        expected = naive_features(teacher)["mid_block"]
    torch.testing.assert_close(tap.take()[0], expected)


def test_bad_input_is_told(teacher):
    config = dict(teacher.config)
    for student, feature_map, message in (
        (config, "nota", "feature_map 'nota': unknown; allowed are bk, bk\\+mid, segmind"),
        ({**config, "mid_block_type": None}, "bk+mid", "must both have a mid block"),
        ({**config, "block_out_channels": (8, 24, 24)}, "bk", r"have \[8, 24, 24\] channels, the teacher's \[8, 16"),
        ({**config, "block_out_channels": (8, 16)}, "bk", "lack the teacher's deepest level"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_pairs(student, config, feature_map)
    with pytest.raises(ValueError, match="output_weight -1: must be at least 0"):
        DistillationObjective(output_weight=-1)
    with pytest.raises(ValueError, match="all are 0"):
        DistillationObjective(0, 0, 0)
    with pytest.raises(ValueError, match="feature_weight 1: alone it does not train the last layers"):
        DistillationObjective(0, 0, 1)
    with pytest.raises(ValueError, match="this denoiser has no mid_block"):
        FeatureTap(build_student(teacher, "bk-small"), ["mid_block"])
