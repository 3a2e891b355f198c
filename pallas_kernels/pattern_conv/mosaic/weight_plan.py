"""How the work of the weight gradient's kernels is cut: static facts, and what follows from a mask's counts."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.pattern_conv.config import WeightTiles
from pallas_kernels.pattern_conv.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """The static facts of one launch.

    An item is a group of entries of one list, for a part of the tile's filters and of its channels. Its steps go along
    the rows of the output, all of them for a block of images, then for the next.

    Attributes:
        geometry: of the convolution.
        tiles: how the work is cut.
        tile: (filters, channels) that share their taps.
        shape: (kh, kw, cin, cout).
        batch: images.
        lists: filter tiles.
        room: entries that a list has room for.
        blocks: thread blocks launched, one a multiprocessor.
    """

    geometry: Geometry
    tiles: WeightTiles
    tile: tuple[int, int]
    shape: tuple[int, int, int, int]
    batch: int
    lists: int
    room: int
    blocks: int

    @property
    def parts(self) -> tuple[int, int]:
        """(filter parts of a tile, channel parts of a tile)."""
        return self.tile[0] // self.tiles.filters, self.tile[1] // self.tiles.channels

    @property
    def items(self) -> int:
        """Items that there is room for."""
        return self.lists * -(-self.room // self.tiles.entries) * self.parts[0] * self.parts[1]

    @property
    def slots(self) -> int:
        """Parts that there is room for: part = item + block, so that no two are one."""
        return self.items + self.blocks

    @property
    def grid(self) -> tuple[int, int, int]:
        """(blocks of images, rows, columns) that an item's sum goes over, the last fastest."""
        return -(-self.batch // self.tiles.images), *self.geometry.output

    @property
    def steps(self) -> int:
        """Steps of an item's whole sum."""
        return math.prod(self.grid)

    @property
    def back(self) -> int:
        """Whether steps look at the input of the one before, 1, since taps beside each other may; else 0."""
        return int(self.tiles.entries > 1 and self.geometry.window[1] > self.geometry.strides[1])

    def total(self, groups):
        """Steps of so many groups."""
        return groups * self.parts[0] * self.parts[1] * self.steps

    def share(self, total):
        """(steps of a block's run, how many of the first blocks do one more), of so many steps in all."""
        if isinstance(total, int):
            return divmod(total, max(1, min(total // self.tiles.least, self.blocks)))
        blocks = jnp.maximum(jnp.minimum(lax.div(total, self.tiles.least), self.blocks), 1)
        return lax.div(total, blocks), lax.rem(total, blocks)

    def follows(self, codes, code):
        """(whether an entry looks at what another one of its group looked at one step before, which one).

        It is one of the next column that reads for itself, so no more than one step is looked back.

        Args:
            codes: of the group's entries, block * kh * kw + tap; negative where there is none.
            code: of the entry.
        """
        kw, stride = self.geometry.window[1], self.geometry.strides[1]
        found, number, after = False, 0, False
        for place, other in enumerate(codes):
            found |= other == code + stride
            after |= other == code + 2 * stride
            number = number + place * (other == code + stride)
        column = code % kw if isinstance(code, int) else lax.rem(code, kw)
        leads = (column + 2 * stride >= kw) | (after ^ True)
        return (column + stride < kw) & found & leads, number


def groups_before(plan: WeightPlan, counts, index: jax.Array | int) -> jax.Array:
    """Groups of all lists before one."""

    def add(number, total):
        return total + lax.div(counts[number] + plan.tiles.entries - 1, plan.tiles.entries)

    return lax.fori_loop(0, index, add, jnp.int32(0))


def runs(plan: WeightPlan, counts: np.ndarray) -> list[tuple[int, int]]:
    """Of each block the first of its steps, of all items' one after the other, and one past its last."""
    total: Any = plan.total(int(sum(-(-int(count) // plan.tiles.entries) for count in counts)))
    share, more = plan.share(total)
    ends: list[Any] = [min(block * share + min(block, more), total) for block in range(plan.blocks + 1)]
    return list(zip(ends, ends[1:]))


def bytes_of_parts(plan: WeightPlan, counts: np.ndarray) -> int:
    """What the parts that are written take, and read again by the second kernel."""
    number = sum((end - 1) // plan.steps - begin // plan.steps + 1 for begin, end in runs(plan, counts) if begin < end)
    return 4 * number * plan.tiles.entries * plan.tiles.filters * plan.tiles.channels


def bytes_read(plan: WeightPlan, pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64 (blocks,): what each block reads of input and output gradient, 16-bit numbers; outside nothing is read."""
    tiles = plan.tiles
    groups = [
        [int(code) for code in pairs[index, first : min(first + tiles.entries, count)]]
        for index, count in enumerate(map(int, counts))
        for first in range(0, count, tiles.entries)
    ]
    _, row, column = np.unravel_index(np.arange(plan.steps), plan.grid)
    images = 2 * tiles.images
    parts = plan.parts[0] * plan.parts[1]
    read = np.zeros(plan.blocks, np.int64)

    @functools.cache
    def reads(group: int) -> tuple[np.ndarray, np.ndarray]:
        """Entries read in each step of the sum: (at a row's or a run's first column, at others)."""
        first, other = np.zeros(plan.steps, np.int64), np.zeros(plan.steps, np.int64)
        for code in groups[group]:
            tap_row, tap_column = divmod(code % (plan.shape[0] * plan.shape[1]), plan.shape[1])
            there = plan.geometry.reached(0)[row, tap_row] & plan.geometry.reached(1)[column, tap_column]
            first += there
            other += there & (not (plan.back and plan.follows(groups[group], code)[0]))
        return first, other

    for block, (begin, end) in enumerate(runs(plan, counts)):
        while begin < end:
            item, since = divmod(begin, plan.steps)
            steps = min(end - begin, plan.steps - since)
            place = slice(since, since + steps)
            first, other = (each[place] for each in reads(item // parts))
            fresh = column[place] == 0
            fresh[0] = True
            entries = int(np.where(fresh, first, other).sum())
            read[block] += images * (entries * tiles.channels + steps * tiles.filters)
            begin += steps
    return read
