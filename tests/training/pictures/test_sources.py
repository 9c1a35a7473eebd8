"""A sample is a function of its number, whichever process loads it; a stream continues after a stop."""

import json
from types import SimpleNamespace

import pytest
import torch

from diffusers_safe.diffusion.generators import sample_generator
from diffusers_safe.diffusion.sample_order import EpochOrder, choose_caption
from diffusers_safe.emoji.scenes import GROUPS, OBJECTS
from diffusers_safe.training.pictures import Preprocessing, make_pictures, open_dataset
from diffusers_safe.training.pictures import sources as pictures


SEED, SAMPLES_A_STEP = 3, 5
PREPROCESSING = Preprocessing(32, random_flip=True)


@pytest.fixture
def make():
    """The function `(data, num_workers=0, ...) -> PictureSource`."""
    return lambda data, **kwargs: make_pictures(data, PREPROCESSING, SEED, SAMPLES_A_STEP, **kwargs)


def same(first, second):
    return (
        first.captions == second.captions
        and torch.equal(first.pixel_values, second.pixel_values)
        and torch.equal(first.original_sizes, second.original_sizes)
        and torch.equal(first.crop_top_lefts, second.crop_top_lefts)
    )


def steps(source, numbers):
    return [source.batch(step, range(SAMPLES_A_STEP)) for step in numbers]


# --- random access ---------------------------------------------------------------------------------------------------


def test_samples_by_hand(make, data, emoji):
    for step, batch in enumerate(steps(make(data), range(7))):  # into the second epoch
        assert batch.pixel_values.shape == (SAMPLES_A_STEP, 3, 32, 32)
        for slot in range(SAMPLES_A_STEP):
            number = step * SAMPLES_A_STEP + slot
            epoch, place = divmod(number, len(emoji))
            row = torch.randperm(len(emoji), generator=sample_generator(SEED, "epoch", epoch))[place]
            image, caption = emoji[row]
            expected = PREPROCESSING(image.convert("RGB"), sample_generator(SEED, "picture", number))
            assert batch.captions[slot] == caption
            assert torch.equal(batch.pixel_values[slot], expected.pixel_values)
            assert batch.original_sizes[slot].tolist() == [64, 64]
            assert tuple(batch.crop_top_lefts[slot].tolist()) == expected.crop_top_left


def test_every_epoch_shows_every_row_once():
    order = EpochOrder(24, SEED)
    epochs = [[next(order.candidates(number)) for number in range(e * 24, (e + 1) * 24)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [next(order.candidates(number)) for number in range(24)] == epochs[0]  # also after others


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_and_workers_change_nothing(make, data, num_workers):
    whole = steps(make(data), range(4))
    source = make(data, num_workers=num_workers)
    for step in (2, 3, 0, 1):  # a resumed run begins anywhere
        for first, size in ((0, 1), (1, 1), (2, 3)):
            part = source.batch(step, range(first, first + size))
            assert part.captions == whole[step].captions[first : first + size]
            assert torch.equal(part.pixel_values, whole[step].pixel_values[first : first + size])


def test_prefetched_pictures_are_those_of_the_next_batch(make, data, monkeypatch):
    loaded = []
    source = make(data, num_workers=2)
    load = source._load
    monkeypatch.setattr(source, "_load", lambda number: loaded.append(number) or load(number))
    steps(source, range(3))
    source._pool.shutdown()
    assert sorted(loaded) == list(range(4 * SAMPLES_A_STEP))  # each once, one batch ahead


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_prefetch_their_own_samples(make, data, rank, monkeypatch):
    monkeypatch.setattr(pictures, "PartialState", lambda: SimpleNamespace(process_index=rank, num_processes=2))
    source = make_pictures(data, PREPROCESSING, SEED, 8)  # two batches of two a step
    following = source._following(0, range(2 * rank, 2 * rank + 2))
    expected = [4, 5, 8, 9, 12, 13]
    assert [next(following) for _ in expected] == [number + 2 * rank for number in expected]


def test_unreadable_pictures_are_replaced_and_counted(make, make_data, data):
    data_with_damage = make_data({4: b"no picture", 9: b""})
    source = make(data_with_damage)
    found, whole = steps(source, range(10)), steps(make(data), range(10))
    order = EpochOrder(24, SEED)
    for step in range(10):
        for slot in range(SAMPLES_A_STEP):
            number = step * SAMPLES_A_STEP + slot
            row = next(place for place in order.candidates(number) if place not in (4, 9))
            assert found[step].captions[slot] == data.captions(row)[0]
            if row == next(order.candidates(number)):
                assert torch.equal(found[step].pixel_values[slot], whole[step].pixel_values[slot])
    again = make(data_with_damage, num_workers=2)
    assert all(map(same, found, steps(again, range(10))))
    assert set(again.skipped().unreadable) == {"row 4, 4.png", "row 9, 9.png"}
    assert "2 images cannot be read, the first row " in str(again.skipped())
    resumed = make(data_with_damage)
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert resumed.skipped() == again.skipped()


@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_readable_pictures_is_refused(make, make_data, streaming):
    source = make(make_data(dict.fromkeys(range(24), b"no picture"), streaming=streaming))
    with pytest.raises(ValueError, match="cannot be read|is left"):
        source.batch(0, range(SAMPLES_A_STEP))


def test_captions_are_chosen():
    generator = torch.Generator().manual_seed(0)
    captions = ["a", "b", "c"]
    assert choose_caption(captions) == "a"
    assert {choose_caption(captions, generator) for _ in range(50)} == set(captions)
    chosen = [choose_caption(captions, generator, 0.3) for _ in range(300)]
    assert 60 < chosen.count("") < 120


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_stream(make, forms):
    """The function `(form, num_workers=0) -> StreamedPictures` with blocks of 7 rows."""

    def new(form="tars", **kwargs):
        return make(open_dataset(**forms[form], streaming=True), **{"shuffle_buffer": 7, **kwargs})

    return new


@pytest.mark.parametrize("form", ["tars", "parquet", "folder", "saved"])
def test_a_stream_shows_every_row_once_an_epoch(form, make_stream, emoji):
    source = make_stream(form)
    captions = [
        caption for batch in (source.batch(step, range(6)) for step in range(12)) for caption in batch.captions
    ]
    epochs = [captions[first : first + 24] for first in (0, 24, 48)]
    assert all(sorted(epoch) == sorted(caption for _, caption in emoji) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_files_of_a_stream_are_shuffled(make_stream, emoji):
    file_of = {caption: place // 8 for place, (_, caption) in enumerate(emoji)}
    source = make_stream(shuffle_buffer=1)
    captions = [source.batch(step, range(1)).captions[0] for step in range(24 * 4)]
    first_files = {file_of[captions[epoch * 24]] for epoch in range(4)}
    assert len(first_files) > 1


@pytest.mark.parametrize(["form", "num_workers"], [("tars", 3), ("parquet", 0), ("folder", 0), ("saved", 3)])
def test_a_resumed_stream_continues(form, num_workers, make_stream):
    whole = steps(make_stream(form, shuffle_buffer=10), range(9))
    for stop in (1, 4, 7):  # in a block, at the end of one, in the second epoch
        stopped, resumed = (make_stream(form, shuffle_buffer=10, num_workers=num_workers) for _ in range(2))
        before = steps(stopped, range(stop))
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        resumed.prepare()
        assert all(map(same, whole, [*before, *steps(resumed, range(stop, 9))]))


@pytest.mark.parametrize("form", ["tars", "folder"])  # split by files, and row by row
def test_processes_share_a_stream(form, make_stream, emoji, monkeypatch):
    world = 3 if form == "tars" else 2
    seen = []
    for rank in range(world):
        state = SimpleNamespace(process_index=rank, num_processes=world)
        monkeypatch.setattr(pictures, "PartialState", lambda state=state: state)
        source = make_stream(form)
        seen.append([source.batch(step, range(1)).captions[0] for step in range(24 // world)])
    assert sorted(caption for own in seen for caption in own) == sorted(caption for _, caption in emoji)


def test_a_stream_counts_what_it_skips(make, make_data):
    stream = make_data({2: b"no picture", 5: "a knife", 7: ""}, streaming=True, forbidden_concepts=["knife"])
    source = make(stream, shuffle_buffer=7)
    captions = [caption for batch in steps(source, range(4)) for caption in batch.captions]
    assert len(captions) == 20 and "a knife" not in captions and "" not in captions
    resumed = make(stream, shuffle_buffer=7, num_workers=2)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    resumed.batch(4, range(2))  # the last of the epoch, and the first of the next
    skipped = resumed.skipped()
    assert list(skipped.unreadable) == ["2.png"]
    assert set(skipped.dropped) == {"without a caption", "with a caption that names a forbidden concept"}


def test_a_stream_without_usable_rows_is_refused(make, make_data):
    source = make(make_data(streaming=True, forbidden_concepts=[*OBJECTS, *GROUPS], count=3))
    with pytest.raises(ValueError, match="no image of the stream is left; dropped: . rows with a caption that names"):
        source.batch(0, range(1))


def test_a_stream_needs_the_same_number_of_processes(make_stream):
    state = make_stream().state_dict()
    state["streams"] *= 2
    with pytest.raises(ValueError, match="resume_from_checkpoint: .* 2 then, 1 now"):
        make_stream().load_state_dict(state)


def test_part_of_a_stream(make, forms):
    source = make(open_dataset(**forms["tars"], streaming=True, max_train_samples=4), shuffle_buffer=2)
    captions = [source.batch(step, range(1)).captions[0] for step in range(12)]
    assert len(set(captions[:4])) == 4 and set(captions) == set(captions[:4])


def test_images_of_a_stream_are_those_of_the_rows(make_stream, emoji):
    by_caption = {caption: image for image, caption in emoji}
    batch = make_stream().batch(0, range(SAMPLES_A_STEP))
    for caption, pixel_values in zip(batch.captions, batch.pixel_values):
        plain = Preprocessing(32)(by_caption[caption].convert("RGB"), torch.Generator()).pixel_values
        assert torch.equal(pixel_values, plain) or torch.equal(pixel_values, plain.flip(-1))
