"""A part of an image at another size, by the native library, which gives up the interpreter's lock meanwhile."""

import ctypes

import numpy as np

from pallas_kernels import native


def resized(pixels: int, shape: tuple[int, int], box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """A part scaled to a square, antialiased, bilinear: as ``PIL.Image.Image.resize`` does, but for rounding.

    Args:
        pixels: address of ``shape`` pixels of four bytes, red, green, blue and one more, row by row.
        shape: (height, width).
        box: (left, top, right, bottom) of the part, in pixels; read as float32, as Pillow does.
        size: the square's side.

    Returns:
        uint8 (size, size, 3).

    Raises:
        ValueError: the part is not inside of the image, or has no width or height.
        RuntimeError: there is no native library.
        MemoryError: there is not enough.
    """
    (height, width), (left, top, right, bottom) = shape, (ctypes.c_float(side).value for side in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height) or size < 1:
        raise ValueError(
            f"box={box} of {width}x{height} pixels at size={size}: expected a part with pixels, and a side"
        )
    result = np.empty((size, size, 3), np.uint8)
    failed = native.library().clicktrain_resize(
        ctypes.c_void_p(pixels),
        *map(ctypes.c_int64, shape),
        *map(ctypes.c_float, box),
        ctypes.c_int64(size),
        ctypes.c_void_p(result.ctypes.data),
    )
    if failed:
        raise MemoryError(f"scaling {width}x{height} pixels to {size}x{size}")
    return result
