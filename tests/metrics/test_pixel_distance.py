import numpy as np
import pytest

from diffusers_safe.metrics.pixel_distance import pixel_distance


def test_from_0_for_equal_to_1_for_black_against_white():
    black, white = np.zeros((3, 8, 8, 3), np.uint8), np.full((3, 8, 8, 3), 255, np.uint8)
    assert pixel_distance(black, black).tolist() == [0, 0, 0]
    assert pixel_distance(black, white).tolist() == pixel_distance(white, black).tolist() == [1, 1, 1]
    white[1] = 51
    assert pixel_distance(black, white) == pytest.approx([1, 0.2, 1])


def test_rejects_images_that_do_not_fit():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="must be the same"):
        pixel_distance(images, images[:2])
    with pytest.raises(ValueError, match="float32"):
        pixel_distance(images, images.astype(np.float32))
