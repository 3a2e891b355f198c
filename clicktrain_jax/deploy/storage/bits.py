"""Small numbers packed without gaps: so many bits each, whatever a byte holds."""

import math

import numpy as np


def width_of(count: int) -> int:
    """Bits that tell ``count`` values (0 to count - 1) apart; 0 for one value or none."""
    return max(count - 1, 0).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `pack` makes of ``count`` numbers of ``width`` bits."""
    return math.ceil(count * width / 8)


def pack(values: np.ndarray, width: int) -> bytes:
    """Pack numbers into ``width`` bits each.

    The lowest bits of all numbers stand first, then all second bits, and so on: every plane is one vectorised step.

    Args:
        values: bool or unsigned integers below ``2 ** width``, of any shape, read in C order.
        width: 0 to 32.

    Returns:
        `packed_bytes` (values.size, width) bytes; the bits that fill the last byte are 0.
    """
    values = np.asarray(values).reshape(-1)
    if width == 1:
        return np.packbits(values.astype(bool)).tobytes()
    planes = np.empty((width, values.size), bool)
    for bit in range(width):
        planes[bit] = (values >> bit) & 1
    return np.packbits(planes).tobytes()


def unpack(data: bytes | memoryview | np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse of `pack`.

    Args:
        data: at least `packed_bytes` (count, width) bytes; what follows them is not read.
        width: 0 to 32.
        count: how many numbers there are.

    Returns:
        (count,): uint8, uint16 or uint32, the smallest that holds the width.
    """
    packed = np.frombuffer(data, np.uint8, packed_bytes(count, width))
    planes = np.unpackbits(packed, count=width * count).reshape(width, count)
    if width == 1:
        return planes[0]
    values = np.zeros(count, np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32)
    for bit in range(width):
        values |= planes[bit].astype(values.dtype) << values.dtype.type(bit)
    return values
