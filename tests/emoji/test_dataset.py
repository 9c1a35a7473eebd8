import numpy as np
import pytest

from diffusers_safe.emoji.dataset import emoji_dataset
from diffusers_safe.emoji.render import render_many
from diffusers_safe.emoji.scenes import is_held_out


def test_columns_pictures_and_seed(tmp_path):
    data = emoji_dataset(8, seed=5, cache_dir=str(tmp_path))
    assert data.column_names == ["image", "caption", "object", "group", "background", "style"]
    pictures, scenes = render_many(5, 0, 8)
    for row, picture, scene in zip(data, pictures, scenes):
        assert np.array_equal(np.asarray(row["image"]), picture)
        assert row["object"] == scene.name and row["background"] == scene.background
        assert row["object"] in row["caption"] or row["group"] in row["caption"]
    longer = emoji_dataset(10, seed=5, cache_dir=str(tmp_path))
    assert longer["caption"][:8] == data["caption"][:8]
    assert emoji_dataset(8, seed=6, cache_dir=str(tmp_path))["caption"][:] != data["caption"][:]


def test_held_out_combinations_are_left_out_unless_asked_for(tmp_path):
    def held_out(data):
        return [
            is_held_out(name, background, None if style == "plain" else style)
            for name, background, style in zip(data["object"], data["background"], data["style"])
        ]

    assert not any(held_out(emoji_dataset(60, cache_dir=str(tmp_path))))
    assert any(held_out(emoji_dataset(60, hold_out=False, cache_dir=str(tmp_path))))


def test_no_images():
    with pytest.raises(ValueError, match="num_images 0"):
        emoji_dataset(0)
