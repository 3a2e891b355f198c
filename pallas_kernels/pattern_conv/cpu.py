"""The backend for CPUs: C++ kernels behind XLA's FFI, for any mask, in NHWC.

They read the lists of a structure, which are arguments of the compiled program: new masks of like size compile
nothing. Without a structure they are the dense convolution, so that both ways differ in their work alone.
"""

import ctypes
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, native
from pallas_kernels.native import meshes
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.pieces import Direction
from pallas_kernels.pattern_conv.structure import Structure

DTYPES = ("float32", "bfloat16")
# `forward` takes scale, bias and relu.
FUSES_EPILOGUE = True
# `pack` begins what it returns at a multiple of this, in bytes: a line of the caches, and a vector of AVX-512.
_ALIGNED = 64
# What a retained product costs beside one of the dense form, for tiles of at least so many filters.
# Measured on a Zen 4 core, float32: 105 to 120 GFLOP/s dense, 100 to 115 in tiles, 65 to 80 kernel by kernel.
_COSTS = ((16, 1.1), (8, 1.7), (1, 1.6))


def why_not(structure: Structure | None, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """Why this convolution cannot be done and what can; None if it can. No device is looked at.

    Args:
        structure: what is retained; None for a dense convolution.
        geometry: of the convolution.
        dtype: of x and w.
        batch: images.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it takes {' or '.join(DTYPES)}, got {jnp.dtype(dtype).name}; cast x and w"
    if geometry.layout != "NHWC":
        return f"it takes the layout NHWC, got {geometry.layout}"
    if not isinstance(batch, numbers.Integral):
        return f"it takes a known number of images, got the symbol {batch}"
    return None


def why_not_here() -> str | None:
    """Why the kernels cannot run on this process's first device; None if they can. The first call may build them."""
    platform = compat.platform()
    if platform != "cpu":
        return f"it runs on CPUs, jax runs on {platform} here"
    return native.why_not()


def estimated_gain(structure: Structure, direction: Direction = "forward") -> float:
    """How many times faster than the dense form it should be. Of traced structures the lists' room is counted."""
    backwards = direction == "input_gradient"
    # Whether outputs lie side by side: filters, or channels in the input gradient.
    filters = structure.tile[1 if backwards else 0]
    cost = next(cost for least, cost in _COSTS if filters >= least or least == 1)
    rows, others = structure.grid[::-1] if not backwards else structure.grid
    lists = structure.pairs_by_channel if backwards else structure.pairs
    counts = structure.pair_counts_by_channel if backwards else structure.pair_counts
    traced = isinstance(counts, jax.core.Tracer)
    retained = rows * lists.shape[1] if traced else int(np.asarray(counts, np.int64).sum())
    return rows * others * structure.num_taps / max(retained * cost, 1.0)


def forward(
    x: jax.Array,
    w: jax.Array,
    structure: Structure | None,
    geometry: Geometry,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    relu: bool = False,
) -> jax.Array:
    """x (batch, height, width, cin), w (kh, kw, cin, cout) of its dtype -> y of that dtype, summed in float32.

    ``scale`` and ``bias``, (cout,), and the ReLU are applied to the sums before they are rounded.
    """
    out = jax.ShapeDtypeStruct((len(x), *geometry.output, w.shape[3]), x.dtype)
    more = (_vector(scale), _vector(bias))
    settings = {**_settings(structure, geometry), "relu": bool(relu)}
    return _call("clicktrain_conv", out, (x, w, *_lists(structure), *more), settings, images=True)


def forward_packed(
    x: jax.Array,
    packed: jax.Array | np.ndarray,
    structure: Structure,
    geometry: Geometry,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    relu: bool = False,
) -> jax.Array:
    """`forward` on weights that `pack` has prepared."""
    out = jax.ShapeDtypeStruct((len(x), *geometry.output, structure.shape[3]), x.dtype)
    settings = {**_settings(structure, geometry), "relu": bool(relu)}
    arguments = (x, packed, _vector(scale), _vector(bias))
    return _call("clicktrain_conv_packed", out, arguments, settings, images=True)


def input_gradient(dy: jax.Array, w: jax.Array, structure: Structure | None, geometry: Geometry) -> jax.Array:
    """dy of the output's shape -> dx of the input's."""
    out = jax.ShapeDtypeStruct((len(dy), *geometry.image, w.shape[2]), dy.dtype)
    arguments = (dy, w, *_lists(structure))
    return _call("clicktrain_conv_input_gradient", out, arguments, _settings(structure, geometry), images=True)


def weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure | None, geometry: Geometry) -> jax.Array:
    """-> dw (kh, kw, cin, cout) in float32, exact zeros where nothing is retained."""
    out = jax.ShapeDtypeStruct((*geometry.window, x.shape[3], dy.shape[3]), jnp.float32)
    arguments = (x, dy, *_lists(structure))
    return _call("clicktrain_conv_weight_gradient", out, arguments, _settings(structure, geometry), images=False)


def pack(w: jax.Array | np.ndarray, structure: Structure, output: tuple[int, int] | None = None) -> np.ndarray:
    """The retained weights as the kernels of this machine read them: uint8, for `forward_packed` on machines like it.

    Args:
        w: float32 or bfloat16, (kh, kw, cin, cout), concrete.
        structure: with concrete arrays.
        output: (height, width) of what they make with strides of 1, where that is known.

    Raises:
        ValueError: traced arrays, another dtype or another shape.
        RuntimeError: there are no native kernels here.
    """
    leaves = (w, structure.pairs, structure.pairs_by_channel)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError("weights are packed for the CPU's kernels on the host: w and the structure must be concrete")
    w = np.ascontiguousarray(w)
    if w.dtype.name not in DTYPES or w.shape != structure.shape:
        wanted = f"{' or '.join(DTYPES)} {structure.shape}"
        raise ValueError(f"the CPU's kernels pack weights of {wanted}, got {w.dtype.name} {w.shape}")
    library = native.library()
    lists = [np.ascontiguousarray(array, np.int32) for array in _lists(structure)]
    kh, kw, cin, cout = structure.shape
    rooms = (lists[0].shape[1], lists[2].shape[1])
    sizes, strides = (output, (1, 1)) if output is not None else ((0, 0), (0, 0))
    dtype = DTYPES.index(w.dtype.name)
    values = (dtype, 0, 0, 0, *sizes, kh, kw, *strides, 0, 0, cin, cout, *structure.tile, *rooms)
    facts = np.array(values, np.int64)
    arguments = [_pointer(facts), *map(_pointer, lists)]
    size = library.clicktrain_packed_bytes(*arguments)
    room = np.zeros(size + _ALIGNED, np.uint8)
    begin = -room.ctypes.data % _ALIGNED
    packed = room[begin : begin + size]
    library.clicktrain_pack(*arguments, _pointer(w), _pointer(packed))
    return packed


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _lists(structure: Structure | None) -> tuple[jax.Array | np.ndarray, ...]:
    """As the handlers take them; empty for a dense convolution."""
    if structure is None:
        rows, row = np.zeros((0, 0), np.int32), np.zeros(0, np.int32)
        return rows, row, rows, row
    by_filters = (structure.pairs, structure.pair_counts)
    return *by_filters, structure.pairs_by_channel, structure.pair_counts_by_channel


def _vector(vector: jax.Array | None) -> jax.Array | np.ndarray:
    return np.zeros(0, np.float32) if vector is None else jnp.asarray(vector, jnp.float32)


def _settings(structure: Structure | None, geometry: Geometry) -> dict[str, Any]:
    """What the handlers cannot tell from the shapes. The padding behind the image is in the output's size."""
    (top, _), (left, _) = geometry.padding
    values = {
        "window": geometry.window,
        "strides": geometry.strides,
        "padding": (top, left),
        "tile": (1, 1) if structure is None else structure.tile,
    }
    return {name: np.array(value, np.int64) for name, value in values.items()}


def _call(
    target: str, out: jax.ShapeDtypeStruct, arguments: Sequence, settings: dict[str, Any], images: bool
) -> jax.Array:
    """The handler's result. Under `jax.vmap` of the first argument alone the images of all become one batch.

    Args:
        target: the handler's name.
        out: shape and dtype of the result.
        arguments: arrays.
        settings: the handler's attributes.
        images: whether the first argument and the result have the batch as their first axis and each image of one
            depends on the same image of the other alone; else the first two have, and the result is a sum over it.
    """
    native.library()  # registers the handlers

    def on_shares(names: tuple[str, ...]) -> Callable[..., tuple[jax.Array]]:
        def call(*arrays: jax.Array) -> tuple[jax.Array]:
            # Mapped or divided, it is called with other numbers of images than `out` has.
            result = jax.ShapeDtypeStruct((len(arrays[0]), *out.shape[1:]), out.dtype) if images else out
            found = jax.ffi.ffi_call(target, result)(*arrays, **settings)
            return (jax.lax.psum(found, names) if names and not images else found,)

        return call

    batched = [index < (1 if images else 2) for index in range(len(arguments))]
    (result,) = meshes.call(on_shares, arguments, batched, [len(out.shape)], [images])
    return result
