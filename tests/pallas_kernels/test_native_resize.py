"""The native resize beside its meaning in float64, and beside Pillow."""

import numpy as np
import pytest
from PIL import Image

from pallas_kernels import native
from pallas_kernels.native.resize import resized

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no native library")


def weights(length, begin, end, size):
    """(size, length): a triangle over the input's pixels, as wide as an output's step, and of sum 1."""
    scale = (end - begin) / size
    centres = begin + (np.arange(size)[:, None] + 0.5) * scale
    triangle = np.clip(1 - np.abs(np.arange(length) + 0.5 - centres) / max(scale, 1), 0, None)
    return triangle / triangle.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "box", "size"),
    [
        ((375, 500), (31, 8, 417, 300), 224),  # smaller
        ((60, 80), (11, 20, 42, 41), 224),  # larger
        ((500, 375), (0, 0, 375, 500), 64),
        ((90, 7), (1.25, 3.5, 6.75, 88.125), 33),  # parts of pixels
        ((1, 1), (0, 0, 1, 1), 3),
        ((224, 224), (0, 0, 224, 224), 224),
    ],
    ids=str,
)
def test_a_part_is_scaled_as_its_meaning_says(shape, box, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 4), np.uint8)
    found = resized(pixels.ctypes.data, shape, box, size)
    down, across = weights(shape[0], box[1], box[3], size), weights(shape[1], box[0], box[2], size)
    exact = np.einsum("yh,xw,hwc->yxc", down, across, pixels[..., :3].astype(float), optimize=True)
    assert found.shape == (size, size, 3) and np.abs(found - exact).max() < 1.01  # rounded twice
    image = Image.fromarray(pixels[..., :3])
    pillows = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box)).astype(int)
    assert np.abs(found - pillows).max() <= 1


@pytest.mark.parametrize("box", [(0, 0, 6, 5), (-1, 0, 5, 5), (2, 0, 2, 5), (0, 4, 5, 3)])
def test_a_part_that_is_not_there_is_refused(box):
    pixels = np.zeros((5, 5, 4), np.uint8)
    with pytest.raises(ValueError, match="of 5x5 pixels at size=2: expected a part with pixels"):
        resized(pixels.ctypes.data, (5, 5), box, 2)
