import numpy as np
import pytest
from PIL import Image

from diffusers_safe.report.grid import GRID_NAME, SampleGroup, draw_grid, save_grid


BLUE, RED = (0, 0, 255), (255, 0, 0)


def group(title="to erase", tone="gone", prompts=("a knife",), seeds=1, size=(64, 64)):
    before, after = (
        [[Image.new("RGB", size, colour) for _ in prompts] for _ in range(seeds)] for colour in (BLUE, RED)
    )
    return SampleGroup(title, tone, list(prompts), before, after)


def tiles(picture, colour):
    """Rows and columns of the middle of each square of one colour."""
    same = (np.asarray(picture) == colour).all(axis=2)
    rows = np.flatnonzero(np.diff(np.flatnonzero(same.any(axis=1)), prepend=-9) > 1)
    columns = np.flatnonzero(np.diff(np.flatnonzero(same.any(axis=0)), prepend=-9) > 1)
    return len(rows), len(columns), int(same.any(axis=1).argmax())


def test_every_prompt_is_a_column_and_every_seed_a_row_before_above_a_row_after():
    picture = draw_grid([group(prompts=["a", "b"], seeds=2), group("to keep", "kept", ["c"], seeds=2)], "caption")
    before, after = tiles(picture, BLUE), tiles(picture, RED)
    assert before[:2] == after[:2] == (2, 3)
    assert before[2] < after[2]


def test_other_shapes_keep_their_proportions():
    picture = np.asarray(draw_grid([group(size=(64, 32))]))
    blue = (picture == BLUE).all(axis=2)
    height, width = blue.any(axis=1).sum(), blue.any(axis=0).sum()
    assert width == pytest.approx(2 * height, abs=3)


def test_labels_are_drawn_and_long_prompts_do_not_leave_their_column():
    short, none = draw_grid([group(prompts=["a"])]), draw_grid([group(prompts=[" "])])
    assert short.size == none.size and short.tobytes() != none.tobytes()
    for prompt in ("word " * 60, "w" * 300):
        long = draw_grid([group(prompts=[prompt])])
        assert long.width == short.width and long.height < short.height + 60
        margin = np.asarray(long)[:, -20:]
        assert (margin == margin[0, 0]).all()


def test_a_black_image_says_so():
    black = [[Image.new("RGB", (8, 8))]]
    picture = draw_grid([SampleGroup("to erase", "gone", ["a"], black, black)])
    dark = (np.asarray(picture) == 0).all(axis=2)
    inside = np.asarray(picture)[dark.any(axis=1)][:, dark.any(axis=0)]
    assert (inside > 80).any()


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match='tone is "odd"; allowed are gone, kept'):
        group(tone="odd")
    with pytest.raises(ValueError, match="group to erase: needs an image of each prompt"):
        SampleGroup("to erase", "gone", ["a", "b"], [[Image.new("RGB", (8, 8))]], [[Image.new("RGB", (8, 8))]])
    with pytest.raises(ValueError, match="same number of seeds"):
        draw_grid([group(), group(seeds=2)])
    with pytest.raises(ValueError, match="at least one"):
        draw_grid([])


def test_it_is_saved_whole(tmp_path):
    path = save_grid(draw_grid([group()]), tmp_path)
    assert path.name == GRID_NAME and [item.name for item in tmp_path.iterdir()] == [GRID_NAME]
    with Image.open(path) as image:
        assert image.size == draw_grid([group()]).size
