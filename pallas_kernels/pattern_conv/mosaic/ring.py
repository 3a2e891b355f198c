"""What the kernels share: launches that stay on their multiprocessors, and the slots of their rings.

The copy engine reads zeros past an array's end, and writes nothing there. Mosaic folds the leading axes of an array
(row and column of a pixel) into one coordinate where it would otherwise have more than five, and drops axes of
length 1. A pixel that shall lie outside must therefore be past the end along BOTH axes: a column past the end of a
row that exists would be the next row's first. The interpreter does not fold, and shows nothing of this.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Registers of a thread that copies, and of one that holds many places; the others share the multiprocessor's rest.
COPY_REGISTERS, MANY_COPY_REGISTERS = 40, 72


def compute_registers(warpgroups: int, copying: int = COPY_REGISTERS) -> int:
    """Registers a computing thread may have, a multiple of 8: what the copying ones leave."""
    return min(240, (512 - copying) // warpgroups // 8 * 8)


def swizzle_of(*lengths: int) -> int:
    """Elements of a swizzled row of 16-bit numbers: the most that divides all these minor axes, in memory or slots.

    Mosaic cuts the array in memory like the slot: channels in all that a row does not divide (96 by 64) are refused
    when the kernel is lowered, even where it divides the tiles. The interpreter takes them.
    """
    return next(elements for elements in (64, 32, 16) if all(length % elements == 0 for length in lengths))


def swizzled(elements: int, dtype: Any) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """The layout of a slot whose rows of so many elements are swizzled, as the tensor cores read them."""
    return plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(elements * jnp.dtype(dtype).itemsize)


def digits(number: jax.Array, lengths: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The index of which ``number`` is the row-major position; the first may run over its length."""
    index = []
    for length in reversed(lengths[1:]):
        index.append(lax.rem(number, length))
        number = lax.div(number, length)
    return number, *reversed(index)
