"""Cached latents equal those that are encoded during training; a cache belongs to one model and one dataset."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusers_safe.diffusion.generators import sample_generator
from diffusers_safe.families import make_family
from diffusers_safe.training.pictures import (
    CachedLatents,
    EncodedLatents,
    LatentCache,
    Preprocessing,
    latent_cache,
    make_pictures,
    open_dataset,
)
from picture_files import encoded


SEED, SAMPLES_A_STEP = 3, 5
PREPROCESSING = Preprocessing(32, random_flip=True)
ROUNDING = 2**-11  # of float16, relative
BUILD = {"progress_bar": False, "batch_size": 3}


@pytest.fixture(scope="module")
def make_families(make_tiny_pipeline, make_tiny_xl_pipeline):
    return {"sd": make_family(make_tiny_pipeline(), 32), "xl": make_family(make_tiny_xl_pipeline(), 32)}


@pytest.fixture(params=["sd", "xl"])
def family(make_families, request):
    return make_families[request.param]


@pytest.fixture
def sd(make_families):
    return make_families["sd"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latent_cache, "ROWS_PER_FILE", 7)


@pytest.fixture
def make_cache(tmp_path):
    """The function `(data, family, preprocessing, name) -> LatentCache`, not built."""

    def make(data, family, preprocessing=PREPROCESSING, name="cache"):
        return LatentCache(tmp_path / name, data, preprocessing, family)

    return make


def built(cache):
    cache.build(**BUILD)
    return cache


def live(data, family, preprocessing=PREPROCESSING, **kwargs):
    return EncodedLatents(make_pictures(data, preprocessing, SEED, SAMPLES_A_STEP, **kwargs), family)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- content ---------------------------------------------------------------------------------------------------------


def test_cache_by_hand(make_cache, data, family, emoji):
    cache = built(make_cache(data, family))
    vae = family.pipeline.vae
    for place in (0, 8, 23):
        image, caption = emoji[place]
        pixels = Preprocessing(32)(image.convert("RGB"), torch.Generator()).pixel_values[None]
        for flip in (False, True):
            with torch.no_grad():
                expected = vae.encode(pixels.flip(-1) if flip else pixels).latent_dist.parameters
            torch.testing.assert_close(cache.moments([place], [flip]).float(), expected, rtol=ROUNDING, atol=1e-5)
        for name, value in family.encode([caption]).items():
            assert cache.conditioning([caption])[name].dtype == torch.float16
            torch.testing.assert_close(cache.conditioning([caption])[name].float(), value, rtol=ROUNDING, atol=1e-5)
    for name, value in family.encode([""]).items():
        torch.testing.assert_close(cache.conditioning([""])[name].float(), value, rtol=ROUNDING, atol=1e-5)
    with pytest.raises(ValueError, match="caption 'another': is not in the cache"):
        cache.conditioning(["another"])


def test_cached_latents_are_the_live_ones(make_cache, data, family):
    cached = CachedLatents(built(make_cache(data, family)), SEED, SAMPLES_A_STEP, proportion_empty_prompts=0.2)
    source = live(data, family, proportion_empty_prompts=0.2)
    empty = 0
    for step in range(6):  # into the second epoch
        first, second = source.batch(step, range(SAMPLES_A_STEP)), cached.batch(step, range(SAMPLES_A_STEP))
        assert first.captions == second.captions
        empty += first.captions.count("")
        torch.testing.assert_close(second.latents, first.latents, rtol=ROUNDING, atol=2e-4)
        assert second.latents.dtype == torch.float32
        assert first.conditioning.keys() == second.conditioning.keys()
        for name, value in first.conditioning.items():
            torch.testing.assert_close(second.conditioning[name], value, rtol=ROUNDING, atol=1e-5)
    assert 0 < empty < 30


def test_live_latents_by_hand(data, family):
    batch = live(data, family).batch(1, range(2, 4))
    pictures = make_pictures(data, PREPROCESSING, SEED, SAMPLES_A_STEP).batch(1, range(2, 4))
    vae = family.pipeline.vae
    for slot in range(2):
        with torch.no_grad():
            posterior = vae.encode(pictures.pixel_values[slot : slot + 1]).latent_dist
        noise = torch.randn(1, 4, 4, 4, generator=sample_generator(SEED, "latents", SAMPLES_A_STEP + 2 + slot))
        expected = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
        torch.testing.assert_close(batch.latents[slot : slot + 1], expected)
    assert batch.captions == pictures.captions


def test_sizes_of_the_pictures_are_part_of_the_conditioning_of_sdxl(make_cache, make_data, make_families):
    wide = encoded(Image.effect_noise((100, 50), 50).convert("RGB"))
    data, crop = make_data({0: wide}, count=1), Preprocessing(32, center_crop=True)
    xl = make_families["xl"]
    for source in (live(data, xl, crop), CachedLatents(built(make_cache(data, xl, crop)), SEED, SAMPLES_A_STEP)):
        assert source.batch(0, range(1)).conditioning["time_ids"].tolist() == [[50, 100, 0, 16, 32, 32]]


def test_latents_are_sampled_again_in_every_epoch(make_cache, make_data, sd):
    sd.pipeline.vae.quant_conv.bias.data[4:] += 3  # a very wide posterior
    try:
        source = CachedLatents(built(make_cache(make_data(count=1), sd, Preprocessing(32))), SEED, 1)
        first, second = (source.batch(step, range(1)).latents for step in range(2))
    finally:
        sd.pipeline.vae.quant_conv.bias.data[4:] -= 3
    assert (first - second).abs().mean() > 0.1


def test_texts_are_kept_once(make_cache, make_data, sd, forms):
    cache = built(make_cache(make_data({1: "a cat", 2: "a cat", 3: "a cat"}, count=4), sd))
    assert len(cache.captions) == 3  # with ""
    lists = make_cache(open_dataset(**forms["lists"]), sd, name="lists")
    assert {caption for place in range(24) for caption in lists.data.captions(place)} < set(lists.captions)


def test_captions_that_are_too_long_are_cut(make_cache, make_data, sd):
    long = "a cat, " * 60
    data = make_data({0: long}, count=2)
    cached = built(make_cache(data, sd)).conditioning([long])
    batch = live(data, sd).batch(0, range(2))
    row = batch.captions.index(long)
    assert (cached["encoder_hidden_states"][0] - batch.conditioning["encoder_hidden_states"][row]).abs().max() < 0.01


def test_neither_autoencoder_nor_text_encoder_runs(make_cache, data, sd, monkeypatch):
    cache = built(make_cache(data, sd))
    for encoder in sd.encoders.values():
        monkeypatch.setattr(encoder, "forward", None)
    monkeypatch.setattr(sd.pipeline.vae, "encode", None)
    built(make_cache(data, sd))  # a finished cache is only opened
    assert CachedLatents(cache, SEED, SAMPLES_A_STEP).batch(0, range(SAMPLES_A_STEP)).latents.shape == (5, 4, 4, 4)


def test_unreadable_pictures_are_replaced_as_without_a_cache(make_cache, make_data, sd):
    data = make_data({4: b"no picture", 9: b""})
    cached, source = CachedLatents(built(make_cache(data, sd)), SEED, SAMPLES_A_STEP), live(data, sd)
    for step in range(10):
        first, second = source.batch(step, range(SAMPLES_A_STEP)), cached.batch(step, range(SAMPLES_A_STEP))
        assert first.captions == second.captions
        torch.testing.assert_close(second.latents, first.latents, rtol=ROUNDING, atol=2e-4)
    assert cached.skipped() == source.skipped()
    assert set(cached.skipped().unreadable) == {"row 4, 4.png", "row 9, 9.png"}


# --- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """A forked process would wait for the OpenMP threads of its parent forever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_build_continues(one_thread, make_cache, data, sd, tmp_path, monkeypatch):
    whole = files(built(make_cache(data, sd, name="whole")).folder)

    def slowly(*args, encode=sd.encode_pictures):
        time.sleep(0.05)
        return encode(*args)

    monkeypatch.setattr(sd, "encode_pictures", slowly)
    process = multiprocessing.get_context("fork").Process(target=built, args=(make_cache(data, sd),))
    process.start()
    folder = tmp_path / "cache"
    deadline = time.monotonic() + 60
    while not (folder / "moments-00001.safetensors").is_file() and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert time.monotonic() < deadline
    left = files(folder)
    assert len([name for name in left if name.startswith("moments")]) < 4
    calls = []
    monkeypatch.setattr(
        sd, "encode_pictures", lambda *args, encode=sd.encode_pictures: calls.append(0) or encode(*args)
    )
    built(make_cache(data, sd))
    assert {name: content for name, content in files(folder).items() if ".partial" not in name} == whole
    assert len(calls) < 2 * 9  # pictures and flipped pictures of three batches per file


def test_processes_build_it_together(make_cache, data, sd, monkeypatch):
    whole = files(built(make_cache(data, sd, name="whole")).folder)
    barrier, encoded_by = threading.Barrier(2, timeout=60), []

    def state():
        rank = int(threading.current_thread().name)
        return SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=barrier.wait
        )

    def write(self, path, *args, write=LatentCache._write):
        encoded_by.append((threading.current_thread().name, path.name))
        write(self, path, *args)

    one_at_a_time = threading.Lock()

    def encode(*args, encode=sd.encode, **options):
        with one_at_a_time:  # processes have a tokenizer each; that of two threads keeps one setting of padding
            return encode(*args, **options)

    monkeypatch.setattr(sd, "encode", encode)
    monkeypatch.setattr(latent_cache, "PartialState", state)
    monkeypatch.setattr(LatentCache, "_write", write)
    caches = [make_cache(data, sd) for _ in range(2)]
    threads = [threading.Thread(target=built, args=(cache,), name=str(rank)) for rank, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert files(caches[0].folder) == whole
    assert {rank for rank, _ in encoded_by} == {"0", "1"} and len({name for _, name in encoded_by}) == len(whole) - 1
    assert all(cache.readable.all() for cache in caches)


STALE = {
    "resolution": ({"preprocessing": Preprocessing(24, random_flip=True)}, "resolution 32, not 24"),
    "flips": ({"preprocessing": Preprocessing(32)}, "random_flip True, not False"),
    "mode": ({"preprocessing": Preprocessing(32, "bicubic", random_flip=True)}, "lanczos, not bicubic"),
    "crop": ({"preprocessing": Preprocessing(32, center_crop=True, random_flip=True)}, "center_crop False, not True"),
    "rows": ({"count": 20}, r"data \w+, not \w+, samples 24, not 20"),
    "captions": ({"changes": {3: "another"}}, r"data \w+, not \w+\)"),
    "tokenizer": ({"pad_token": "!"}, r"tokenizer \w+, not \w+\)"),
    "model": ({"model": 1}, r"vae \w+, not \w+, text_encoder \w+, not \w+\)"),
}


@pytest.fixture
def finished(make_cache, make_data, sd):
    return built(make_cache(make_data(), sd))


@pytest.mark.parametrize("case", STALE)
def test_a_cache_with_other_settings_is_refused(case, finished, make_cache, make_data, sd, make_tiny_pipeline):
    changes, message = STALE[case]
    before = files(finished.folder)
    other = make_family(make_tiny_pipeline(changes["model"]), 32) if "model" in changes else sd
    if "pad_token" in changes:
        other = make_family(make_tiny_pipeline(), 32)
        other.pipeline.tokenizer.pad_token = changes["pad_token"]
    data = make_data(changes.get("changes"), changes.get("count", 24))
    with pytest.raises(ValueError, match=f"cache_latents .*/cache: belongs to other settings.*{message}") as error:
        make_cache(data, other, changes.get("preprocessing", PREPROCESSING))
    assert "\n" not in str(error.value) and files(finished.folder) == before


def test_damaged_files_and_files_of_another_cache_are_refused(finished, make_cache, make_data, sd, tmp_path):
    again = make_cache(finished.data, sd)
    path = finished.folder / "moments-00001.safetensors"
    other = built(make_cache(make_data(count=20), sd, name="other"))
    shutil.copy(other.folder / path.name, path)
    with pytest.raises(ValueError, match="moments-00001.safetensors: belongs to another cache; delete it"):
        again.build(**BUILD)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="moments-00001.safetensors: cannot be read"):
        again.build(**BUILD)
    path.unlink()
    built(again)


def test_data_that_cannot_be_cached_is_refused(make_cache, make_data, sd, monkeypatch):
    with pytest.raises(ValueError, match="cache_latents: a stream cannot be cached; leave out --streaming"):
        make_cache(make_data(streaming=True), sd)
    wide = make_data({3: encoded(Image.new("RGB", (70, 64)))}, count=5)
    with pytest.raises(
        ValueError, match="3.png has 70 x 64 pixels, and a random crop cannot be cached; also give --center_crop"
    ):
        make_cache(wide, sd).build(**BUILD)
    built(make_cache(wide, sd, Preprocessing(32, center_crop=True), name="center"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="GB are needed and 0.0 GB are free"):
        make_cache(make_data(), sd, name="full").build(**BUILD)
    monkeypatch.undo()
    monkeypatch.setattr(sd, "encode_pictures", lambda pixels, device: torch.full((len(pixels), 8, 4, 4), 1e6))
    with pytest.raises(ValueError, match="moments has values that are not finite, or too large for torch.float16"):
        make_cache(make_data(), sd, name="astray").build(**BUILD)


def test_a_cache_without_readable_pictures_is_refused(make_cache, make_data, sd):
    cache = built(make_cache(make_data(dict.fromkeys(range(3), b"no picture"), count=3), sd))
    with pytest.raises(ValueError, match="100 images in a row cannot be read; 3 images cannot be read, the first"):
        CachedLatents(cache, SEED, SAMPLES_A_STEP).batch(0, range(1))


@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_latents_are_the_same(forms, sd, streaming):
    data = open_dataset(**forms["tars"], streaming=streaming)
    source, resumed = live(data, sd), live(open_dataset(**forms["tars"], streaming=streaming), sd)
    whole = [source.batch(step, range(SAMPLES_A_STEP)) for step in range(2)]
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    resumed.prepare()
    last, again = (each.batch(2, range(SAMPLES_A_STEP)) for each in (source, resumed))
    assert torch.equal(last.latents, again.latents) and last.captions == again.captions
    assert not torch.equal(last.latents, whole[0].latents)
