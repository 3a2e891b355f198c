"""How the portable form reads a pattern: in pieces, each a small window that a dense convolution covers.

Many input channels whose patterns have the same outline, each somewhere else in the kernel, become one small dense
convolution once every channel is read from its own place. A corner pattern of a 3x3 kernel is one 2x2 window; four
scattered taps may be read as four 1x1 windows, or inside their bounding box, whichever costs less.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

Taps = tuple[int, ...]
# (row, column, rows, columns) of a window in the kernel, and the pattern's taps that it reads.
Piece = tuple[tuple[int, int, int, int], Taps]

Direction = Literal["forward", "input_gradient", "weight_gradient"]

# Reading one channel's pixel from its own place, in the time of one multiply-add for each of so many filters.
# Measured on a CPU with AVX-512: 0.6 ns against 95 GFLOP/s on one core.
_READ = 28.0
# The same for the two gradients: reading beside a product that is slower over few filters, and collecting a channel.
_READ_AGAIN = 190.0
_COLLECT = 95.0
# Another small convolution costs about as much as this many multiply-adds a pixel.
_CALL = 2000.0
# What a call does once, whatever the number of pixels: starting a small convolution, and moving one weight.
_CALL_ONCE = 500_000.0
_PACK = 48.0
# All covers are searched for kernels of up to so many taps: 51 remainders for 3x3, 4000 for 5x5, no end for 7x7.
_SEARCHED = 12


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["channels", "rows", "columns", "valid", "entry_of", "row_of", "column_of"],
    meta_fields=["window", "rooms", "merged"],
)
@dataclasses.dataclass(frozen=True)
class Pieces:
    """All pieces of one window size, for every filter tile; a pytree whose leaves are the arrays.

    R is the largest room of a tile, C the number of input channels, T of filter tiles.

    Attributes:
        window: (rows, columns) of every piece.
        rooms: for each filter tile, how many entries of the arrays its program reads.
        merged: how many of the structure's filter tiles are one tile here; T counts these wider tiles.
        channels: int32 (T, R): the input channel of each piece; 0 in unused entries.
        rows: int32 (T, R): the first kernel row of each piece.
        columns: int32 (T, R): its first kernel column.
        valid: bool (T, window rows * window columns, R, merged): which weights of the window are retained, for each of
            the merged tiles; False in unused entries.
        entry_of: int32 (M, T, C): where a channel's pieces stand in its tile's list, M at most; -1 for none.
        row_of: int32 (M, T, C): their first kernel rows.
        column_of: int32 (M, T, C): their first kernel columns.
    """

    window: tuple[int, int]
    rooms: tuple[int, ...]
    merged: int
    channels: jax.Array | np.ndarray
    rows: jax.Array | np.ndarray
    columns: jax.Array | np.ndarray
    valid: jax.Array | np.ndarray
    entry_of: jax.Array | np.ndarray
    row_of: jax.Array | np.ndarray
    column_of: jax.Array | np.ndarray


@functools.cache
def cover(taps: Taps, size: tuple[int, int], filters: int) -> tuple[float, tuple[Piece, ...]]:
    """The cheapest windows that read a pattern, and their cost in multiply-adds a filter.

    Args:
        taps: the pattern, row by row.
        size: (kh, kw).
        filters: in a tile; reading a channel is shared by so many.
    """
    if not taps:
        return 0.0, ()
    kh, kw = size
    if kh * kw > _SEARCHED:
        return _cover_simply(taps, kw, filters)
    best: tuple[float, tuple[Piece, ...]] = (float("inf"), ())
    for rows in range(1, kh + 1):
        for columns in range(1, kw + 1):
            for row in range(kh - rows + 1):
                for column in range(kw - columns + 1):
                    inside = tuple(
                        tap for tap in taps if row <= tap // kw < row + rows and column <= tap % kw < column + columns
                    )
                    # Every cover holds a window over the first tap: looking at those alone loses none.
                    if taps[0] not in inside:
                        continue
                    rest = tuple(tap for tap in taps if tap not in inside)
                    cost, pieces = cover(rest, size, filters)
                    cost += rows * columns + _READ / filters
                    if cost < best[0] - 1e-9:
                        best = cost, (((row, column, rows, columns), inside), *pieces)
    return best


def _cover_simply(taps: Taps, kw: int, filters: int) -> tuple[float, tuple[Piece, ...]]:
    """The taps' bounding box, or each tap for itself."""
    rows, columns = [tap // kw for tap in taps], [tap % kw for tap in taps]
    box = (min(rows), min(columns), max(rows) - min(rows) + 1, max(columns) - min(columns) + 1)
    whole = box[2] * box[3] + _READ / filters
    single = len(taps) * (1 + _READ / filters)
    if whole <= single:
        return whole, ((box, taps),)
    return single, tuple(((row, column, 1, 1), (tap,)) for row, column, tap in zip(rows, columns, taps))


def make_pieces(codes: np.ndarray, shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[Pieces, ...]:
    """The pieces of all blocks by window, in order of size.

    Args:
        codes: int (B, T), the taps of each block as bits, tap 0 the lowest.
        shape: (kh, kw, cin, cout) of the kernel.
        tile: (filters, channels) of a block.
    """
    kh, kw, cin, cout = shape
    filters, channels = tile
    merged = _best_merge(codes, (kh, kw), tile, cout)
    # (filter tiles of the program, tiles merged in each, cin); tiles that the last one lacks retain nothing.
    lacking = -codes.shape[1] % merged
    wide = np.pad(np.repeat(codes, channels, axis=0)[:cin].T, ((0, lacking), (0, 0))).reshape(-1, merged, cin)
    union = np.bitwise_or.reduce(wide, axis=1)
    distinct = np.unique(union)
    covers = [cover(taps_of(int(code)), (kh, kw), filters * merged)[1] for code in distinct]
    which = np.searchsorted(distinct, union)
    made = []
    for window in sorted({piece[0][2:] for pieces in covers for piece in pieces}):
        # (row, column, code of the taps read) of each distinct code's pieces, one after the other.
        own = [
            [
                (row, column, sum(1 << tap for tap in taps))
                for (row, column, *size), taps in pieces
                if tuple(size) == window
            ]
            for pieces in covers
        ]
        each = np.array([piece for pieces in own for piece in pieces], np.int64)
        counts = np.array([len(pieces) for pieces in own])
        begins = np.cumsum(counts) - counts
        found = []
        for line in which:
            times = counts[line]
            channel = np.repeat(np.arange(cin), times)
            nth = np.arange(len(channel)) - np.repeat(np.cumsum(times) - times, times)
            found.append((channel, nth, *each[begins[line[channel]] + nth].T))
        made.append(_fill(found, window, wide, kw))
    return tuple(made)


def taps_of(code: int) -> Taps:
    """The taps of a code, rising."""
    return tuple(tap for tap in range(code.bit_length()) if code >> tap & 1)


def work(pieces: Sequence[Pieces], filters: int, shape: tuple[int, ...], direction: Direction, pixels: float) -> float:
    """What the pieces cost on a CPU, in multiply-adds a pixel, all else included; compare `dense_work`.

    Args:
        pieces: of a structure.
        filters: in a tile of it.
        shape: (kh, kw, cin, cout) of the kernel.
        direction: of which of the three computations.
        pixels: output pixels of all images, which share what is done once a call.
    """
    read = {"forward": _READ, "input_gradient": 0.0, "weight_gradient": _READ_AGAIN}[direction]
    # Every input channel looks into what every filter tile gives, found or not.
    collect = _COLLECT * shape[2] if direction == "input_gradient" else 0.0
    total = 0.0
    for piece in pieces:
        window, wide = piece.window[0] * piece.window[1], filters * piece.merged
        for room in piece.rooms:
            total += room * (window * _lanes(wide) + read) + collect + max(_CALL, _CALL_ONCE / pixels)
            # Short rows of weights are gathered the slower.
            total += room * window * max(wide, 64) * _PACK / pixels
    return total + (_PACK * math.prod(shape) / pixels if direction == "weight_gradient" else 0.0)


def dense_work(shape: tuple[int, ...], pixels: float) -> float:
    """What a dense convolution costs, in multiply-adds a pixel."""
    kh, kw, cin, cout = shape
    return kh * kw * cin * _lanes(cout) + max(_CALL, _CALL_ONCE / pixels)


def round_up(count: int) -> int:
    """To a multiple of 8, from 128 on of an eighth of the power of two below."""
    step = 1 << max(3, count.bit_length() - 4)
    return -(-count // step) * step


def room_for(counts: Sequence[int]) -> tuple[int, ...]:
    """Room for each tile: the same for all where that wastes little, so that other masks fit the same program."""
    largest = round_up(max(counts))
    if largest * len(counts) <= 1.25 * sum(counts):
        return (largest,) * len(counts)
    return tuple(round_up(count) for count in counts)


def _lanes(filters: int) -> int:
    """Filters that a CPU computes for this many: vectors of 16 are filled up."""
    return -(-filters // 16) * 16


def _best_merge(codes: np.ndarray, size: tuple[int, int], tile: tuple[int, int], cout: int) -> int:
    """How many neighbouring filter tiles one small convolution serves, reading the union of what they retain."""
    filters, channels = tile
    best, merged = (float("inf"), 1), 1
    while merged == 1 or merged < 2 * codes.shape[1]:
        count = min(merged, codes.shape[1])
        union = np.bitwise_or.reduceat(codes, np.arange(0, codes.shape[1], count), axis=1)
        values, times = np.unique(union, return_counts=True)
        wide = min(count * filters, cout)
        cost = channels * sum(
            number * cover(taps_of(int(value)), size, wide)[0] * _lanes(wide) for value, number in zip(values, times)
        )
        cost += union.shape[1] * _CALL
        best = min(best, (cost, count))
        merged *= 2
    return best[1]


def _fill(found: list[tuple[np.ndarray, ...]], window: tuple[int, int], wide: np.ndarray, kw: int) -> Pieces:
    """Arrays from each tile's entries; ``wide``: codes (T, merged, cin).

    An entry is (channel, which of the channel's pieces of this window it is, row, column, code of the taps read).
    """
    rooms = room_for([len(channel) for channel, *_ in found])
    tiles, merged, cin = wide.shape
    shape = (tiles, max(rooms))
    channels, rows, columns = (np.zeros(shape, np.int32) for _ in range(3))
    valid = np.zeros((tiles, window[0] * window[1], shape[1], merged), bool)
    most = max((int(np.bincount(channel).max()) for channel, *_ in found if len(channel)), default=1)
    entry_of = np.full((most, tiles, cin), -1, np.int32)
    row_of, column_of = np.zeros_like(entry_of), np.zeros_like(entry_of)
    for index, (channel, nth, row, column, code) in enumerate(found):
        count = len(channel)
        if not count:
            continue
        channels[index, :count], rows[index, :count], columns[index, :count] = channel, row, column
        for place in range(window[0] * window[1]):
            tap = (row + place // window[1]) * kw + column + place % window[1]
            retained = wide[index][:, channel] & code  # (merged, entries)
            valid[index, place, :count] = (retained >> tap & 1).T.astype(bool)
        entry_of[nth, index, channel] = np.arange(count)
        row_of[nth, index, channel], column_of[nth, index, channel] = row, column
    return Pieces(window, rooms, merged, channels, rows, columns, valid, entry_of, row_of, column_of)
