"""A word is learned: what moves, what is saved, what a stop costs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from closeness import ROUNDING, difference
from diffusers_safe.attacks import InversionSettings, token_learning
from diffusers_safe.attacks.token import added_token, read_token, text_parts
from diffusers_safe.attacks.token_learning import TOKEN, learn_token
from diffusers_safe.families import make_family


SETTINGS = InversionSettings(steps=4, batch_size=2, learning_rate=0.05, checkpointing_steps=2, seed=3)
CAPTIONS = [f"a {TOKEN}", f"a {TOKEN} on a red background", f"a {TOKEN}"]
PROMPTS = ["a cat", f"a {TOKEN}", f"a {TOKEN} on a blue background"]


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)) for i in range(3)]


@pytest.fixture(params=["make_tiny_pipeline", "make_tiny_sd_2_pipeline", "make_tiny_xl_pipeline"])
def pipeline(request):
    return request.getfixturevalue(request.param)()


def weights_of(pipeline):
    return {
        f"{name}.{key}": value.clone()
        for name, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for key, value in module.state_dict().items()
    }


def learn(pipeline, pictures, folder, settings=SETTINGS, captions=CAPTIONS, **changes):
    return learn_token(pipeline, pictures, captions, folder, settings, "knife", 16, **changes)


def encoded(pipeline, prompts=PROMPTS):
    return make_family(pipeline).encode(prompts)


def load(pipeline, path):
    """As a user would, without anything of ours."""
    tensors = load_file(path)
    if len(text_parts(pipeline)) == 1:
        pipeline.load_textual_inversion(str(path))
        return
    for (tokenizer, encoder), name in zip(text_parts(pipeline).values(), ("clip_l", "clip_g")):
        pipeline.load_textual_inversion(tensors[name], token=TOKEN, tokenizer=tokenizer, text_encoder=encoder)


def test_only_the_embedding_moves_and_stock_diffusers_loads_it(pipeline, pictures, tmp_path, monkeypatch):
    before, words = weights_of(pipeline), [len(tokenizer) for tokenizer, _ in text_parts(pipeline).values()]
    grads = []
    add = token_learning.added_token

    def watched(pipeline, token, vectors):
        grads.append((pipeline, vectors))
        return add(pipeline, token, vectors)

    monkeypatch.setattr(token_learning, "added_token", watched)
    path = learn(pipeline, pictures, tmp_path)
    (_, vectors), *_ = grads
    assert len(vectors) == len(words) and all(vector.grad.abs().sum() > 0 for vector in vectors)
    encoders = [encoder for _, encoder in text_parts(pipeline).values()]
    assert all(parameter.grad is None for encoder in encoders for parameter in encoder.parameters())
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())
    after = weights_of(pipeline)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [len(tokenizer) for tokenizer, _ in text_parts(pipeline).values()] == words
    assert not (tmp_path / "checkpoint.safetensors").exists()

    for (tokenizer, encoder), vector in zip(text_parts(pipeline).values(), read_token(path)[1]):
        row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("knife</w>")]
        assert vector.shape == row.shape and 0 < (vector - row).abs().max() <= 4 * 0.05 + 1e-6  # 4 steps of Adam

    token, vectors, _ = read_token(path)
    with added_token(pipeline, token, vectors):
        ours = encoded(pipeline)
    apart = encoded(pipeline, ["a cat"])
    load(pipeline, path)
    theirs = encoded(pipeline)
    assert all(difference(ours[name], theirs[name]) < ROUNDING for name in ours)
    plain, learned = theirs["encoder_hidden_states"][:2]
    assert difference(apart["encoder_hidden_states"][0], plain) < ROUNDING < difference(learned, plain) / 10


def test_what_is_trained_with_is_what_the_saved_file_gives(tiny_pipeline, pictures, tmp_path):
    token, vectors, _ = read_token(learn(tiny_pipeline, pictures, tmp_path))
    with token_learning._learnable(tiny_pipeline, [torch.nn.Parameter(vector) for vector in vectors]):
        training = make_family(tiny_pipeline).encode_with_gradients(PROMPTS)
    with added_token(tiny_pipeline, token, vectors):
        images = tiny_pipeline(PROMPTS[1], num_inference_steps=1, height=16, width=16, output_type="np").images
        drawing = encoded(tiny_pipeline)
    assert difference(training["encoder_hidden_states"], drawing["encoder_hidden_states"]) < ROUNDING
    assert training["encoder_hidden_states"].requires_grad and images.shape == (1, 16, 16, 3)


def test_the_gradient_is_that_of_the_denoising_loss(tiny_pipeline, pictures):
    """Against finite differences of the loss computed through the table of embeddings itself, in float64."""
    vector = torch.nn.Parameter(torch.full((32,), 0.01))
    examples = token_learning.Examples(make_family(tiny_pipeline, 16), pictures, CAPTIONS, SETTINGS)
    with token_learning._learnable(tiny_pipeline, [vector]):
        examples.loss(0).backward()
    for module in (tiny_pipeline.unet, tiny_pipeline.text_encoder):
        module.double()
    examples.noise.add = lambda *args, add=examples.noise.add: _doubled(add(*args))
    place, losses = int(vector.grad.abs().argmax()), []
    for change in (1e-4, -1e-4):
        moved = vector.detach().double()
        moved[place] += change
        with torch.no_grad(), added_token(tiny_pipeline, TOKEN, [moved]):
            row = tiny_pipeline.text_encoder.get_input_embeddings().weight[-1]
            assert torch.equal(row, moved)
            losses.append(_loss_in_float64(examples))
    assert vector.grad[place].item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)


def _doubled(noisy):
    noisy.model_input, noisy.target = noisy.model_input.double(), noisy.target.double()
    return noisy


def _loss_in_float64(examples):
    family, size = examples.family, SETTINGS.batch_size
    places = [next(examples.order.candidates(number)) for number in range(size)]
    latents = family.draw_latents(examples.moments[places], examples._generators("latents", range(size)))
    noisy = examples.noise.add(latents, examples._generators("noise", range(size)))
    states = family.encode([CAPTIONS[place] for place in places])["encoder_hidden_states"]
    prediction = family.pipeline.unet(noisy.model_input, noisy.timesteps, states).sample
    return (prediction - noisy.target).square().mean().item()


def test_a_stopped_run_goes_on_to_the_same_word(tiny_pipeline, pictures, tmp_path, monkeypatch):
    whole = learn(tiny_pipeline, pictures, tmp_path / "whole")
    loss, seen = token_learning.Examples.loss, []

    def stop(self, step):
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss(self, step)

    monkeypatch.setattr(token_learning.Examples, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_pipeline, pictures, tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["checkpoint.safetensors"]
    resumed = learn(tiny_pipeline, pictures, tmp_path / "stopped")
    assert seen == [0, 1, 2, 3, 2, 3]  # from the checkpoint after two steps
    assert resumed.read_bytes() == whole.read_bytes()
    (tmp_path / "stopped" / "checkpoint.safetensors").write_bytes(b"left by a kill")
    learn(tiny_pipeline, pictures, tmp_path / "stopped")
    assert len(seen) == 6  # it is there
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [whole.name]


def test_an_embedding_that_is_not_finite_is_not_kept(tiny_pipeline, pictures, tmp_path, monkeypatch):
    def overflow(optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(FloatingPointError, match="inversion: step 1 left no finite embedding; learn more slowly"):
        learn(tiny_pipeline, pictures, tmp_path, InversionSettings(steps=1, batch_size=1))
    assert not list(tmp_path.iterdir())


def test_a_word_of_something_else_is_not_taken(tiny_pipeline, pictures, tmp_path, make_tiny_pipeline):
    path = learn(tiny_pipeline, pictures, tmp_path)
    changes = [
        {"pictures": pictures[::-1]},
        {"captions": CAPTIONS[::-1][:2] + [f"the {TOKEN}"]},
        {"settings": InversionSettings(**{**vars(SETTINGS), "steps": 5})},
        {"pipeline": make_tiny_pipeline(1)},
    ]
    for change in changes:
        with pytest.raises(ValueError, match="was learned on another model, from other images or with other sett"):
            learn(**{"pipeline": tiny_pipeline, "pictures": pictures, "folder": tmp_path, **change})
        learn(**{"pipeline": tiny_pipeline, "pictures": pictures, "folder": tmp_path, **change, "overwrite": True})
        learn(tiny_pipeline, pictures, tmp_path, overwrite=True)
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="no learned token of ours .*; delete it to learn anew"):
        learn(tiny_pipeline, pictures, tmp_path)


def test_a_checkpoint_of_something_else_or_a_broken_one_is_told(tiny_pipeline, pictures, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file({"0 vector": torch.zeros(32)}, checkpoint, {"state": json.dumps({"identity": {}, "step": 2})})
    with pytest.raises(ValueError, match="checkpoint.safetensors: is of another model"):
        learn(tiny_pipeline, pictures, tmp_path)
    for broken in (b"broken", (save_file({"0 vector": torch.zeros(32)}, checkpoint), checkpoint.read_bytes())[1]):
        checkpoint.write_bytes(broken)
        with pytest.raises(ValueError, match="checkpoint.safetensors: broken checkpoint"):
            learn(tiny_pipeline, pictures, tmp_path)


def test_models_that_cannot_learn_a_word_are_told(tiny_pipeline, pictures, tmp_path):
    tiny_pipeline.unet.half(), tiny_pipeline.vae.half(), tiny_pipeline.text_encoder.half()
    with pytest.raises(ValueError, match="dtype float16: .* use float32 or bfloat16"):
        learn(tiny_pipeline, pictures, tmp_path)
    with pytest.raises(ValueError, match="dict: this model family is not supported yet; supported pipelines are Stab"):
        learn({}, pictures, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_is_as_before_even_if_the_word_is_known(tiny_pipeline):
    before, tokenizer = weights_of(tiny_pipeline), tiny_pipeline.tokenizer
    with pytest.raises(ValueError, match="the tokenizer knows it already"):
        with added_token(tiny_pipeline, "knife</w>", [torch.zeros(32)]):
            pass
    after = weights_of(tiny_pipeline)
    assert tiny_pipeline.tokenizer is tokenizer and all(torch.equal(before[name], after[name]) for name in before)
