"""The portable form: plain JAX on any device, for any shape of mask.

For each filter tile, every retained piece of a kernel is read from its own place (one gather: the channel and the
shift of each piece are data), and one small dense convolution does the rest. A corner pattern of a 3x3 kernel is
one 2x2 window: 4/9 of the work. Removed blocks are in no list and cost nothing.

On a CPU two more things decide. The gathered arrays of all tiles together do not fit the caches, and fresh memory
costs page faults: tiles are computed one after another, a few images at a time (`_chunks`). And XLA's weight gradients
are slow there, so they are matrix products over channel-major patches, which are read row by row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.pieces import Pieces
from pallas_kernels.pattern_conv.structure import Structure

# On a CPU one gathered array should stay in a core's second cache.
_CACHE_BYTES = 512 * 1024
# More small convolutions than this in one program take too long to compile.
_MOST_CONVOLUTIONS = 64

# For each piece of the structure, for each filter tile: (rows, columns, entries, filters).
Packed = tuple[tuple[jax.Array, ...], ...]


def why_not(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """None: everything is supported."""
    return None


def forward(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """x in the geometry's layout, w (kh, kw, cin, cout) of its dtype -> y of that dtype, summed in float32."""
    return forward_packed(x, pack(w, structure), structure, geometry)


def pack(w: jax.Array, structure: Structure) -> Packed:
    """The retained weights in the order in which they are read, zeros in unused room."""
    kh, kw, cin, cout = structure.shape
    packed = []
    for piece in structure.pieces:
        filters = structure.tile[0] * piece.merged
        tiles = len(piece.rooms)
        # One row for each (tap, channel, tile): a gather of whole rows is several times faster than of elements.
        rows = jnp.pad(w, ((0, 0),) * 3 + ((0, tiles * filters - cout),)).reshape(-1, filters)
        tap_rows = jnp.asarray(piece.rows)[:, None] + np.repeat(np.arange(piece.window[0]), piece.window[1])[:, None]
        tap_columns = jnp.asarray(piece.columns)[:, None] + np.tile(np.arange(piece.window[1]), piece.window[0])[:, None]
        numbers = ((tap_rows * kw + tap_columns) * cin + piece.channels[:, None]) * tiles  # (T, window, R)
        parts = []
        for tile, room in enumerate(piece.rooms):
            width = min(filters, cout - tile * filters)
            valid = jnp.asarray(piece.valid)[tile, :, :room]
            valid = jnp.repeat(valid, structure.tile[0], axis=2) if piece.merged > 1 else valid
            chosen = jnp.where(valid, _take(rows, numbers[tile, :, :room] + tile), jnp.zeros((), w.dtype))
            parts.append(chosen.reshape(*piece.window, room, filters)[..., :width])
        packed.append(tuple(parts))
    return tuple(packed)


def forward_packed(x: jax.Array, packed: Packed, structure: Structure, geometry: Geometry) -> jax.Array:
    """`forward` on weights that `pack` has prepared."""
    batch = x.shape[geometry.batch_axis]
    rows, columns = geometry.output
    wide = jnp.promote_types(x.dtype, jnp.float32)
    padded = _pad(x, geometry)
    outputs = []
    order = _Order(jax.default_backend() == "cpu")
    for begin, end in _chunks(batch, structure, geometry, x.dtype):
        parts = []
        for tile in range(_num_tiles(structure)):
            y = None
            for piece, weights in zip(structure.pieces, packed):
                if not piece.rooms[tile]:
                    continue
                read = _read(padded, piece, tile, geometry, begin, end, order)
                part = jax.lax.conv_general_dilated(
                    read,
                    weights[tile],
                    [stride if size > 1 else 1 for stride, size in zip(geometry.strides, piece.window)],
                    "VALID",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    preferred_element_type=None if x.dtype == wide else wide,
                )
                y = part if y is None else y + part
            width = _tile_width(structure, tile)
            y = jnp.zeros((end - begin, rows, columns, width), x.dtype) if y is None else y.astype(x.dtype)
            parts.append(order.after(y))
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
    outputs = []
    order = _Order(jax.default_backend() == "cpu")
    for begin, end in _chunks(batch, structure, geometry, dy.dtype):
        total = jnp.zeros((end - begin, *geometry.image, cin), wide)
        for tile in range(_num_tiles(structure)):
            first = tile * _filters(structure)
            part = dy[begin:end, :, :, first : first + _tile_width(structure, tile)]
            for piece, weights in zip(structure.pieces, packed):
                if not piece.rooms[tile]:
                    continue
                spread = jax.lax.conv_general_dilated(
                    part,
                    jnp.swapaxes(jnp.flip(weights[tile], (0, 1)), 2, 3),
                    (1, 1),
                    [(size - 1, size - 1) for size in piece.window],
                    lhs_dilation=geometry.strides,
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    preferred_element_type=None if dy.dtype == wide else wide,
                )
                total = order.after(total + _collect(spread, piece, tile, geometry, order))
        outputs.append(total.astype(dy.dtype))
    dx = jnp.concatenate(outputs, axis=0)
    return dx if geometry.layout == "NHWC" else jnp.transpose(dx, (1, 2, 0, 3))


def weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """-> dw (kh, kw, cin, cout) in float32 or wider, exact zeros where nothing is retained."""
    kh, kw, cin, cout = structure.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dy = dy if geometry.layout == "NHWC" else jnp.transpose(dy, (2, 0, 1, 3))
    batch = dy.shape[0]
    # Rows of images: (channel, padded row, padded column, image), so that a tap of a channel is nearly one copy.
    spatial = geometry.spatial_axes
    planes = jnp.transpose(_pad(x, geometry), (3, geometry.batch_axis, *spatial))
    order = _Order(jax.default_backend() == "cpu")
    columns = []
    for tile in range(_num_tiles(structure)):
        first, width = tile * _filters(structure), _tile_width(structure, tile)
        dy_tile = dy[..., first : first + width].reshape(-1, width)
        whole = jnp.zeros((kh * kw * cin, width), wide)
        for piece in structure.pieces:
            room = piece.rooms[tile]
            if not room:
                continue
            patches = _patches(planes, piece, tile, geometry, batch, order)
            product = jnp.matmul(patches, dy_tile, preferred_element_type=wide)
            whole = whole + _place(order.after(product), piece, tile, structure, width)
        columns.append(whole)
    return jnp.concatenate(columns, axis=-1).reshape(structure.shape)


class _Order:
    """Makes what is read next wait for what was computed last, so that memory is used again.

    Without it XLA's CPU backend reads for all tiles first: the arrays fall out of the caches. Only indices are held
    back, which are small: a barrier copies what passes it.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.last: jax.Array | None = None

    def after(self, value: jax.Array) -> jax.Array:
        """Note that ``value`` comes before whatever `hold` is given next."""
        self.last = value
        return value

    def hold(self, indices: jax.Array) -> jax.Array:
        """The same indices, not before the last value is there."""
        if not self.wanted or self.last is None:
            return indices
        indices, self.last = jax.lax.optimization_barrier((indices, self.last))
        return indices


def _filters(structure: Structure) -> int:
    return structure.tile[0] * (structure.pieces[0].merged if structure.pieces else 1)


def _num_tiles(structure: Structure) -> int:
    return -(-structure.shape[3] // _filters(structure))


def _tile_width(structure: Structure, tile: int) -> int:
    filters = _filters(structure)
    return min(filters, structure.shape[3] - tile * filters)


def _chunks(batch: int, structure: Structure, geometry: Geometry, dtype: jnp.dtype) -> list[tuple[int, int]]:
    """Ranges of images computed together: on a CPU as many as fit the cache."""
    if jax.default_backend() != "cpu" or not structure.pieces:
        return [(0, batch)]
    room = max(max(piece.rooms) for piece in structure.pieces)
    image_bytes = (geometry.image[0] + 1) * (geometry.image[1] + 1) * room * jnp.dtype(dtype).itemsize
    convolutions = _num_tiles(structure) * len(structure.pieces)
    count = min(-(-batch * image_bytes // _CACHE_BYTES), max(1, _MOST_CONVOLUTIONS // convolutions), batch)
    bounds = [batch * index // count for index in range(count + 1)]
    return list(zip(bounds[:-1], bounds[1:]))


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
    base = (
        np.arange(begin, end, dtype=np.int32)[:, None, None] * image_step
        + row_at[:, None] * row_step
        + column_at * column_step
    ) * channels
    shift = (
        jnp.asarray(piece.rows)[tile, :room] * row_step + jnp.asarray(piece.columns)[tile, :room] * column_step
    ) * channels + jnp.asarray(piece.channels)[tile, :room]
    return _take(padded.reshape(-1), jnp.asarray(base, jnp.int32)[..., None] + order.hold(shift))


def _collect(spread: jax.Array, piece: Pieces, tile: int, geometry: Geometry, order: _Order) -> jax.Array:
    """What every input channel gets from its pieces: (images, rows, columns, entries) -> (images, *image, cin)."""
    images, height, width, entries = spread.shape
    # spread's (0, 0) stands at the padded image's (row, column) of the piece; beyond its ends there is nothing.
    (top, _), (left, _) = geometry.padding
    kh, kw = geometry.window
    rows, columns = geometry.image
    below = max(0, top + rows - height)
    right = max(0, left + columns - width)
    room = jnp.pad(spread, ((0, 0), (kh - 1, below), (kw - 1, right), (0, 0)))
    wide = room.shape[2]
    base = (
        np.arange(images, dtype=np.int32)[:, None, None] * (room.shape[1] * wide)
        + (np.arange(rows)[:, None] + top + kh - 1) * wide
        + (np.arange(columns) + left + kw - 1)
    ) * entries
    flat, total = room.reshape(-1), 0
    for index in range(piece.entry_of.shape[0]):
        entry = jnp.asarray(piece.entry_of)[index, tile]
        row, column = (jnp.asarray(place)[index, tile] for place in (piece.row_of, piece.column_of))
        shift = jnp.maximum(entry, 0) - (row * wide + column) * entries
        got = _take(flat, jnp.asarray(base, jnp.int32)[..., None] + order.hold(shift))
        total = total + jnp.where(entry >= 0, got, jnp.zeros((), got.dtype))
    return total


def _patches(
    planes: jax.Array, piece: Pieces, tile: int, geometry: Geometry, batch: int, order: _Order
) -> jax.Array:
    """(window * entries, images * output pixels) from (channels, images, rows, columns)."""
    room = piece.rooms[tile]
    _, _, height, width = planes.shape
    taps = np.arange(piece.window[0] * piece.window[1])
    row_at, column_at = (np.arange(out) * stride for out, stride in zip(geometry.output, geometry.strides))
    base = (
        np.arange(batch, dtype=np.int32)[:, None, None] * (height * width) + row_at[:, None] * width + column_at
    ).reshape(-1)
    rows = jnp.asarray(piece.rows)[tile, :room] + (taps // piece.window[1])[:, None]
    columns = jnp.asarray(piece.columns)[tile, :room] + (taps % piece.window[1])[:, None]
    shift = jnp.asarray(piece.channels)[tile, :room] * (batch * height * width) + rows * width + columns
    return _take(planes.reshape(-1), order.hold(shift).reshape(-1)[:, None] + jnp.asarray(base, jnp.int32))


def _place(product: jax.Array, piece: Pieces, tile: int, structure: Structure, width: int) -> jax.Array:
    """(window * entries, filters) -> (kh * kw * cin, filters), zeros where nothing is retained."""
    kh, kw, cin, _ = structure.shape
    room, (high, wide) = piece.rooms[tile], piece.window
    total = 0
    taps = np.arange(kh * kw)[:, None]
    for index in range(piece.entry_of.shape[0]):
        entry = jnp.asarray(piece.entry_of)[index, tile]
        inner_row = taps // kw - jnp.asarray(piece.row_of)[index, tile]
        inner_column = taps % kw - jnp.asarray(piece.column_of)[index, tile]
        inside = (inner_row >= 0) & (inner_row < high) & (inner_column >= 0) & (inner_column < wide) & (entry >= 0)
        place = jnp.where(inside, inner_row * wide + inner_column, 0)  # (kh * kw, cin)
        valid = jnp.asarray(piece.valid)[tile][place, jnp.maximum(entry, 0)] & inside[..., None]
        valid = jnp.repeat(valid, structure.tile[0], axis=2)[..., :width] if piece.merged > 1 else valid
        got = _take(product, place * room + jnp.maximum(entry, 0))
        total = total + jnp.where(valid, got, jnp.zeros((), got.dtype))
    return total.reshape(kh * kw * cin, width)
