"""Which multiprocessor computes which output tile of a Hopper kernel: every one gets as much as any other.

How much an output tile costs depends on what its list retains and on how many taps point inside the image. Tiles are
dealt the heaviest first, each to the multiprocessor that has least. Where the lists are known that is
done once on the host (`launches`); where they are traced, the tiles are sorted by the program and dealt to and fro.
"""

import dataclasses
import functools
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# From so many output tiles a multiprocessor on, dealing them to and fro is as even as the host's way.
_MANY = 48


@functools.partial(jax.tree_util.register_dataclass, data_fields=["order", "starts"], meta_fields=["plan"])
@dataclasses.dataclass(frozen=True)
class Work:
    """A worklist of one launch; a pytree whose leaves are the arrays.

    A lane is a computing warpgroup, lane = block * warpgroups + warpgroup.

    Attributes:
        plan: the launch that it is for, a `mosaic.products.Plan`; hashable.
        order: int32 (items,), the output tiles, those of a lane side by side, in its order.
        starts: int32 (lanes + 1,), where each lane's begin.
    """

    plan: Any
    order: jax.Array | np.ndarray
    starts: jax.Array | np.ndarray


def work_of(plan, pairs: jax.Array | np.ndarray, counts: jax.Array | np.ndarray) -> Work:
    """The worklist of a launch: of numpy arrays by the host, else by the program.

    Args:
        plan: the launch.
        pairs: int32 (lists, room) of block * kh * kw + tap.
        counts: int32 (lists,).
    """
    if isinstance(pairs, np.ndarray) and isinstance(counts, np.ndarray):
        return dealt(plan, costs(plan, pairs, counts))
    cost = costs(plan, pairs, counts, jnp)
    order = jnp.argsort(-cost, stable=True).astype(jnp.int32)
    places, starts = _to_and_fro(plan)
    return Work(plan, order[places], jnp.asarray(starts))


def costs(plan, pairs, counts, xp=np):
    """int32 (items,): the 16-bit numbers that each output tile of a launch moves, read and written.

    Args:
        plan: the launch.
        pairs: int32 (lists, room).
        counts: int32 (lists,).
        xp: numpy, or jax.numpy for traced arrays.
    """
    taps = plan.geometry.window[0] * plan.geometry.window[1]
    read = plan.read_by_entries(pairs) * (xp.arange(pairs.shape[1]) < counts[:, None])
    found = (pairs % taps)[:, :, None] == xp.arange(taps)
    by_tap = xp.sum(found * read[:, :, None], axis=1, dtype=xp.int32)  # (lists, taps)
    by_list = xp.sum(by_tap[None] * plan.inside[:, None], axis=2, dtype=xp.int32)  # (places, lists)
    images, rows, columns, channels = plan.grid
    shared = plan.output_tile // plan.tiles.outputs
    cost = plan.written + xp.repeat(by_list, shared, axis=1)[:, :channels]
    return xp.broadcast_to(cost.astype(xp.int32), (images, rows * columns, channels)).reshape(-1)


def loads(work: Work, cost: np.ndarray, multiprocessors: int = 132) -> np.ndarray:
    """What each multiprocessor does, (multiprocessors,): ``cost`` (items,) summed over its output tiles."""
    lanes = np.repeat(np.arange(len(work.starts) - 1), np.diff(work.starts))
    return np.bincount(lanes // work.plan.tiles.warpgroups, cost[np.asarray(work.order)], minlength=multiprocessors)


def dealt(plan, cost: np.ndarray) -> Work:
    """The heaviest first, each to the multiprocessor with least; there to the warpgroup with less."""
    order = np.argsort(-cost, kind="stable").astype(np.int32)
    if plan.items > _MANY * plan.blocks:
        places, starts = _to_and_fro(plan)
        return Work(plan, order[places], starts)
    rings = plan.tiles.warpgroups
    blocks = [(0, block) for block in range(plan.blocks)]
    sums = [[0] * rings for _ in blocks]
    lanes: list[list[int]] = [[] for _ in range(plan.blocks * rings)]
    for item in order.tolist():
        load, block = blocks[0]
        heapq.heapreplace(blocks, (load + int(cost[item]), block))
        ring = sums[block].index(min(sums[block]))
        sums[block][ring] += int(cost[item])
        lanes[block * rings + ring].append(item)
    starts = np.concatenate([[0], np.cumsum([len(lane) for lane in lanes])]).astype(np.int32)
    return Work(plan, np.array([item for lane in lanes for item in lane], np.int32), starts)


def _to_and_fro(plan) -> tuple[np.ndarray, np.ndarray]:
    """Dealing sorted output tiles to the multiprocessors in turn, each round the other way: (places, starts)."""
    rings, place = plan.tiles.warpgroups, np.arange(plan.items)
    turn, block = place // plan.blocks, place % plan.blocks
    block = np.where(turn % 2 == 0, block, plan.blocks - 1 - block)
    lane = block * rings + turn % rings
    places = np.argsort(lane, kind="stable").astype(np.int32)
    return places, np.concatenate([[0], np.cumsum(np.bincount(lane, minlength=plan.blocks * rings))]).astype(np.int32)
