"""What every objective must do; a new method is one more row in OBJECTIVES."""

import pytest
import torch

from diffusers_safe.backbones import make_backbone
from diffusers_safe.training.objectives import SDDObjective, TrainingBatch
from diffusers_safe.training.objectives.retention import retention_loss
from diffusers_safe.training.predictor import Predictor
from diffusers_safe.weights import TrainedWeights, select_parameters


OBJECTIVES = {
    "sdd": SDDObjective(),
    "sdd-frozen": SDDObjective("frozen"),
    "sdd-anchored": SDDObjective("anchored"),
    "sdd-target-prompt": SDDObjective("anchored", "a cat"),
    "sdd-negative": SDDObjective("anchored", "", 0.2, "knife, gun"),
}
PROMPTS = ["knife", "gun", "a cat", "knife, gun"]


@pytest.fixture
def setting(tiny_pipeline):
    """A predictor whose student has left the frozen model, its weights, and a batch."""
    backbone = make_backbone(tiny_pipeline)
    weights = TrainedWeights(backbone.denoiser, select_parameters(backbone.denoiser, "xattn"), ema_decay=0.9)
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.student.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    batch = TrainingBatch(torch.randn((2, 4, 8, 8), generator=generator), torch.tensor([981, 301]), ["knife", "gun"])
    return Predictor(backbone, weights, PROMPTS), weights, batch


def predict_plainly(predictor, batch, prompts):
    pipeline = predictor.backbone.pipeline
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
    with_gradient = {n for n, p in predictor.backbone.denoiser.named_parameters() if p.grad is not None}
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


def test_an_anchored_target_is_frozen_and_the_students_own_unconditional_prediction_is_held_there(setting):
    predictor, weights, batch = setting
    with weights.use("frozen"):
        frozen_empty = predict_plainly(predictor, batch, ["", ""])
    drift = (predict_plainly(predictor, batch, ["", ""]) - frozen_empty).square().mean(dim=(1, 2, 3))
    expected = SDDObjective("frozen").loss(predictor, batch) + drift
    torch.testing.assert_close(SDDObjective("anchored").loss(predictor, batch).detach(), expected.detach())


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
    assert SDDObjective().loss(predictor, empty).tolist() == [0.0, 0.0]


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
    assert retention_loss(predictor, batch).tolist() == [0.0, 0.0]


def test_targets_of_one_model_are_one_forward_and_none_is_computed_twice(setting, monkeypatch):
    predictor, weights, batch = setting
    unet = predictor.backbone.denoiser
    plain, rows = unet.forward, []
    monkeypatch.setattr(
        unet, "forward", lambda sample, *rest, **more: rows.append(len(sample)) or plain(sample, *rest, **more)
    )
    lists = [["", ""], ["knife", "gun"], ["", ""]]
    targets = predictor.targets(batch.model_input, batch.timesteps, lists, "frozen")
    assert rows == [4]
    with weights.use("frozen"):
        for target, prompts in zip(targets, lists):
            torch.testing.assert_close(target, predict_plainly(predictor, batch, prompts), rtol=1e-4, atol=1e-5)
    rows.clear()
    SDDObjective("frozen", "", 0.5, "knife, gun").loss(predictor, batch)
    assert rows == [4, 2]  # "" and the negative prompt, frozen; the student


def test_unknown_target():
    with pytest.raises(ValueError, match="sdd_target 'teacher'.*student, frozen, anchored"):
        SDDObjective("teacher")
