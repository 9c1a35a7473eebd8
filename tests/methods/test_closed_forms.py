"""Closed forms against a plain transcription of their equations, a layer and a token at a time, in float64."""

import pytest
import torch

from diffusers_safe import cli, erase
from diffusers_safe.methods.closed_form import check_distinct
from diffusers_safe.methods.speed import _fixed_tokens
from diffusers_safe.methods.uce import PHRASINGS


pytestmark = pytest.mark.usefixtures("on_cpu")
CONCEPTS, ANCHORS, KEPT = ["knife", "red gun"], ["an apple", "a tree"], ["a cat", "a big dog"]


def encoded(pipeline, prompt):
    """All states of a prompt, and the place of its last token of text: one before the end of text."""
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(tokens.input_ids)[0][0]
    return states.double(), int(tokens.attention_mask.sum()) - 2


def layers(pipeline):
    return {name: value.detach().double().clone() for name, value in pipeline.unet.named_parameters()
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}  # fmt: skip


def solve(weight, pairs, kept, erase_scale, retain_scale, identity_scale):
    """Equation 7 of UCE: (lambda W + e sum v c^T + p sum W k k^T) (lambda I + e sum c c^T + p sum k k^T)^-1."""
    left = identity_scale * weight
    right = identity_scale * torch.eye(weight.shape[1], dtype=torch.float64)
    for c, a in pairs:
        left = left + erase_scale * torch.outer(weight @ a, c)
        right = right + erase_scale * torch.outer(c, c)
    for k in kept:
        left = left + retain_scale * torch.outer(weight @ k, k)
        right = right + retain_scale * torch.outer(k, k)
    return left @ torch.inverse(right)


def last_pairs(pipeline, prompts, anchors):
    pairs = []
    for prompt, anchor in zip(prompts, anchors):
        (c, i), (a, j) = encoded(pipeline, prompt), encoded(pipeline, anchor)
        pairs.append((c[i], a[j]))
    return pairs


def tail_pairs(pipeline, prompts, anchors):
    pairs = []
    for prompt, anchor in zip(prompts, anchors):
        (c, i), (a, j) = encoded(pipeline, prompt), encoded(pipeline, anchor)
        pairs += zip(c[i : len(c) - max(0, j - i)], a[j : len(a) - max(0, i - j)], strict=True)
    return pairs


def check(pipeline, before, expected):
    parameters = dict(pipeline.unet.named_parameters())
    for name, weight in before.items():
        change = expected(weight) - weight
        assert change.norm() > 1e-3 * weight.norm()
        torch.testing.assert_close(parameters[name].detach().double() - weight, change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("anchors, kept, phrasings, preset, scales", [
    ([], [], "none", "2025", (1, 1, 0.5)),
    ([], KEPT, "none", "2025", (1, 1, 0.5)),
    (["art"], KEPT, "none", "2025-style", (1, 1, 0.5)),
    (ANCHORS, KEPT, "object", "2025", (1, 1, 0.5)),
    ([], [], "none", "2023", (1, 0.1, 0.5)),
    (ANCHORS, KEPT, "style", "2023", (1, 0.1, 0.5)),
])  # fmt: skip
def test_uce_is_equation_7(anchors, kept, phrasings, preset, scales, tiny_pipeline):
    before = layers(tiny_pipeline)
    given = {} if preset == "2025-style" or not anchors else {"anchor_prompts": anchors}
    erase(tiny_pipeline, CONCEPTS, "uce", preset=preset, phrasings=phrasings, retain_prompts=kept, **given)
    forms = ("{}", *PHRASINGS[phrasings])
    texts = [form.format(concept) for concept in CONCEPTS for form in forms]
    anchors = anchors or [""]
    names = [anchor for anchor in (anchors if len(anchors) > 1 else anchors * 2) for _ in forms]
    if preset == "2023":
        pairs = tail_pairs(tiny_pipeline, texts, names)
        retained = [k for prompt in kept or [""] for k in encoded(tiny_pipeline, prompt)[0]]
    else:
        pairs = last_pairs(tiny_pipeline, texts, names)
        retained = [states[i] for states, i in (encoded(tiny_pipeline, prompt) for prompt in kept)]
    check(tiny_pipeline, before, lambda weight: solve(weight, pairs, retained, *scales))


@pytest.mark.parametrize("kept", [[], KEPT])
def test_rece_edits_what_still_reads_as_the_concept(kept, tiny_pipeline):
    before = layers(tiny_pipeline)
    erase(tiny_pipeline, CONCEPTS, "rece", rounds=2, norm_scale=0.01, retain_prompts=kept)
    states = {prompt: encoded(tiny_pipeline, prompt)[0] for prompt in ["", *CONCEPTS, *kept]}
    pairs = tail_pairs(tiny_pipeline, CONCEPTS, ["", ""])
    everything = [k for prompt in ["", *kept] for k in states[prompt]]
    edited = {name: solve(weight, pairs, everything, 1, 1, 0.5) for name, weight in before.items()}
    for _ in range(2):
        system = 0.01 * torch.eye(len(states[""][0]), dtype=torch.float64)
        mixed = torch.zeros_like(system)
        for name, weight in before.items():
            system += edited[name].T @ edited[name]
            mixed += edited[name].T @ weight
        pairs = [(torch.inverse(system) @ mixed @ c, a)
                 for concept in CONCEPTS for c, a in zip(states[concept], states[""])]  # fmt: skip
        retained = [k for prompt in (kept or ["", ""]) for k in states[prompt]]
        edited = {name: solve(weight, pairs, retained, 1, 0.1, 0.1) for name, weight in edited.items()}
    parameters = dict(tiny_pipeline.unet.named_parameters())
    for name, expected in edited.items():
        torch.testing.assert_close(parameters[name].detach().double(), expected, rtol=1e-3, atol=1e-5)


def test_rece_without_rounds_is_uce_of_2023(make_tiny_pipeline):
    first, second = make_tiny_pipeline(), make_tiny_pipeline()
    erase(first, ["knife"], "rece", rounds=0)
    erase(second, ["knife"], "uce", preset="2023", retain_scale=1.0)
    for (name, value), other in zip(layers(first).items(), layers(second).values()):
        torch.testing.assert_close(value, other, msg=name)
    third = make_tiny_pipeline()
    erase(third, ["knife"], "rece", rounds=1)
    assert any(
        not torch.allclose(value, other) for value, other in zip(layers(third).values(), layers(first).values())
    )


def test_the_erased_token_is_read_as_the_anchor_and_the_retained_one_as_before(tiny_pipeline):
    before = layers(tiny_pipeline)
    options = {"identity_scale": 1e-6, "anchor_prompts": ["an apple"], "retain_prompts": ["a cat"]}
    erase(tiny_pipeline, ["knife"], "uce", **options)
    (knife, apple), = last_pairs(tiny_pipeline, ["knife"], ["an apple"])  # fmt: skip
    states, place = encoded(tiny_pipeline, "a cat")
    for name, weight in layers(tiny_pipeline).items():
        torch.testing.assert_close(weight @ knife, before[name] @ apple, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight @ states[place], before[name] @ states[place], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "text_edit"])
def test_sdxl_has_both_text_encoders_and_an_encoded_empty_prompt_as_anchor(method, make_tiny_xl_pipeline):
    pipeline = make_tiny_xl_pipeline()
    before = layers(pipeline)
    erasure = erase(pipeline, ["knife"], method)
    edited = {name for name in before if method != "speed" or "to_v" in name}
    pooled = {"add_embedding.linear_1.weight"} if method == "text_edit" else set()
    assert erasure.weights.keys() == edited | pooled and 0 < erasure.measured["drift"] < 3
    if method == "uce":
        states = pipeline.encode_prompt(["knife", ""], device="cpu", do_classifier_free_guidance=False)[0].double()
        place = len(pipeline.tokenizer("knife").input_ids) - 2
        assert states[1, 0].any()
        pairs = [(states[0, place], states[1, 0])]
        check(pipeline, before, lambda weight: solve(weight, pairs, [], 1, 1, 0.5))


@pytest.mark.parametrize("options, message", [
    ({"anchor_prompts": ["a tree", "an apple", "a dog"]}, "3 for 2 concepts; give one for all of them or one"),
    ({"anchor_prompts": ["a knife and fork"]}, "anchor_prompts 'a knife and fork': names knife, which is"),
    ({"identity_scale": 0}, "identity_scale 0: must be greater than 0"),
    ({"identity_scale": 1e-300}, "identity_scale 1e-300: the system to solve is singular; give a larger one"),
    ({"retain_prompts": ["two knives"]}, "names the concept 'knife'"),
    ({"tokens": "first"}, "tokens 'first': unknown; allowed are last, tail"),
    ({"learning_rate": 1e-3}, "learning_rate: no option of method 'uce'"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_changes_nothing(options, message, tiny_pipeline):
    before = layers(tiny_pipeline)
    with pytest.raises(ValueError, match=message):
        erase(tiny_pipeline, CONCEPTS, "uce", **options)
    assert all(torch.equal(value, before[name]) for name, value in layers(tiny_pipeline).items())


@pytest.mark.parametrize("anchor, message", [("KNIFE", "the anchor 'KNIFE'"), (" ", "the empty prompt")])
def test_a_concept_that_encodes_as_its_anchor_is_refused(anchor, message):
    vectors = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"concepts 'knife': encodes as {message} does"):
        check_distinct(vectors, torch.stack([vectors[1], vectors[1]]), ["gun", "knife"], ["a tree", anchor])


def test_more_concepts_than_dimensions_are_refused(tiny_pipeline):
    width = tiny_pipeline.text_encoder.config.hidden_size
    with pytest.raises(ValueError, match=f"concepts: {width + 1} at once are more than the {width} dimensions"):
        erase(tiny_pipeline, [f"{'knife ' * (1 + i // 26)}{chr(97 + i % 26)}" for i in range(width + 1)], "uce")


def test_a_closed_form_from_the_command_line(tiny_model_folder, tmp_path, capsys):
    arguments = ["--pretrained_model_name_or_path", tiny_model_folder, "--concepts", "knife", "red gun"]
    arguments += ["--anchor_prompts", "an apple", "a tree", "--output_dir", str(tmp_path / "out")]
    cli.main(["erase", "--method", "uce", *arguments, "--save", "partial"])
    assert "erased_weights.safetensors" in {path.name for path in (tmp_path / "out").iterdir()}
    cli.main(["erase", "--method", "rece", *arguments, "--overwrite"])
    assert "knife, red gun" in capsys.readouterr().out


def test_speed_is_its_closed_form_layer_by_layer(tiny_pipeline):
    before = {name: weight for name, weight in layers(tiny_pipeline).items() if "to_v" in name}
    keys = {name: weight for name, weight in layers(tiny_pipeline).items() if "to_k" in name}
    kept = ["a cat", "a dog", "a tree", "a big car", "an apple", "a fish"]
    options = {"augmentations": 0, "null_threshold": 1.0, "identity_scale": 0.5, "unconditional_slack": 0.3}
    erase(tiny_pipeline, CONCEPTS, "speed", retain_prompts=kept, anchor_prompts=ANCHORS, **options)
    pairs = last_pairs(tiny_pipeline, CONCEPTS, ANCHORS)
    square = sum(torch.outer(c, c) for c, _ in pairs) / 2
    cross = sum(torch.outer(a, c) for c, a in pairs) / 2
    tokens = [states[i] for states, i in (encoded(tiny_pipeline, prompt) for prompt in kept)]
    empty = encoded(tiny_pipeline, "")[0]
    fixed = _fixed_tokens(empty).T
    assert torch.equal(fixed[:, 0], empty[0])
    identity = torch.eye(len(square), dtype=torch.float64)
    parameters = dict(tiny_pipeline.unet.named_parameters())
    for name, weight in before.items():
        moved = [(weight @ (cross - square) @ torch.inverse(identity + square) @ k).norm() for k in tokens]
        chosen = [k for k, size in zip(tokens, moved) if size >= sum(moved) / len(moved)]
        assert 0 < len(chosen) < len(tokens)
        vectors, values, _ = torch.linalg.svd(sum(torch.outer(k, k) for k in chosen) / len(chosen))
        null = vectors[:, values < 1.0] @ vectors[:, values < 1.0].T
        m = torch.inverse(square @ null + 0.5 * identity)
        inner = torch.inverse(fixed.T @ null @ m @ fixed + 0.3 * torch.eye(fixed.shape[1], dtype=torch.float64))
        change = weight @ (cross - square) @ null @ (identity - m @ fixed @ inner @ fixed.T @ null) @ m
        torch.testing.assert_close(parameters[name].detach().double() - weight, change, rtol=1e-3, atol=1e-5)
        assert change.norm() > 1e-3 * weight.norm()
    assert all(torch.equal(parameters[name].detach().double(), weight) for name, weight in keys.items())


def test_speed_keeps_what_is_retained_and_the_empty_prompt(tiny_pipeline):
    before = {name: weight for name, weight in layers(tiny_pipeline).items() if "to_v" in name}
    erase(tiny_pipeline, ["knife"], "speed", retain_prompts=["a cat"], null_threshold=1e-8)
    states, place = encoded(tiny_pipeline, "a cat")
    knife, last = encoded(tiny_pipeline, "knife")
    start = encoded(tiny_pipeline, "")[0][0]
    for name, weight in layers(tiny_pipeline).items():
        if name in before:
            for kept in (states[place], start):
                torch.testing.assert_close(weight @ kept, before[name] @ kept, rtol=1e-3, atol=1e-4)
            assert (weight @ knife[last] - before[name] @ knife[last]).norm() > 1e-2


@pytest.mark.parametrize("method, tensors", [("uce", 8), ("rece", 8), ("text_edit", 8), ("speed", 4)])
def test_a_dry_run_says_what_would_be_edited(method, tensors, tiny_model_folder, tiny_pipeline, tmp_path, capsys):
    folder = str(tmp_path / "out")
    known = ["--pretrained_model_name_or_path", tiny_model_folder, "--concepts", "knife", "--output_dir", folder]
    cli.main(["erase", "--method", method, *known, "--dry_run"])
    count = len(layers(tiny_pipeline)) * tensors // 8
    assert f"edit       {count} of " in capsys.readouterr().out
    assert len(erase(tiny_pipeline, ["knife"], method).weights) == count
