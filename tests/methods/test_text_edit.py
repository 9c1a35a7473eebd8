"""The closed form of this package, on a tiny model of real classes and on random vectors."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_safe import cli, erase
from diffusers_safe.families import make_family
from diffusers_safe.methods import text_edit
from diffusers_safe.methods.closed_form import EncodedPrompts, vocabulary_prompts, vocabulary_words
from diffusers_safe.methods.text_edit import CONTEXTS, PHRASINGS, Target, TextEdit, smallest_edit, some_forms
from diffusers_safe.methods.vocabulary import NO_ANCHORS, OBJECTS


pytestmark = pytest.mark.usefixtures("on_cpu")
FORMS = ["{x}", "{a}", "{a} on a red background", "{a} in sketch style", "{x}, white background",
         "{a} on a blue background in sepia style"]  # fmt: skip


def layers(pipeline):
    return {name: value.detach().double().clone() for name, value in pipeline.unet.named_parameters()
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}  # fmt: skip


def states(pipeline, prompt):
    tokens = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        return pipeline.text_encoder(tokens.input_ids)[0][0].double()


def remaining(pipeline, before, concept, anchor):
    """sqrt(mean ||W' c - W a||^2 / mean ||W c - W a||^2) over layers and tokens behind the first that differs."""
    after, square, whole = layers(pipeline), 0.0, 0.0
    for form in FORMS:
        c, a = (states(pipeline, form.format(x=name, a=f"a {name}")) for name in (concept, anchor))
        first = int((c != a).any(dim=1).int().argmax())
        for name, weight in before.items():
            square += ((c[first:] @ after[name].T) - (a[first:] @ weight.T)).square().sum()
            whole += ((c[first:] - a[first:]) @ weight.T).square().sum()
    return float((square / whole) ** 0.5)


@pytest.mark.parametrize("tolerance", [0.5, 0.7])
def test_the_concept_is_read_as_the_anchor_within_the_tolerance(tolerance, tiny_pipeline):
    before = layers(tiny_pipeline)
    erasure = erase(tiny_pipeline, ["knife"], "text_edit", anchor_prompts=["tree"], tolerance=tolerance)
    assert remaining(tiny_pipeline, before, "knife", "tree") == pytest.approx(tolerance, rel=0.05)
    assert erasure.weights.keys() == before.keys()
    assert erasure.measured["concept_left"] < 1 and erasure.measured["drift"] > 0


def test_what_is_kept_moves_less_with_a_larger_tolerance(make_tiny_pipeline):
    moved = {}
    for tolerance in (0.5, 0.8):
        pipeline = make_tiny_pipeline()
        before = layers(pipeline)
        erase(pipeline, ["knife"], "text_edit", anchor_prompts=["tree"], tolerance=tolerance)
        cat = states(pipeline, "a cat")
        moved[tolerance] = sum((cat @ (value - before[name]).T).norm() for name, value in layers(pipeline).items())
    assert 0 < moved[0.8] < 0.7 * moved[0.5]


def test_retained_prompts_move_less(make_tiny_pipeline):
    prompt, moved = "two old dogs and a gun on the moon", []
    for retained in ([], [prompt]):
        pipeline = make_tiny_pipeline()
        before = layers(pipeline)
        erase(pipeline, ["knife"], "text_edit", anchor_prompts=["tree"], retain_prompts=retained)
        kept = states(pipeline, prompt)
        moved.append(sum((kept @ (value - before[name]).T).norm() for name, value in layers(pipeline).items()))
    assert moved[1] < 0.6 * moved[0]


def problem(count=2, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gram = torch.diag(torch.rand(width, generator=generator, dtype=torch.float64) + 0.5)
    kept = torch.randn(40, width, generator=generator, dtype=torch.float64)
    pairs = [torch.randn(2, 3, width, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [Target.of(c, a, gram) for c, a in pairs], pairs, kept.T @ kept / 40, gram


def test_no_other_edit_with_this_residual_changes_less():
    targets, ((c, a),), kept, gram = problem(count=1)
    change, left = smallest_edit(targets, kept, gram, 0.3)
    assert left.item() == pytest.approx(0.3, rel=0.02)

    def cost(edit):
        return (edit @ kept @ edit.T).trace()

    def residual(edit):
        remains = c @ edit.T - (a - c)
        return ((remains @ gram) * remains).sum()

    own, limit = cost(change), residual(change)
    assert limit == pytest.approx(left.item() ** 2 * float((((a - c) @ gram) * (a - c)).sum()), rel=1e-4)
    # The costs of both are weighted by the layers, `gram`: the edit is the same for every such weight.
    for seed in range(20):
        step = torch.randn(change.shape, generator=torch.Generator().manual_seed(seed), dtype=change.dtype)
        for size in (1e-3, -1e-3):
            other = change + size * step
            assert (gram @ (other @ kept @ other.T)).trace() + 1e-9 > (gram @ (change @ kept @ change.T)).trace() or (
                residual(other) > limit
            )
    assert own > 0


def test_each_of_several_concepts_has_its_own_weight():
    targets, pairs, kept, gram = problem(count=2)
    change, left = smallest_edit(targets, 1e-2 * kept, gram, 0.2)
    torch.testing.assert_close(left, torch.full((2,), 0.2, dtype=left.dtype), rtol=0.03, atol=0)
    for c, a in pairs:
        remains, whole = (((v @ gram) * v).sum() for v in (c @ change.T - (a - c), a - c))
        assert (remains / whole) ** 0.5 == pytest.approx(0.2, rel=0.03)


def test_a_concept_that_is_kept_as_well_is_reported_not_forced():
    generator = torch.Generator().manual_seed(0)
    c, a = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    gram = torch.eye(8, dtype=torch.float64)
    _, left = smallest_edit([Target.of(c, a, gram)], 1e4 * c.T @ c, gram, 0.2)
    assert left.item() > 0.9


def test_concepts_that_cannot_reach_the_tolerance_share_one_weight():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    gram, kept = torch.eye(8, dtype=torch.float64), 100 * torch.eye(8, dtype=torch.float64)
    change, left = smallest_edit([Target.of(c, a, gram) for c, a in pairs], kept, gram, 0.2)
    share = text_edit.MOST_WEIGHT / 2
    system = kept + 1e-4 * torch.eye(8, dtype=torch.float64) + share * sum(c.T @ c / 3 for c, _ in pairs)
    expected = torch.linalg.solve(system, share * sum(c.T @ (a - c) / 3 for c, a in pairs)).T
    torch.testing.assert_close(change, expected)
    assert (left > 0.2).all()


def test_more_concepts_are_kept_apart_from_words_in_more_contexts(tiny_pipeline):
    run = SimpleNamespace(family=make_family(tiny_pipeline), concepts=["knife"])
    alone, several = (vocabulary_prompts(run, None, CONTEXTS, each) for each in (1, 3))
    assert len(set(several)) == 3 * len(alone) and set(alone) < set(several)
    assert len(vocabulary_prompts(run, None, CONTEXTS, each=99)) == len(FORMS) * len(alone)


def test_of_a_large_vocabulary_near_words_and_a_broad_rest_are_kept(tiny_pipeline, monkeypatch):
    family = make_family(tiny_pipeline)
    monkeypatch.setattr(text_edit, "MOST_KEPT", 8)
    run = SimpleNamespace(family=family, concepts=["knife"])
    words = vocabulary_words(run)
    kept = TextEdit()._kept_prompts(run)
    named = [word for word in words if any(word in prompt.replace(",", "").split() for prompt in kept)]
    assert len(kept) == 8 and len(named) == 8 and named[:4] != words[:4]
    vectors = family.text_vectors(["knife", *words])
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=1)
    nearest = vectors[1:] @ vectors[0]
    assert words[nearest.argmax()] in named
    assert len(TextEdit()._kept_prompts(SimpleNamespace(family=family, concepts=["knife", "gun", "cat", "dog"]))) in (
        31,
        32,
    )


def test_many_concepts_have_fewer_phrasings_the_first_always():
    forms = list("abcdefgh")
    assert (
        some_forms(forms, 0, 1) == forms
        and some_forms(forms, 3, 1)[0] == "a"
        and set(some_forms(forms, 3, 1)) == set(forms)
    )
    assert some_forms(forms, 0, 100) == ["a", "b"] and some_forms(forms, 8, 100) == ["a", "c"]
    assert some_forms(["a"], 5, 100) == ["a"]


def test_the_anchor_is_the_nearest_known_word_and_is_printed(tiny_pipeline, caplog):
    family = make_family(tiny_pipeline)
    assert family.known_words(["cat", "zebra", "knife"]) == ["cat", "knife"]
    assert family.known_forms(PHRASINGS["object"]) == FORMS and CONTEXTS is PHRASINGS["object"]
    erase(tiny_pipeline, ["banana"], "text_edit")
    (line,) = [record.getMessage() for record in caplog.records if "becomes" in record.getMessage()]
    anchor = line.removeprefix("'banana' becomes '").partition("'")[0]
    assert anchor in family.known_words([anchor]) and anchor != "banana"


def test_a_style_has_phrasings_of_its_own(tiny_pipeline):
    before = layers(tiny_pipeline)
    erase(tiny_pipeline, ["sketch"], "text_edit", phrasings="style", anchor_prompts=["mosaic"])
    sketch, mosaic = (states(tiny_pipeline, f"a tree in {name} style") for name in ("sketch", "mosaic"))
    first = int((sketch != mosaic).any(dim=1).int().argmax())
    for name, weight in layers(tiny_pipeline).items():
        now = (sketch[first:] @ weight.T - mosaic[first:] @ before[name].T).norm()
        assert now < 0.6 * ((sketch - mosaic)[first:] @ before[name].T).norm()


@pytest.mark.parametrize("prompt, other, pairs", [
    ("a red gun, white cat", "a tree, white cat", "red-tree gun-tree ,-, white-white cat-cat"),
    ("a gun, white cat", "a red tree, white cat", "gun-tree ,-, white-white cat-cat"),
    ("a gun", "a tree", "gun-tree"),
])  # fmt: skip
def test_words_behind_a_concept_of_any_length_are_paired_with_themselves(prompt, other, pairs, tiny_pipeline):
    class Family:
        """States that tell which token they are of, and what is before them."""

        denoiser = tiny_pipeline.unet

        def text_states(self, prompts, device):
            tokens = tiny_pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
            return torch.stack([tokens, tokens.cumsum(dim=1)], dim=-1).float(), None

        def token_sequences(self, prompts):
            return [(slice(None), [tiny_pipeline.tokenizer(prompt).input_ids for prompt in prompts])]

    encoded = EncodedPrompts(SimpleNamespace(family=Family()), [prompt, other])
    erased, anchors = (side[:, 0].int().tolist() for side in encoded.aligned([prompt], [other]))
    tokenizer = tiny_pipeline.tokenizer
    found = [f"{tokenizer.decode([c]).strip()}-{tokenizer.decode([a]).strip()}" for c, a in zip(erased, anchors)]
    count = len(pairs.split())
    assert found[:count] == pairs.split() and set(found[count:]) == {f"{tokenizer.eos_token}-{tokenizer.eos_token}"}


def test_the_pooled_state_of_sdxl_is_read_as_the_anchors_and_sizes_as_before(make_tiny_xl_pipeline):
    pipeline = make_tiny_xl_pipeline()
    before = pipeline.unet.add_embedding.linear_1.weight.detach().clone()
    erase(pipeline, ["knife"], "text_edit", anchor_prompts=["tree"], tolerance=0.1, retain_prompts=["a cat"])
    after = pipeline.unet.add_embedding.linear_1.weight.detach()
    prompts = ["a knife", "a tree", "a cat"]
    pooled = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)[2]
    width = pooled.shape[1]
    assert width < before.shape[1] and torch.equal(before[:, width:], after[:, width:])
    knife, tree, cat = pooled @ before[:, :width].T
    edited_knife, edited_tree, edited_cat = pooled @ after[:, :width].T
    assert (edited_knife - tree).norm() < 0.3 * (knife - tree).norm()
    assert (edited_cat - cat).norm() < 0.2 * (edited_knife - knife).norm()


def test_nothing_has_to_be_named(tiny_model_folder, tmp_path, capsys):
    arguments = ["--pretrained_model_name_or_path", tiny_model_folder, "--output_dir", str(tmp_path / "out")]
    cli.main(["erase", "--method", "text_edit", "--concepts", "banana", *arguments, "--save", "both"])
    printed = capsys.readouterr().out
    assert "banana:" in printed and "of their effect on the prediction is left" in printed
    assert (tmp_path / "out" / "erased_weights.safetensors").exists()


def test_what_is_left_is_measured_against_the_anchor(make_tiny_pipeline):
    left = {}
    for tolerance in (0.5, 0.9):
        erasure = erase(make_tiny_pipeline(), ["knife"], "text_edit", anchor_prompts=["tree"], tolerance=tolerance)
        left[tolerance] = erasure.measured["concept_left"]
    assert -0.5 < left[0.5] < left[0.9] < 1


def test_the_chosen_anchor_is_in_the_record_and_gives_the_same_edit(make_tiny_pipeline):
    erasure = erase(make_tiny_pipeline(), ["banana", "gun"], "text_edit")
    chosen = erasure.record.arguments["anchor_prompts"]
    assert len(chosen) == 2
    again = erase(make_tiny_pipeline(), ["banana", "gun"], "text_edit", anchor_prompts=chosen)
    for name, value in again.weights.items():
        torch.testing.assert_close(value, erasure.weights[name])


def test_no_concept_becomes_a_weapon(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(text_edit, "OBJECTS", ["gun", "knife", "tree", "bomb", "child"])
    erasure = erase(tiny_pipeline, ["cat", "dog", "car"], "text_edit")
    assert erasure.record.arguments["anchor_prompts"] == ["tree"] * 3
    assert set(OBJECTS) >= NO_ANCHORS


def test_a_second_edit_does_not_undo_the_first(tiny_model_folder, tmp_path):
    base = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    folder = str(tmp_path / "first")
    first = erase(tiny_model_folder, ["knife"], "text_edit", anchor_prompts=["tree"], output_dir=folder)
    options = {"anchor_prompts": ["apple"], "tolerance": 0.65}
    second = erase(folder, ["gun"], "text_edit", **options)
    (tmp_path / "first" / "erasure.json").unlink()
    unaware = erase(folder, ["gun"], "text_edit", **options)
    knife = states(base, "a knife")
    moved = []
    for again in (second, unaware):
        before, after = layers(first.pipeline), layers(again.pipeline)
        moved.append(sum((knife @ (after[name] - before[name]).T).norm() for name in before))
    assert moved[0] < 0.8 * moved[1]
