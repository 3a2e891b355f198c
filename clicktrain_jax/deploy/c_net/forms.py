"""How a convolution is computed: filters side by side in a vector, or pixels."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

from clicktrain_jax.deploy.c_net.layouts import VECTOR, Lanes, Margin
from clicktrain_jax.deploy.c_net.nodes import Convolution

Taps = tuple[tuple[int, int], ...]

# Vector products a cycle, of the best that there can be, as measured with vectors of 16: by filters of a tile, and by
# pixels of a piece.
_TILE_RATES = {32: 0.9, 16: 0.8, 8: 0.6}
_LANE_RATES = {16: 0.7, 8: 0.7, 4: 0.65, 2: 0.6, 1: 0.6}
# More tap sets than these, each with its code, would be too much: each tap is then listed by itself.
_MOST_GROUPS = 8
# Of a piece of one pixel nothing is read twice, unless each place of a tap set has code of its own: up to so many.
_MOST_PLACES = 12
_GRIDS = {4: ((2, 2), (1, 4), (4, 1)), 16: ((4, 4), (2, 8), (8, 2), (1, 16), (16, 1))}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """For each tile of filters a list of (tap, channel), and as many weights as filters for each.

    Attributes:
        filters: of a tile: 8, 16 or 32; the last may be filled up with zeros.
    """

    filters: int

    def entries(self, node: Convolution) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each tile ``(places, weights)``: int (n, 3) of (row, column, channel), and float32 (n, filters)."""
        cout = node.kernel.shape[3]
        for begin in range(0, cout, self.filters):
            inside = slice(begin, begin + self.filters)
            mask = node.mask[..., inside]
            places = np.argwhere(mask.any(axis=3))
            weights = np.zeros((len(places), self.filters), np.float32)
            kernel = np.where(mask, node.kernel[..., inside], 0)
            weights[:, : mask.shape[3]] = kernel[tuple(places.T)]
            yield places, weights


@dataclasses.dataclass(frozen=True)
class Group:
    """Sets of taps that are one set moved about: one piece of code runs all of their kernels.

    Attributes:
        taps: (row, column), the first row and the first column being 0.
        places: where the set stands in the kernels that have it: (row, column).
    """

    taps: Taps
    places: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class LaneForm:
    """For each filter and each group of tap sets a list of (channel, place), and as many weights as taps for each.

    Attributes:
        source: layout of the map that is read.
        target: layout of the result.
        groups: all tap sets of the mask.
        is_split: whether each tap of a kernel is listed by itself.
    """

    source: Lanes
    target: Lanes
    groups: tuple[Group, ...]
    is_split: bool

    def margin(self, node: Convolution) -> Margin:
        """Pixels around each piece of the map that is read."""
        return margin_of(node, self.target.piece, self.source.piece)

    @property
    def pixels(self) -> int:
        """Of a piece of the result."""
        return self.target.piece[0] * self.target.piece[1]

    def entries(self, node: Convolution) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each group ``(places, weights)``: int (n, 4) of (filter, channel, row, column), and float32 (n, taps)."""
        found = []
        for group in self.groups:
            places, weights = [], []
            for row, column in group.places:
                taps = [(row + r, column + c) for r, c in group.taps]
                kept = np.all([node.mask[tap] for tap in taps], axis=0)
                if not self.is_split:
                    kept &= node.mask.sum(axis=(0, 1)) == len(taps)
                channels, filters = np.nonzero(kept)
                here = np.broadcast_to([row, column], (len(filters), 2))
                places.append(np.column_stack([filters, channels, here]))
                weights.append(np.stack([node.kernel[r, c, channels, filters] for r, c in taps], axis=1))
            found.append((np.concatenate(places), np.concatenate(weights)))
        return found


def candidates(node: Convolution) -> list[tuple[Tiles | LaneForm, float]]:
    """The best form in tiles, and the form in lanes where there is one.

    Args:
        node: the convolution.

    Returns:
        Each form with the time it should take, in vector products of the best that there can be.
    """
    # The last tile may not write more than the map has, in whole vectors.
    sizes = [size for size in _TILE_RATES if size <= VECTOR or not 0 < node.shape[2] % size <= VECTOR]
    by_tiles = {size: tile_work(node, size) / _TILE_RATES[size] for size in sizes}
    filters = min(by_tiles, key=by_tiles.__getitem__)
    found: list[tuple[Tiles | LaneForm, float]] = [(Tiles(filters), by_tiles[filters])]
    form = lanes(node)
    if form is not None:
        found.append((form, lane_work(node, form)))
    return found


def tile_work(node: Convolution, filters: int) -> float:
    """Products of 16 numbers each, in tiles."""
    cout = node.mask.shape[3]
    pairs = sum(int(node.mask[..., begin : begin + filters].any(axis=3).sum()) for begin in range(0, cout, filters))
    return pairs * filters / VECTOR * node.shape[0] * node.shape[1]


def lane_work(node: Convolution, form: LaneForm) -> float:
    """Products of 16 numbers each in lanes, divided by the rate that the piece's size allows."""
    rate = next(rate for least, rate in _LANE_RATES.items() if form.pixels >= least)
    if form.is_split:
        rate *= 0.75  # nothing that was read is used twice
    return int(node.mask.sum()) * form.pixels / rate


def lanes(node: Convolution) -> LaneForm | None:
    """The form in lanes; None for a map that is too small."""
    (out_height, out_width, _), (height, width, _) = node.shape, node.inputs[0].shape
    if out_height * out_width == 1:
        return None
    row_stride, column_stride = node.strides
    count = 4 if max(out_height * out_width, height * width) <= 4 else 16
    found = []
    for down, across in _GRIDS[count]:
        # Each piece of the result is computed of the same piece of the map that is read, and its margin.
        rows = max(-(-out_height // down), -(-height // (down * row_stride)))
        columns = max(-(-out_width // across), -(-width // (across * column_stride)))
        found.append(((down, across), (rows, columns)))
    # The smallest piece, and of those the squarest grid.
    grid, piece = min(found, key=lambda each: (math.prod(each[1]), abs(each[0][0] - each[0][1])))
    source = Lanes(grid, (piece[0] * row_stride, piece[1] * column_stride))
    groups, is_split = _groups(node.mask)
    if piece == (1, 1) and not is_split and sum(len(group.places) for group in groups) <= _MOST_PLACES:
        groups = tuple(Group(group.taps, (place,)) for group in groups for place in group.places)
    return LaneForm(source, Lanes(grid, piece), groups, is_split)


def margin_of(node: Convolution, results: tuple[int, int], sources: tuple[int, int]) -> Margin:
    """Pixels around a map of ``sources`` pixels that the windows of ``results`` pixels read."""
    sizes = []
    for axis in (0, 1):
        before = node.padding[axis]
        last = node.strides[axis] * (results[axis] - 1) + node.kernel.shape[axis] - 1 - before
        sizes += [max(0, before), max(0, last - (sources[axis] - 1))]
    above, below, left, right = sizes
    return above, below, left, right


def blocks(height: int, width: int, most: int) -> list[tuple[int, int, int, int, int, int]]:
    """Cut an image into blocks that registers hold, of few shapes.

    Args:
        height: rows.
        width: columns.
        most: pixels that a block may have.

    Returns:
        Regions ``(row, column, rows, columns, block rows, block columns)``, each a whole number of blocks.
    """
    return _blocks(height, width, most)


@functools.cache
def _blocks(height: int, width: int, most: int) -> list[tuple[int, int, int, int, int, int]]:
    best, least = [], float("inf")
    for columns in range(1, min(most, width) + 1):
        for rows in range(1, min(most // columns, height) + 1):
            downs, acrosses = _cut(height, rows), _cut(width, columns)
            regions = [
                (row, column, count, across, block_rows, block_columns)
                for row, count, block_rows in downs
                for column, across, block_columns in acrosses
            ]
            # A block costs its pixels, and something for beginning and ending; oblong ones read more.
            cost = sum((h // r) * (w // c) * (r * c + 2 + 0.1 * (r + c)) for _, _, h, w, r, c in regions)
            if cost < least:
                best, least = regions, cost
    return best


def _cut(length: int, block: int) -> list[tuple[int, int, int]]:
    """``(begin, length, block)``: whole blocks, and a shorter one for the rest."""
    whole = length // block * block
    return [(0, whole, block)] + ([(whole, length - whole, length - whole)] if length > whole else [])


def _groups(mask: np.ndarray) -> tuple[tuple[Group, ...], bool]:
    """The groups of a mask, and whether they are of single taps."""
    kh, kw, cin, cout = mask.shape
    moved: dict[Taps, list[tuple[int, int]]] = {}
    for kernel in np.unique(mask.reshape(kh * kw, cin * cout).T, axis=0):
        taps = [divmod(int(tap), kw) for tap in np.flatnonzero(kernel)]
        if taps:
            row, column = (min(axis) for axis in zip(*taps))
            moved.setdefault(tuple((r - row, c - column) for r, c in taps), []).append((row, column))
    if len(moved) <= _MOST_GROUPS:
        return tuple(Group(taps, tuple(places)) for taps, places in moved.items()), False
    return (Group(((0, 0),), tuple(itertools.product(range(kh), range(kw)))),), True
