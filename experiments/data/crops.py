"""Parts of encoded images at one size: random-resized crops to train on, centre crops to evaluate on."""

import ctypes
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.data.decode import DEEP, undecodable
from pallas_kernels import native
from pallas_kernels.native.resize import resized

# Before an evaluation crop the shorter side is this many times the crop's: 256 for 224.
EVAL_RESIZE = 256 / 224
_LEAST_ASPECT, _TRIES = 3 / 4, 10

# (left, top, right, bottom) in pixels, from the upper left corner.
Box = tuple[float, float, float, float]


def random_box(random: np.random.Generator, width: int, height: int, least_area: float) -> Box:
    """Where a random-resized crop is taken, as the Inception nets were trained and PyTorch has it.

    The share of the area is uniform in [least_area, 1], the aspect ratio log-uniform in [3/4, 4/3], the place uniform;
    what does not fit is drawn again, ten times at most, and then the centre is taken, as far as the aspect allows.
    """
    for _ in range(_TRIES):
        area = width * height * random.uniform(least_area, 1.0)
        aspect = math.exp(random.uniform(math.log(_LEAST_ASPECT), -math.log(_LEAST_ASPECT)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide = min(width, height / _LEAST_ASPECT)
    high = min(height, width / _LEAST_ASPECT)
    return _centred(width, height, wide, high)


def centre_box(width: int, height: int) -> Box:
    """The part of an image that is left by a resize of its shorter side and a square centre crop."""
    side = min(width, height) / EVAL_RESIZE
    return _centred(width, height, side, side)


def _centred(width: int, height: int, wide: float, high: float) -> Box:
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


class _ArrowArray(ctypes.Structure):
    """As Arrow's C data interface lays it out, as far as it is read here."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _resized(image: Any, box: Box, size: int) -> np.ndarray:
    """A part of an RGB image of Pillow's. Its own resize takes half as long as decoding, and may round otherwise."""
    from PIL import Image

    image.load()
    try:
        # Pillow's own memory, without a copy: four bytes a pixel.
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError):  # Pillow before 11.2; an image of so many pixels that it is in pieces
        capsule = None
    # PILLOW_ALIGNMENT parts the lines, and the capsule does not say so.
    if capsule is None or Image.core.get_alignment() != 1 or native.why_not() is not None:
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    array = _ArrowArray.from_address(_pointer_of(capsule, b"arrow_array"))
    return resized(array.children[0].contents.buffers[1], (image.height, image.width), box, size)


def resized_crop(data: bytes, size: int, box_of: Callable[[int, int], Box], *, draft: bool) -> np.ndarray:
    """Decodes an image file and scales a part of it to a square, smoothed (antialiased bilinear).

    Args:
        data: PNG, JPEG, WebP, BMP or PPM; grey, palette, CMYK and transparent ones become RGB.
        size: The square's side.
        box_of: (width, height) -> the part.
        draft: Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size where the part stays at least `size` wide and high:
            faster, and not quite the same pixels.

    Returns:
        uint8 (size, size, 3).

    Raises:
        ValueError: If it is broken, or has more than 8 bits a channel. The message begins with
            what is wrong, for the caller to say of which image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.decodermaxblock = len(data)  # a JPEG's decoder is called once
            mode, width, height = image.mode, *image.size
            if mode not in DEEP:
                box = box_of(width, height)
                if draft:
                    share = size / min(box[2] - box[0], box[3] - box[1])
                    # No-op for other formats, and where it would become too small.
                    image.draft(None, (math.ceil(width * share), math.ceil(height * share)))
                    across, down = image.width / width, image.height / height
                    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
                # By way of RGBA: Pillow warns of palettes whose transparency it drops.
                whole = image.convert("RGBA") if "transparency" in image.info else image
                colour = whole if whole.mode == "RGB" else whole.convert("RGB")
                return _resized(colour, box, size)
    except Exception as error:  # Damage surfaces as OSError, SyntaxError, struct.error and others.
        raise undecodable(data, error) from error
    raise ValueError(f"has pixels of mode {mode!r}; expected 8 bits a channel")
