"""Layers of a net one after the other in one call of the native kernels: convolutions, pools and sums.

With as many images as threads, each thread carries images of its own through all layers; with fewer, all threads share
each layer. Both give the same bits, for any number of threads.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.native import meshes
from pallas_kernels.pattern_conv.geometry import make_geometry
from pallas_kernels.pattern_conv.structure import Structure

Shape = tuple[int, int, int]
Two = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with packed weights.

    Attributes:
        source: the value that it reads: the inputs of the chain come first, then what each step makes.
        packed: which of the chain's arrays its weights are, from `pallas_kernels.pack` for "cpu" and float32.
        structure: that they were packed for; its shapes alone are read.
        strides: (rows, columns).
        padding: ((top, bottom), (left, right)).
        bias: which of the arrays is added, float32 (cout,); None for none.
        relu: whether what is negative becomes 0 then.
        second: a value of the result's shape that is added before that; None for none.
    """

    source: int
    packed: int
    structure: Structure
    strides: Two = (1, 1)
    padding: tuple[Two, Two] = ((0, 0), (0, 0))
    bias: int | None = None
    relu: bool = False
    second: int | None = None


@dataclasses.dataclass(frozen=True)
class Pool:
    """The largest entry of each window, or the sum of its entries times a factor; what lies outside is left out.

    Attributes:
        source: as of `Conv`.
        kind: "max" or "sum".
        window: (rows, columns).
        strides: (rows, columns).
        padding: ((top, bottom), (left, right)).
        factor: of sums.
        relu: whether what is negative becomes 0 then.
    """

    source: int
    kind: Literal["max", "sum"]
    window: Two
    strides: Two
    padding: tuple[Two, Two] = ((0, 0), (0, 0))
    factor: float = 1.0
    relu: bool = False


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum of two values of one shape.

    Attributes:
        source, second: the values.
        relu: whether what is negative becomes 0 then.
    """

    source: int
    second: int
    relu: bool = False


Step = Conv | Pool | Sum


def chain(inputs: Sequence[jax.Array], steps: Sequence[Step], arrays: Sequence[Any]) -> jax.Array:
    """What the last step makes.

    Args:
        inputs: float32 images (batch, height, width, channels) of one batch.
        steps: one after the other, one at least.
        arrays: packed weights and biases.

    Returns:
        float32 (batch, height, width, channels).

    Raises:
        ValueError: inputs of another dtype or rank, or a step that does not fit what it reads.
        RuntimeError: there are no native kernels here.
    """
    for x in inputs:
        if jnp.ndim(x) != 4 or x.dtype != np.float32 or x.shape[0] != inputs[0].shape[0]:
            raise ValueError(
                f"inputs are float32 (batch, height, width, channels) of one batch, got {x.dtype} {x.shape}"
            )
    shapes: list[Shape] = [(height, width, channels) for _, height, width, channels in (x.shape for x in inputs)]
    numbers, factors = [], []
    for step in steps:
        shape, row = _numbers(step, shapes, len(inputs))
        shapes.append(shape)
        numbers += row
        factors.append(step.factor if isinstance(step, Pool) else 1.0)
    native.library()  # registers the handlers
    settings = {
        "steps": np.array(numbers, np.int64),
        "factors": np.array(factors, np.float32),
        "inputs": np.int64(len(inputs)),
    }

    def on_shares(_: tuple[str, ...]) -> Callable[..., tuple[jax.Array]]:
        def call(*given: jax.Array) -> tuple[jax.Array]:
            result = jax.ShapeDtypeStruct((len(given[0]), *shapes[-1]), jnp.float32)
            return (jax.ffi.ffi_call("clicktrain_chain", result)(*given, **settings),)

        return call

    given = (*inputs, *arrays)
    batched = [index < len(inputs) for index in range(len(given))]
    (result,) = meshes.call(on_shares, given, batched, [4], [True])
    return result


def shape_after(step: Step, shapes: Sequence[Shape]) -> Shape:
    """The (height, width, channels) of what a step makes of values of these shapes.

    Raises:
        ValueError: it does not fit them.
    """
    shape = _own_shape(step, shapes)
    second = None if isinstance(step, Pool) else step.second
    if second is not None and shapes[second] != shape:
        raise ValueError(f"a sum of values of different shapes, {shape} and {shapes[second]}")
    return shape


def _own_shape(step: Step, shapes: Sequence[Shape]) -> Shape:
    shape = shapes[step.source]
    if isinstance(step, Sum):
        return shape
    window = step.structure.shape[:2] if isinstance(step, Conv) else step.window
    geometry = make_geometry((1, *shape), window, step.strides, step.padding, "NHWC")
    if isinstance(step, Pool):
        return (*geometry.output, shape[2])
    if step.structure.shape[2] != shape[2]:
        raise ValueError(f"a kernel {step.structure.shape} does not fit images {shape}")
    return (*geometry.output, step.structure.shape[3])


def _numbers(step: Step, shapes: Sequence[Shape], inputs: int) -> tuple[Shape, list[int]]:
    """The shape of a step's result, and the step as the kernels read it (native/chain.h)."""
    shape = shape_after(step, shapes)
    if isinstance(step, Sum):
        return shape, [3, step.source, step.second, *shape, *(0,) * 6, int(step.relu), *(0,) * 4]
    (top, _), (left, _) = step.padding
    place = (*step.strides, top, left, int(step.relu))
    if isinstance(step, Pool):
        return shape, [1 if step.kind == "max" else 2, step.source, -1, *shape, *step.window, *place, *(0,) * 4]
    bias = -1 if step.bias is None else inputs + step.bias
    window, tile = step.structure.shape[:2], step.structure.tile
    second = -1 if step.second is None else step.second
    return shape, [0, step.source, second, *shape, *window, *place, *tile, inputs + step.packed, bias]
