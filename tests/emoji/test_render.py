from dataclasses import replace

import numpy as np
import pytest

from diffusers_safe.emoji.render import ARTWORK, RESOLUTION, SPRITES, load_sprite, render, render_many
from diffusers_safe.emoji.scenes import BACKGROUNDS, OBJECTS, Scene


SCENE = Scene("panda", "blue", None, size=48, center=(32, 32), turn=0, mirror=False, shade=1.0)


def pixels(**changes):
    return np.asarray(render(replace(SCENE, **changes))).astype(int)


def spread(picture):
    return np.ptp(picture, axis=2)


def covered(**changes):
    """The pixels of the object: those with the same color on black and on white."""
    on_black, on_white = pixels(background="black", **changes), pixels(background="white", **changes)
    return np.abs(on_black - on_white).max(axis=2) <= 1


def test_every_object_has_a_distinct_sprite():
    for artwork in ARTWORK:
        assert {path.stem for path in (SPRITES / artwork).glob("*.png")} == set(OBJECTS)
        assert (SPRITES / artwork / "LICENSE.txt").is_file()
        assert {load_sprite(name, artwork).size for name in OBJECTS} == {(64, 64)}
    looks = {pixels(name=name).tobytes() for name in OBJECTS}
    assert len(looks) == len(OBJECTS)
    for name in OBJECTS:
        assert 0.04 < covered(name=name).mean() < 0.6


def test_pictures_depend_on_seed_and_number():
    pictures, scenes = render_many(3, 0, 6)
    assert pictures.shape == (6, RESOLUTION, RESOLUTION, 3) and pictures.dtype == np.uint8
    again, same_scenes = render_many(3, 4, 2)
    assert np.array_equal(again, pictures[4:]) and same_scenes == scenes[4:]
    other, _ = render_many(4, 0, 6)
    assert not np.array_equal(other, pictures)
    assert np.array_equal(np.asarray(render(scenes[1])), pictures[1])


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_corners_have_the_colour_of_the_background(background):
    picture = pixels(background=background, size=38)
    for row, light in ((0, 1.05), (-1, 0.95)):
        for column in (0, -1):
            expected = np.minimum(np.array(BACKGROUNDS[background]) * light, 255)
            assert np.abs(picture[row, column] - expected).max() <= 3
    darker = pixels(background=background, size=38, shade=0.92)
    assert darker[0, 0].sum() < picture[0, 0].sum()


def test_mirror_flips_left_and_right():
    straight, mirrored = pixels(name="gun"), pixels(name="gun", mirror=True)
    assert np.abs(mirrored[:, ::-1] - straight).max() <= 2
    assert np.abs(mirrored - straight).max() > 50


def test_size_scales_the_object():
    small, large = covered(name="donut", size=38).sum(), covered(name="donut", size=54).sum()
    assert large / small == pytest.approx((54 / 38) ** 2, rel=0.1)


def test_center_moves_the_object():
    moved = covered(name="donut", center=(35, 30), size=40)
    there = np.roll(covered(name="donut", size=40), (-2, 3), axis=(0, 1))
    assert (moved == there).mean() > 0.995


def test_turn_is_in_degrees_and_keeps_the_shape():
    quarter, straight = covered(name="gun", turn=90), covered(name="gun")
    assert max((quarter == np.rot90(straight, turns)).mean() for turns in (1, 3)) > 0.98
    assert (covered(name="gun", turn=20) != straight).mean() > 0.02


def test_mosaic_is_tiles_of_one_colour_with_dark_joints():
    tiles = pixels(style="mosaic").reshape(16, 4, 16, 4, 3)
    inside = tiles[:, :3, :, :3]
    assert (inside == inside[:, :1, :, :1]).all()
    joints = np.concatenate([tiles[:, 3].reshape(-1, 3), tiles[:, :, :, 3].reshape(-1, 3)])
    assert joints.mean() < 0.7 * inside.mean()
    plain = pixels().reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(inside[:, 0, :, 0] - plain).max() <= 2  # what the tile covers


@pytest.mark.parametrize("name", ["strawberry", "frog", "cake"])
def test_sketch_takes_the_objects_colours_and_leaves_the_background(name):
    object_here = covered(name=name)
    sketch, plain = pixels(name=name, style="sketch"), pixels(name=name)
    assert spread(plain)[object_here].mean() > 40
    assert spread(sketch)[object_here].max() <= 3
    assert sketch[object_here].min() < 90 and sketch[object_here].max() > 180  # lines on paper
    assert np.array_equal(sketch[:4], plain[:4])


@pytest.mark.parametrize("name", ["frog", "strawberry", "penguin"])
def test_sepia_is_brown_all_over_the_object_and_tints_the_background(name):
    object_here = covered(name=name)
    sepia, plain = pixels(name=name, style="sepia"), pixels(name=name)
    red, green, blue = np.moveaxis(sepia[object_here], -1, 0)
    assert (red >= green).all() and (green >= blue).all() and (red - blue).mean() > 20
    assert spread(sepia)[0, 0] < spread(plain)[0, 0] and not np.array_equal(sepia[0, 0], plain[0, 0])
