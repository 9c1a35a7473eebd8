import json
import pickle

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from diffusers_safe.metrics.q16 import Q16, convert, read_prompts
from metric_models import WIDTH, pictures, rows_of, save_tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def prompts(tmp_path):
    array = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float16)
    path = tmp_path / "prompts.p"
    path.write_bytes(pickle.dumps(array))
    return path, array


def test_scores_are_the_softmax_of_100_times_the_cosines(clip, prompts, on_cpu):
    path, array = prompts
    metric = Q16(path, str(clip))
    images = pictures(5)
    scores = metric.score(images, rows_of(5))

    model = CLIPModel.from_pretrained(clip)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = np.stack([((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1) for image in images])
    with torch.no_grad():
        hidden = model.vision_model(torch.tensor(pixels, dtype=torch.float32)).pooler_output
        embedded = model.visual_projection(hidden).double().numpy()
    for score, image in zip(scores, embedded):
        logits = [100 * image @ v / np.linalg.norm(image) / np.linalg.norm(v) for v in array.astype(float)]
        assert score["probability"] == pytest.approx(1 / (1 + np.exp(logits[0] - logits[1])), abs=1e-3)
    assert len({score["probability"] for score in scores}) == 5
    assert [metric.values({}, score)["q16"] for score in scores] == [float(s["probability"] > 0.5) for s in scores]
    json.dumps(metric.identity())
    other = Q16(path, str(clip))
    other.prompts = other.prompts.flip(0)
    assert other.identity() != metric.identity()
    swapped = other.score(images, rows_of(5))
    assert [s["probability"] for s in swapped] == pytest.approx([1 - s["probability"] for s in scores], abs=1e-5)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_pickles_of_all_times(tmp_path, prompts, protocol, module):
    array = prompts[1]
    data = pickle.dumps(array, protocol)
    if protocol < 4:  # later ones write lengths
        data = data.replace(b"numpy._core.multiarray", module)
    (tmp_path / "old.p").write_bytes(data)
    assert np.array_equal(read_prompts(tmp_path / "old.p"), array.astype(np.float32))
    convert(tmp_path / "old.p", tmp_path / "new.safetensors")
    assert np.array_equal(read_prompts(tmp_path / "new.safetensors"), array.astype(np.float32))


class Evil:
    def __reduce__(self):
        return eval, ("open('called', 'w')",)


def test_a_pickle_calls_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.p").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="calls builtins.eval"):
        read_prompts("evil.p")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "list"),
        (pickle.dumps(np.zeros((2, 4), int)), "int64"),
        (pickle.dumps(np.ones((3, 4))), "2 vectors"),
        (pickle.dumps(np.zeros((2, 4))), "a vector is zero"),
        (b"no pickle", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    (tmp_path / "file.p").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "file.p")


def test_what_is_missing_is_named(clip, prompts, tmp_path):
    for path in (None, tmp_path / "absent.p"):
        with pytest.raises(ValueError, match="prompts.p of https://github.com/ml-research/Q16"):
            Q16(path, str(clip))
    with pytest.raises(ValueError, match="q16_model '.*absent': cannot be loaded; give a CLIP ViT-L/14"):
        Q16(prompts[0], str(tmp_path / "absent"))
    (tmp_path / "wide.p").write_bytes(pickle.dumps(np.ones((2, 768), np.float16)))
    with pytest.raises(ValueError, match=f"768 numbers, but .* in {WIDTH}"):
        Q16(tmp_path / "wide.p", str(clip))
    with pytest.raises(ValueError, match="safetensors"):
        convert(prompts[0], tmp_path / "prompts.npy")
