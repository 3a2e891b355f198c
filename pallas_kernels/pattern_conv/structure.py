"""From a boolean mask to what is retained of a convolution: static facts apart from arrays.

A mask that is shared by tiles of (filters, channels) falls into a grid of blocks; each block retains one set of
taps, its pattern, or nothing. The static facts (shape, tile, which patterns there are, room in the lists) decide
the compiled program; the arrays (which block has which pattern) are its arguments. The room is rounded up, so
that new masks of like size fit the same program.
"""

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import numpy as np

from pallas_kernels.pattern_conv.pieces import Pieces, Taps, make_pieces, round_up, taps_of

# A block's taps are the bits of one int64.
_MOST_TAPS = 62


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["pattern_ids", "pieces", "pairs", "pair_counts", "pairs_by_channel", "pair_counts_by_channel", "work"],
    meta_fields=["shape", "tile", "patterns"],
)
@dataclasses.dataclass(frozen=True)
class Structure:
    """What a convolution retains; a pytree whose leaves are the arrays.

    Below, B is the number of channel blocks, T the number of filter tiles, P of patterns. A tap is counted row by
    row: tap = row * kw + column. The last block along either axis may be short.

    Attributes:
        shape: (kh, kw, cin, cout) of the kernel.
        tile: (filters, channels) of a block.
        patterns: the tap sets that retained blocks have, sorted; each a sorted tuple of taps.
        pattern_ids: int32 (B, T): 1 + the index of the block's pattern, 0 for a removed block.
        pieces: what the portable form reads, by window.
        pairs: int32 (T, room): for each filter tile its retained (block, tap) as block * kh * kw + tap, rising;
            the rest is 0 and must not be read.
        pair_counts: int32 (T,): how many are to be read.
        pairs_by_channel: int32 (B, room): for each channel block its retained (tile, tap) as tile * kh * kw + tap.
        pair_counts_by_channel: int32 (B,).
        work: worklists of a GPU's launches for batches of one shape, of `launches.for_batch`; empty until then.
    """

    shape: tuple[int, int, int, int]
    tile: tuple[int, int]
    patterns: tuple[Taps, ...]
    pattern_ids: jax.Array | np.ndarray
    pieces: tuple[Pieces, ...]
    pairs: jax.Array | np.ndarray
    pair_counts: jax.Array | np.ndarray
    pairs_by_channel: jax.Array | np.ndarray
    pair_counts_by_channel: jax.Array | np.ndarray
    work: tuple = ()

    @property
    def grid(self) -> tuple[int, int]:
        """(channel blocks, filter tiles)."""
        filters, channels = self.tile
        return math.ceil(self.shape[2] / channels), math.ceil(self.shape[3] / filters)

    @property
    def num_taps(self) -> int:
        """Taps of a whole kernel, kh * kw."""
        return self.shape[0] * self.shape[1]

    def retained(self) -> float:
        """Share of the weights that is retained; needs concrete arrays."""
        return float(mask_of(self).mean())


def make_structure(mask: np.ndarray, *, tile: tuple[int | None, int | None] | None = None) -> Structure:
    """Find what a mask retains, on the host.

    Args:
        mask: bool (kh, kw, cin, cout), True where a weight is retained; concrete.
        tile: (filters, channels) that share all their taps; None in it stands for all. When None, the largest that
            holds is taken. Give it where one program shall serve several masks: inferred ones may differ by chance.

    Returns:
        A `Structure` whose arrays are numpy's.

    Raises:
        ValueError: the mask is not bool, not 4-D, empty or of more than 62 taps, or is not shared as ``tile`` says (the
            nearest tile that holds is named).
    """
    mask = np.asarray(mask)
    if mask.ndim != 4 or mask.dtype != bool or 0 in mask.shape:
        raise ValueError(f"a mask is bool (kh, kw, cin, cout), got {mask.dtype} {mask.shape}")
    kh, kw, cin, cout = mask.shape
    if kh * kw > _MOST_TAPS:
        raise ValueError(f"a kernel has at most {_MOST_TAPS} taps, got {(kh, kw)}: leave this convolution dense")
    largest = _largest_tile(mask)
    tile = _check_tile(largest if tile is None else tile, largest, mask.shape)
    filters, channels = tile
    blocks = mask[:, :, ::channels, ::filters].reshape(kh * kw, -(-cin // channels), -(-cout // filters))
    # Each block's taps as one number, tap 0 in the lowest bit.
    codes = np.tensordot(1 << np.arange(kh * kw, dtype=np.int64), blocks, axes=1)
    distinct = np.unique(codes)
    taps = [taps_of(int(code)) for code in distinct]
    present = sorted(filter(None, taps))
    id_of = {(): 0} | {pattern: index + 1 for index, pattern in enumerate(present)}
    pattern_ids = np.array([id_of[pattern] for pattern in taps], np.int32)[np.searchsorted(distinct, codes)]
    pairs, pair_counts = _pair_lists(blocks.transpose(2, 1, 0))
    pairs_by_channel, pair_counts_by_channel = _pair_lists(blocks.transpose(1, 2, 0))
    return Structure(
        shape=mask.shape,
        tile=tile,
        patterns=tuple(present),
        pattern_ids=pattern_ids,
        pieces=make_pieces(codes, mask.shape, tile),
        pairs=pairs,
        pair_counts=pair_counts,
        pairs_by_channel=pairs_by_channel,
        pair_counts_by_channel=pair_counts_by_channel,
    )


def mask_of(structure: Structure) -> jax.Array | np.ndarray:
    """The mask back from the structure, bool (kh, kw, cin, cout); works on traced arrays too."""
    kh, kw, cin, cout = structure.shape
    filters, channels = structure.tile
    xp: Any = np if isinstance(structure.pattern_ids, np.ndarray) else jax.numpy
    table = np.zeros((len(structure.patterns) + 1, kh * kw), bool)
    for index, taps in enumerate(structure.patterns):
        table[index + 1, list(taps)] = True
    blocks = xp.asarray(table)[structure.pattern_ids]  # (B, T, taps)
    whole = xp.repeat(xp.repeat(blocks, channels, axis=0)[:cin], filters, axis=1)[:, :cout]
    return xp.moveaxis(whole, 2, 0).reshape(kh, kw, cin, cout)


def _largest_tile(mask: np.ndarray) -> tuple[int, int]:
    """The widest (filters, channels) such that no block's inside differs."""
    sizes = []
    for axis in (3, 2):
        length = mask.shape[axis]
        lines = np.moveaxis(mask, axis, 0).reshape(length, -1)
        changes = 1 + np.flatnonzero((lines[1:] != lines[:-1]).any(axis=1))
        # Blocks may change at these places alone, so every one is a multiple of the block's size.
        sizes.append(math.gcd(*changes.tolist()) if len(changes) else length)
    return sizes[0], sizes[1]


def _check_tile(
    tile: tuple[int | None, int | None], largest: tuple[int, int], shape: tuple[int, ...]
) -> tuple[int, int]:
    if not isinstance(tile, tuple | list) or len(tile) != 2:
        raise ValueError(f"tile holds (filters, channels), positive or None, got {tile}")
    checked = []
    for name, size, widest, length in zip(("filters", "channels"), tile, largest, (shape[3], shape[2])):
        size = length if size is None else size
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"tile holds (filters, channels), positive or None, got {tile}")
        size = min(int(size), length)
        # A widest of the whole axis never changes, so any size holds.
        if widest != length and widest % size:
            raise ValueError(
                f"the mask of shape {shape} is not shared by tiles of {tile} (filters, channels): its {name} are alike "
                f"in runs of {widest} at most; the largest tile that holds is {largest}"
            )
        checked.append(size)
    return checked[0], checked[1]


def _pair_lists(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool (rows, others, taps) -> int32 (rows, room) of other * taps + tap, and int32 (rows,) counts."""
    rows = blocks.reshape(len(blocks), -1)
    counts = rows.sum(axis=1, dtype=np.int32)
    lists = np.zeros((len(rows), min(round_up(max(int(counts.max()), 1)), rows.shape[1])), np.int32)
    row, entry = np.nonzero(rows)
    lists[row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]] = entry
    return lists, counts
