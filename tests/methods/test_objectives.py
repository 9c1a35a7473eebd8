"""What every objective must do; a new method is one more row in OBJECTIVES."""

import pytest
import torch

from diffusers_safe.families import make_family
from diffusers_safe.methods import TrainingBatch
from diffusers_safe.methods.esd import ESDObjective
from diffusers_safe.methods.objective import targets
from diffusers_safe.methods.predictor import Predictor
from diffusers_safe.methods.retention import retention_loss
from diffusers_safe.methods.sdd import SDDObjective
from diffusers_safe.weights.trained import TrainedWeights, select_parameters


OBJECTIVES = {
    "sdd": SDDObjective(),
    "sdd-frozen": SDDObjective("frozen"),
    "sdd-target-prompt": SDDObjective("frozen", "a cat"),
    "sdd-negative": SDDObjective("student", "", 0.2, "knife, gun"),
    "esd": ESDObjective(),
    "esd-erase-from": ESDObjective(2.0, "a cat", "frozen"),
    "esd-to-nothing": ESDObjective(0.0),
}
PROMPTS = ["knife", "gun", "a cat", "knife, gun"]


@pytest.fixture
def setting(tiny_pipeline):
    """A predictor whose student has left the frozen model, its weights, and a batch."""
    family = make_family(tiny_pipeline)
    weights = TrainedWeights(family.denoiser, select_parameters(family.denoiser, "xattn"), ema_decay=0.9)
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.student.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    batch = TrainingBatch(torch.randn((2, 4, 8, 8), generator=generator), torch.tensor([981, 301]), ["knife", "gun"])
    return Predictor(family, weights, PROMPTS), weights, batch


def predict_plainly(predictor, batch, prompts):
    pipeline = predictor.family.pipeline
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(tokens)[0]
        return pipeline.unet(batch.model_input, batch.timesteps, states).sample


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_finite_per_sample_and_reaches_only_selected_weights(setting, name):
    predictor, weights, batch = setting
    loss = OBJECTIVES[name].loss(predictor, batch)
    assert loss.shape == (2,) and torch.isfinite(loss).all() and (loss > 0).all()
    loss.mean().backward()
    with_gradient = {n for n, p in predictor.family.denoiser.named_parameters() if p.grad is not None}
    assert with_gradient == set(weights.student)


def test_sdd_is_its_equation(setting):
    predictor, weights, batch = setting
    with_concept = predict_plainly(predictor, batch, batch.prompts)
    own_empty = predict_plainly(predictor, batch, ["", ""])
    with weights.use("frozen"):
        frozen_empty = predict_plainly(predictor, batch, ["", ""])
    for objective, target in ((SDDObjective(), own_empty), (SDDObjective("frozen"), frozen_empty)):
        expected = (target - with_concept).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(objective.loss(predictor, batch).detach(), expected)


@pytest.mark.parametrize("target", ["student", "frozen"])
def test_a_target_prompt_is_what_the_concept_becomes(setting, target):
    predictor, weights, batch = setting
    with weights.use(target):
        goal = predict_plainly(predictor, batch, ["a cat", "a cat"])
    expected = (goal - predict_plainly(predictor, batch, batch.prompts)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(SDDObjective(target, "a cat").loss(predictor, batch).detach(), expected)


@pytest.mark.parametrize("target", ["student", "frozen"])
def test_negative_guidance_moves_the_target_away_from_all_concepts(setting, target):
    predictor, weights, batch = setting
    with_concept = predict_plainly(predictor, batch, batch.prompts)
    own_empty = predict_plainly(predictor, batch, ["", ""])
    with weights.use("frozen"):
        frozen_empty = predict_plainly(predictor, batch, ["", ""])
        said = predict_plainly(predictor, batch, ["knife, gun"] * 2) - frozen_empty
    target_noise = (own_empty if target == "student" else frozen_empty) - 0.5 * said
    expected = (target_noise - with_concept).square().mean(dim=(1, 2, 3))
    objective = SDDObjective(target, "", 0.5, "knife, gun")
    torch.testing.assert_close(objective.loss(predictor, batch).detach(), expected)


def test_sdd_loss_is_zero_for_the_empty_concept(setting):
    predictor, _, batch = setting
    empty = TrainingBatch(batch.model_input, batch.timesteps, ["", ""])
    assert SDDObjective().loss(predictor, empty).max() < 1e-9


def test_retention_is_the_distance_to_the_frozen_model(setting):
    predictor, weights, batch = setting
    moved = retention_loss(predictor, batch)
    with weights.use("frozen"):
        frozen = predict_plainly(predictor, batch, batch.prompts)
    expected = (predict_plainly(predictor, batch, batch.prompts) - frozen).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(moved.detach(), expected)
    with torch.no_grad():
        for name, parameter in weights.student.items():
            parameter.copy_(weights.frozen[name])
    assert retention_loss(predictor, batch).max() < 1e-9 < moved.min() / 100


def test_targets_of_one_model_are_one_forward_and_none_is_computed_twice(setting, monkeypatch):
    predictor, weights, batch = setting
    unet = predictor.family.denoiser
    plain, rows = unet.forward, []
    monkeypatch.setattr(
        unet, "forward", lambda sample, *rest, **more: rows.append(len(sample)) or plain(sample, *rest, **more)
    )
    lists = [["", ""], ["knife", "gun"], ["", ""]]
    predictions = targets(predictor, batch, lists, "frozen")
    assert rows == [4]
    with weights.use("frozen"):
        for target, prompts in zip(predictions, lists):
            torch.testing.assert_close(target, predict_plainly(predictor, batch, prompts), rtol=1e-4, atol=1e-5)
    rows.clear()
    SDDObjective("frozen", "", 0.5, "knife, gun").loss(predictor, batch)
    ESDObjective().loss(predictor, batch)
    assert rows == [4, 2, 4, 2]  # nothing and the concepts by the frozen model; the student
    rows.clear()
    for objective in (SDDObjective("frozen"), ESDObjective(0.0), ESDObjective(0.0, "a cat")):
        objective.loss(predictor, batch)
    assert rows == [2, 2] * 3  # the target only, where nothing is moved away from


def test_unknown_target():
    with pytest.raises(ValueError, match="sdd_target 'teacher'.*student, frozen"):
        SDDObjective("teacher")


def test_esd_is_its_equation(setting):
    predictor, weights, batch = setting
    own = {prompt: predict_plainly(predictor, batch, [prompt] * 2) for prompt in ("a cat", "knife", "gun")}
    with weights.use("frozen"):
        empty = predict_plainly(predictor, batch, ["", ""])
        concept = predict_plainly(predictor, batch, batch.prompts)
        start = predict_plainly(predictor, batch, ["a cat", "a cat"])
    noise_pred = torch.stack([own["knife"][0], own["gun"][1]])
    torch.testing.assert_close(
        ESDObjective(0.0).loss(predictor, batch).detach(), (noise_pred - empty).square().mean(dim=(1, 2, 3))
    )
    expected = (noise_pred - (empty - 1.5 * (concept - empty))).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(ESDObjective(1.5).loss(predictor, batch).detach(), expected)
    expected = (own["a cat"] - (start - 1.5 * (concept - empty))).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(ESDObjective(1.5, "a cat").loss(predictor, batch).detach(), expected)


def test_erasing_a_concept_from_itself_is_the_papers_rule_with_eta_one_less(setting):
    """The code of 2025 with its negative_guidance 2 and no other prompt is the paper with eta 1."""
    predictor, _, batch = setting
    batch = TrainingBatch(batch.model_input, batch.timesteps, ["knife", "knife"])
    code, paper = ESDObjective(2.0, "knife"), ESDObjective(1.0)
    torch.testing.assert_close(code.loss(predictor, batch), paper.loss(predictor, batch))


def test_esd_refuses_bad_values():
    with pytest.raises(ValueError, match="negative_guidance_scale -1: must be at least 0"):
        ESDObjective(-1)
    with pytest.raises(ValueError, match="trajectory_weights 'ema'.*student, frozen"):
        ESDObjective(trajectory_weights="ema")
