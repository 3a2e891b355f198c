"""Where a convolution reads: layout, strides and padding, normalised once."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Layout = Literal["NHWC", "HWNC"]
Padding = str | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The static facts of one convolution but for its structure.

    Attributes:
        image: (height, width) of the input.
        window: (kh, kw).
        strides: (rows, columns).
        padding: ((top, bottom), (left, right)), not negative.
        layout: "NHWC", or "HWNC": the batch beside the channels.
        precision: of XLA's products of float32 numbers, as `jax.lax.conv_general_dilated` takes it. Kernels that are
            compiled here multiply and sum in float32, which is the highest there is, and do not read it.
    """

    image: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    layout: Layout
    precision: Any = None

    @property
    def output(self) -> tuple[int, int]:
        """(rows, columns) of the output."""
        rows, columns = (
            (length + sum(pads) - size) // stride + 1
            for length, pads, size, stride in zip(self.image, self.padding, self.window, self.strides)
        )
        return rows, columns

    @property
    def spatial_axes(self) -> tuple[int, int]:
        """The axes of rows and columns."""
        return (1, 2) if self.layout == "NHWC" else (0, 1)

    @property
    def batch_axis(self) -> int:
        """The axis of images."""
        return 0 if self.layout == "NHWC" else 2

    @property
    def dimension_numbers(self) -> tuple[str, str, str]:
        """As `jax.lax.conv_general_dilated` takes them."""
        return self.layout, "HWIO", self.layout

    def reached(self, axis: int, transposed: bool = False) -> np.ndarray:
        """Along one axis, bool (output positions, taps): whether a tap looks inside the input.

        Transposed, of the input gradient: bool (input positions, taps), whether an output is there that looks by it.
        """
        sizes = self.image[axis], self.output[axis]
        to, there = sizes if transposed else sizes[::-1]
        place, tap = np.arange(to)[:, None], np.arange(self.window[axis])
        stride, begin = self.strides[axis], self.padding[axis][0]
        if not transposed:
            looked = place * stride + tap - begin
            return (looked >= 0) & (looked < there)
        shifted = place + begin - tap
        return (shifted >= 0) & (shifted % stride == 0) & (shifted // stride < there)

    def shape(self, batch: int, size: tuple[int, int], channels: int) -> tuple[int, int, int, int]:
        """An array's shape in this layout."""
        return (batch, *size, channels) if self.layout == "NHWC" else (*size, batch, channels)


def make_geometry(
    x_shape: tuple[int, ...],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    layout: str,
    precision: Any = None,
) -> Geometry:
    """Check and normalise what `pattern_conv` is given.

    Raises:
        ValueError: an unknown layout or padding, strides that are not two positive integers, or an output of no size.
    """
    rows, columns = window
    window = rows, columns
    if layout not in ("NHWC", "HWNC"):
        raise ValueError(f"layout is 'NHWC' or 'HWNC', got {layout!r}")
    two = isinstance(strides, Sequence) and len(strides) == 2
    if not two or not all(isinstance(s, numbers.Integral) and s >= 1 for s in strides):
        raise ValueError(f"strides are two positive integers (rows, columns), got {strides}")
    strides = (int(strides[0]), int(strides[1]))
    image = (x_shape[1], x_shape[2]) if layout == "NHWC" else (x_shape[0], x_shape[1])
    geometry = Geometry(image, window, strides, _explicit(padding, image, window, strides), layout, precision)
    if min(geometry.output) < 1:
        raise ValueError(f"an image of {image} with padding {geometry.padding} is smaller than the window {window}")
    return geometry


def _explicit(
    padding: Padding, image: tuple[int, int], window: tuple[int, int], strides: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    if isinstance(padding, str):
        if padding.upper() == "VALID":
            return (0, 0), (0, 0)
        if padding.upper() != "SAME":
            raise ValueError(f"padding is 'SAME', 'VALID' or ((top, bottom), (left, right)), got {padding!r}")
        pads = []
        for length, size, stride in zip(image, window, strides):
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads.append((total // 2, total - total // 2))
        return pads[0], pads[1]
    nested = isinstance(padding, Sequence) and all(isinstance(pair, Sequence) for pair in padding)
    pads: Any = tuple(tuple(pair) for pair in padding) if nested else ()
    if [len(pair) for pair in pads] != [2, 2] or not all(
        isinstance(n, numbers.Integral) and int(n) >= 0 for pair in pads for n in pair
    ):
        raise ValueError(f"padding is 'SAME', 'VALID' or ((top, bottom), (left, right)), none negative, got {padding}")
    (top, bottom), (left, right) = pads
    return (int(top), int(bottom)), (int(left), int(right))
