"""The portable form: plain JAX on any device, for any shape of mask.

For each filter tile, every retained piece of a kernel is read from its own place (one gather: the channel and the
shift of each piece are data), and one small dense convolution does the rest. A corner pattern of a 3x3 kernel is
one 2x2 window: 4/9 of the work. Removed blocks are in no list and cost nothing.

On a CPU one more thing decides. The gathered arrays of all tiles together do not fit the caches, and fresh memory
costs page faults: tiles are computed one after another (`_Order`), a few images at a time (`_chunks`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pattern_conv.dense import window_sum, window_weight_gradient
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.pieces import Pieces
from pallas_kernels.pattern_conv.structure import Structure

# On a CPU one gathered array should stay in a core's second cache.
_CACHE_BYTES = 512 * 1024
# Tiles are computed one after another where what they read is more than this in all; else two cores share them.
_ORDER_BYTES = 4 * 1024 * 1024
# Up to so many output pixels a matrix product is faster than a convolution there, if it is the only one.
_FEW_PIXELS = 128
# More small convolutions than this in one program take too long to compile.
_MOST_CONVOLUTIONS = 64

# For each piece of the structure, for each filter tile: (rows, columns, entries, filters).
Packed = tuple[tuple[jax.Array, ...], ...]


def why_not(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """None: everything is supported."""
    return None


def forward(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """x in the geometry's layout, w (kh, kw, cin, cout) of its dtype -> y of that dtype, summed in float32."""
    order = _order(x, structure, geometry)
    if len(_chunks(x.shape[geometry.batch_axis], structure, geometry, x.dtype)) > 1:
        packed = pack(w, structure)
        return _forward(x, lambda index, tile: packed[index][tile], structure, geometry, order)
    # Read once, the weights of a tile are best packed just before.
    return _forward(x, _Packer(w, structure, order), structure, geometry, order)


def pack(w: jax.Array | np.ndarray, structure: Structure) -> Packed:
    """The retained weights in the order in which they are read, zeros in unused room.

    Numpy weights with a structure of numpy arrays are packed by numpy: at once, with nothing to compile.
    """
    packer = _Packer(w, structure, None)
    return tuple(
        tuple(packer(index, tile) for tile in range(len(piece.rooms))) for index, piece in enumerate(structure.pieces)
    )


def forward_packed(x: jax.Array, packed: Packed, structure: Structure, geometry: Geometry) -> jax.Array:
    """`forward` on weights that `pack` has prepared."""
    return _forward(x, lambda index, tile: packed[index][tile], structure, geometry, _order(x, structure, geometry))


def _forward(
    x: jax.Array, weights_of: Callable[[int, int], jax.Array], structure: Structure, geometry: Geometry, order: "_Order"
) -> jax.Array:
    batch = x.shape[geometry.batch_axis]
    rows, columns = geometry.output
    padded = _pad(x, geometry)
    outputs = []
    for begin, end in _chunks(batch, structure, geometry, x.dtype):
        parts = []
        for tile in range(_num_tiles(structure)):
            y = None
            for index, piece in enumerate(structure.pieces):
                if not piece.rooms[tile]:
                    continue
                read = _read(padded, piece, tile, geometry, begin, end, order)
                part = _convolve(read, weights_of(index, tile), piece, geometry)
                y = part if y is None else y + part
                order.after(part)
            width = _tile_width(structure, tile)
            y = jnp.zeros((end - begin, rows, columns, width), x.dtype) if y is None else y.astype(x.dtype)
            parts.append(y)
        outputs.append(jnp.concatenate(parts, axis=-1))
    y = jnp.concatenate(outputs, axis=0)
    return y if geometry.layout == "NHWC" else jnp.transpose(y, (1, 2, 0, 3))


def input_gradient(dy: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """dy of the output's shape -> dx of the input's.

    For each filter tile the small convolution is transposed, and every input channel sums what its pieces give.
    """
    cin = structure.shape[2]
    dy = dy if geometry.layout == "NHWC" else jnp.transpose(dy, (2, 0, 1, 3))
    wide = jnp.promote_types(dy.dtype, jnp.float32)
    batch = dy.shape[0]
    packed = pack(w, structure)
    total = jnp.zeros((cin, *geometry.image, batch), wide)
    order = _Order(structure, geometry, batch, dy.dtype)
    for tile in range(_num_tiles(structure)):
        first = tile * _filters(structure)
        part = dy[..., first : first + _tile_width(structure, tile)]
        for piece, weights in zip(structure.pieces, packed):
            if not piece.rooms[tile]:
                continue
            spread = window_sum(
                part,
                jnp.swapaxes(jnp.flip(weights[tile], (0, 1)), 2, 3),
                (1, 1),
                [(size - 1, size - 1) for size in piece.window],
                "NHWC",
                dilation=geometry.strides,
                precision=geometry.precision,
            ).astype(wide)
            total = order.after(total + _collect(spread, piece, tile, geometry, order))
    axes = (3, 1, 2, 0) if geometry.layout == "NHWC" else (1, 2, 3, 0)
    return jnp.transpose(total, axes).astype(dy.dtype)


def weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """-> dw (kh, kw, cin, cout) in float32 or wider, exact zeros where nothing is retained."""
    kh, kw, cin, _ = structure.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = dy if geometry.layout == "NHWC" else jnp.transpose(dy, (2, 0, 1, 3))
    padded, order = _pad(x, geometry), _order(x, structure, geometry)
    sums: dict[tuple[int, int], jax.Array] = {}
    for begin, end in _chunks(len(dy), structure, geometry, x.dtype):
        for tile in range(_num_tiles(structure)):
            first, width = tile * _filters(structure), _tile_width(structure, tile)
            part = dy[begin:end, :, :, first : first + width]
            for index, piece in enumerate(structure.pieces):
                if not piece.rooms[tile]:
                    continue
                read = _read(padded, piece, tile, geometry, begin, end, order)
                shape = (*piece.window, piece.rooms[tile], width)
                place = (_window_strides(piece, geometry), ((0, 0), (0, 0)), "NHWC")
                product = window_weight_gradient(read, part, shape, *place, precision=geometry.precision)
                sums[index, tile] = order.after(sums[index, tile] + product if (index, tile) in sums else product)
    columns = []
    for tile in range(_num_tiles(structure)):
        whole = jnp.zeros((kh * kw * cin, _tile_width(structure, tile)), wide)
        for index, piece in enumerate(structure.pieces):
            if (index, tile) in sums:
                whole = whole + _place(sums[index, tile], piece, tile, structure)
        columns.append(whole)
    return jnp.concatenate(columns, axis=-1).reshape(structure.shape)


def _window_strides(piece: Pieces, geometry: Geometry) -> tuple[int, int]:
    """Of the small convolution: where its window is one wide, `_read` has taken the strides already."""
    rows, columns = (stride if size > 1 else 1 for stride, size in zip(geometry.strides, piece.window))
    return rows, columns


class _Packer:
    """Weights of one piece and tile, (rows, columns, entries, filters), gathered from the kernel when asked for."""

    def __init__(self, w: Any, structure: Structure, order: "_Order | None") -> None:
        self.structure, self.order = structure, order
        filters, tiles = _filters(structure), _num_tiles(structure)
        self.numpy: Any = np if isinstance(w, np.ndarray) else jnp
        # One row for each (tap, channel, tile): a gather of whole rows is several times faster than of elements.
        self.rows = self.numpy.pad(w, ((0, 0),) * 3 + ((0, tiles * filters - structure.shape[3]),)).reshape(-1, filters)

    def __call__(self, index: int, tile: int) -> Any:
        """The weights of one piece, in one tile."""
        _, kw, cin, _ = self.structure.shape
        piece = self.structure.pieces[index]
        room, (high, wide) = piece.rooms[tile], piece.window
        taps = np.arange(high * wide)[:, None]
        asarray = self.numpy.asarray
        rows = asarray(piece.rows)[tile, None, :room] + taps // wide
        columns = asarray(piece.columns)[tile, None, :room] + taps % wide
        numbers = (rows * kw + columns) * cin + asarray(piece.channels)[tile, None, :room]
        numbers = numbers * _num_tiles(self.structure) + tile
        numbers = numbers if self.order is None else self.order.hold(numbers)
        valid = _by_filter(asarray(piece.valid)[tile, :, :room], self.structure)
        if self.numpy is np:
            chosen = np.where(valid, self.rows[numbers], np.zeros((), self.rows.dtype))
        else:
            chosen = _keep(_take(self.rows, numbers), valid)
        return chosen.reshape(high, wide, room, _filters(self.structure))[..., : _tile_width(self.structure, tile)]


def _keep(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Zero where not valid, as a mask of bits: like a product, XLA's CPU backend makes vectors of it (2.4 times faster
    than a select after a gather), and unlike a product it lets no infinity or NaN through."""
    bits = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
    mask = jnp.where(valid, jnp.array(-1).astype(bits), jnp.zeros((), bits))
    mask = mask.reshape((1,) * (values.ndim - mask.ndim) + mask.shape)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(values, bits) & mask, values.dtype)


def _by_filter(valid: jax.Array, structure: Structure) -> jax.Array:
    """(..., merged) -> (..., filters), or (..., 1) where all filters of the tile are alike."""
    return valid.repeat(structure.tile[0], axis=-1) if valid.shape[-1] > 1 else valid


def _convolve(read: jax.Array, weights: jax.Array, piece: Pieces, geometry: Geometry) -> jax.Array:
    """(images, rows, columns, entries) by (rows, columns, entries, filters), float32 or wider."""
    wide = jnp.promote_types(read.dtype, jnp.float32)
    strides = _window_strides(piece, geometry)
    rows, columns = geometry.output
    images = read.shape[0]
    few = len(piece.rooms) == 1 and _is_static(images) and images * rows * columns <= _FEW_PIXELS
    if few and jax.default_backend() == "cpu":
        patches = jnp.concatenate(
            [
                read[:, row : row + (rows - 1) * strides[0] + 1 : strides[0]][
                    :, :, column : column + (columns - 1) * strides[1] + 1 : strides[1]
                ]
                for row in range(piece.window[0])
                for column in range(piece.window[1])
            ],
            axis=-1,
        )
        weights = weights.reshape(-1, weights.shape[3])
        return jnp.matmul(patches, weights, precision=geometry.precision, preferred_element_type=wide)
    return jax.lax.conv_general_dilated(
        read,
        weights,
        strides,
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=geometry.precision,
        preferred_element_type=None if read.dtype == wide else wide,
    )


class _Order:
    """Makes what is read next wait for what was computed last, so that memory is used again.

    Without it XLA's CPU backend reads for all tiles first, and the arrays fall out of the caches. The few indices of
    the next read are made to depend on one element of the last result, through a test that never holds; a barrier on
    the result itself would copy it, and one on an element that nobody uses is removed by the compiler.
    """

    def __init__(self, structure: Structure, geometry: Geometry, batch: int, dtype: jnp.dtype) -> None:
        room = sum(room for piece in structure.pieces for room in piece.rooms)
        # Of a symbolic batch nothing is known: it is taken for a large one.
        read_bytes = batch * math.prod(geometry.output) * room * jnp.dtype(dtype).itemsize
        self.wanted = jax.default_backend() == "cpu" and (not _is_static(batch) or read_bytes > _ORDER_BYTES)
        self.last: jax.Array | None = None

    def after(self, value: jax.Array) -> jax.Array:
        """Note that ``value`` comes before whatever `hold` is given next."""
        if value.size:
            self.last = value
        return value

    def hold(self, indices: jax.Array) -> jax.Array:
        """The same indices, not before the last value is there."""
        if not self.wanted or self.last is None:
            return indices
        element = jax.lax.slice(self.last, (0,) * self.last.ndim, (1,) * self.last.ndim).reshape(())
        never = jnp.isnan(element) & jnp.isinf(element)
        return jax.lax.optimization_barrier(indices + never.astype(indices.dtype))


def _order(x: jax.Array, structure: Structure, geometry: Geometry) -> _Order:
    return _Order(structure, geometry, x.shape[geometry.batch_axis], x.dtype)


def _filters(structure: Structure) -> int:
    return structure.tile[0] * (structure.pieces[0].merged if structure.pieces else 1)


def _num_tiles(structure: Structure) -> int:
    return -(-structure.shape[3] // _filters(structure))


def _tile_width(structure: Structure, tile: int) -> int:
    filters = _filters(structure)
    return min(filters, structure.shape[3] - tile * filters)


def _chunks(batch: int, structure: Structure, geometry: Geometry, dtype: jnp.dtype) -> list[tuple[int, int]]:
    """Ranges of images computed together: on a CPU as many as fit the cache."""
    if jax.default_backend() != "cpu" or not structure.pieces or not _is_static(batch):
        return [(0, batch)]
    room = max(max(piece.rooms) for piece in structure.pieces)
    itemsize = jnp.dtype(dtype).itemsize
    image_bytes = (geometry.image[0] + 1) * (geometry.image[1] + 1) * room * itemsize
    # Every range reads all weights of a tile again: fewer ranges where these are many.
    weight_bytes = max(math.prod(piece.window) * max(piece.rooms) for piece in structure.pieces)
    weight_bytes *= _filters(structure) * itemsize
    convolutions = _num_tiles(structure) * len(structure.pieces)
    wanted = -(-batch * image_bytes // max(_CACHE_BYTES, 2 * weight_bytes))
    count = max(1, min(wanted, _MOST_CONVOLUTIONS // convolutions, batch))
    bounds = [batch * index // count for index in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:]))


def _is_static(batch: object) -> bool:
    """Whether a number of images is a number: `jax.export` traces with symbols in its place."""
    return isinstance(batch, (int, np.integer))


def _pad(x: jax.Array, geometry: Geometry) -> jax.Array:
    pads = [(0, 0)] * 4
    for axis, pair in zip(geometry.spatial_axes, geometry.padding):
        pads[axis] = pair
    return jnp.pad(x, pads)


def _take(array: jax.Array, indices: jax.Array) -> jax.Array:
    return array.at[indices].get(mode="promise_in_bounds")


def _read(
    padded: jax.Array, piece: Pieces, tile: int, geometry: Geometry, begin: int, end: int, order: _Order
) -> jax.Array:
    """Every entry's window field, (images, rows, columns, entries): NHWC whatever the layout of ``padded``."""
    room = piece.rooms[tile]
    height, width = (padded.shape[axis] for axis in geometry.spatial_axes)
    batch, channels = padded.shape[geometry.batch_axis], padded.shape[3]
    # A window of one row needs the rows at the stride alone; a higher one all between.
    row_at, column_at = (
        np.arange(out) * stride if size == 1 else np.arange((out - 1) * stride + size)
        for out, stride, size in zip(geometry.output, geometry.strides, piece.window)
    )
    image_step, row_step, column_step = (
        (height * width, width, 1) if geometry.layout == "NHWC" else (1, width * batch, batch)
    )
    images = np.arange(begin, end, dtype=np.int32) if _is_static(end) else jnp.arange(end, dtype=jnp.int32)
    base = (images[:, None, None] * image_step + row_at[:, None] * row_step + column_at * column_step) * channels
    shift = (
        jnp.asarray(piece.rows)[tile, :room] * row_step + jnp.asarray(piece.columns)[tile, :room] * column_step
    ) * channels + jnp.asarray(piece.channels)[tile, :room]
    return _take(padded.reshape(-1), jnp.asarray(base, jnp.int32)[..., None] + order.hold(shift).reshape(1, 1, 1, -1))


def _collect(spread: jax.Array, piece: Pieces, tile: int, geometry: Geometry, order: _Order) -> jax.Array:
    """What every input channel gets from its pieces: (images, rows, columns, entries) -> (cin, *image, images)."""
    _, height, width, entries = spread.shape
    # spread's (0, 0) stands at the padded image's (row, column) of the piece; beyond its ends there is nothing.
    (top, _), (left, _) = geometry.padding
    kh, kw = geometry.window
    below = max(0, top + geometry.image[0] - height)
    right = max(0, left + geometry.image[1] - width)
    # One more entry of zeros, for channels that have no piece here.
    planes = jnp.pad(jnp.transpose(spread, (3, 1, 2, 0)), ((0, 1), (kh - 1, below), (kw - 1, right), (0, 0)))
    total: Any = 0
    for index in range(piece.entry_of.shape[0]):
        entry = jnp.asarray(piece.entry_of)[index, tile]
        row, column = (jnp.asarray(place)[index, tile] for place in (piece.row_of, piece.column_of))
        entry = jnp.where(entry >= 0, entry, entries)
        starts = jnp.stack([entry, top + kh - 1 - row, left + kw - 1 - column], axis=-1)
        total = total + _windows(planes, order.hold(starts), geometry.image)
    return total


def _windows(planes: jax.Array, starts: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(channels, rows, columns, images) -> for each (channel, row, column) of ``starts`` a field of that size."""
    numbers = jax.lax.GatherDimensionNumbers((1, 2, 3), (0,), (0, 1, 2))
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(planes, starts, numbers, (1, *size, planes.shape[3]), mode=mode)


def _place(product: jax.Array, piece: Pieces, tile: int, structure: Structure) -> jax.Array:
    """(rows, columns, entries, filters) -> (kh * kw * cin, filters), zeros where nothing is retained."""
    kh, kw, cin, _ = structure.shape
    room, (high, wide) = piece.rooms[tile], piece.window
    width = product.shape[3]
    total: Any = 0
    product = product.reshape(-1, width)
    taps = np.arange(kh * kw)[:, None]
    for index in range(piece.entry_of.shape[0]):
        entry = jnp.asarray(piece.entry_of)[index, tile][None]
        inner_row = taps // kw - jnp.asarray(piece.row_of)[index, tile][None]
        inner_column = taps % kw - jnp.asarray(piece.column_of)[index, tile][None]
        inside = (inner_row >= 0) & (inner_row < high) & (inner_column >= 0) & (inner_column < wide) & (entry >= 0)
        place = jnp.where(inside, inner_row * wide + inner_column, 0)  # (kh * kw, cin)
        valid = jnp.asarray(piece.valid)[tile][place, jnp.maximum(entry, 0)] & inside[..., None]
        valid = _by_filter(valid, structure)[..., :width]
        got = _take(product, place * room + jnp.maximum(entry, 0))
        total = total + _keep(got, valid)
    return total.reshape(kh * kw * cin, width)
