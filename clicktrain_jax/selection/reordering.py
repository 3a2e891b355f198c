"""Which filters share a tile: an order of a layer's filters in which alike ones stand together.

Tiles of (filters, channels) share one pattern and one removal. With filters in index order a tile joins filters
by chance; here they are joined by likeness. The order is virtual: parameters keep theirs, and tile ``t`` of a row
of tiles takes the filters ``order[t * F : (t + 1) * F]``.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Gains below this share of the largest benefit are rounding errors of float32, not reasons to swap.
_RELATIVE_GAIN = 1e-6
# Bounds the rounds of swaps in one assignment; few are needed, for many pairs swap at once.
_SWAP_ROUNDS = 8


class _Problem(NamedTuple):
    """Scores (N, P, rows): what each filter retains under each pattern, in each row of tiles.

    N is the number of groups times F: filters without scores fill the last group where F does not divide cout. They
    stay in it, so that it is the short one.
    """

    scores: jax.Array
    num_filters: int
    num_removed: jax.Array


def assign_filters(
    taps: Any,
    patterns: Any | None,
    *,
    tile: tuple[int, int],
    num_removed: Any = 0,
    alternations: int = 8,
    sweeps: int = 8,
) -> jax.Array:
    """Order a layer's filters such that tiles of (filters, channels) in that order retain much of its score.

    Maximised is what `retained_in_order` computes: the sum, over the tiles that stay, of the tile's score under its
    best pattern. Never behind the index order there, beyond rounding. Deterministic; among equals the lowest index.
    Jittable, ``tile``, ``alternations`` and ``sweeps`` static.

    Args:
        taps: float32 (T, cin, cout), non-negative scores per tap.
        patterns: bool (P, T), True where a tap stays; None where only whole kernels are removed.
        tile: (filters F, channels C), both >= 1. Where F does not divide cout the last group is short.
        num_removed: tiles removed in the whole layer, those that retain least; an int, or a traced int32 scalar.
        alternations: rounds of the first stage from each start, at most.
        sweeps: rounds of the second stage; each puts every filter up for exchange once. 0 leaves it out.

    Returns:
        int32 (cout,), a permutation; the index order when F is 1 or at least cout, where nothing can be gained.

    Raises:
        ValueError: scores of another rank, negative or not finite (seen outside jit only); patterns that do not fit
            them; a bad tile; more tiles removed than there are; negative alternations or sweeps.

    Source: this project's own. First stage, as k-means with balanced clusters: given the groups each tile takes its
    pattern, given these filters are assigned to groups by swaps of pairs, all mutually best ones at once. It starts
    from the index order, from the order of falling total score (removal prefers tiles of light filters) and from
    seeds far apart from each other. Second stage, on the best of these: every group gives away one filter, and these
    are assigned anew, with each tile's pattern chosen anew for every candidate (a cyclic-exchange neighbourhood:
    Thompson and Orlin, 1989). Here a tile counts for what it retains above the largest removed tile, so that tiles
    may pass from removed to kept and back; the best order seen is returned.
    """
    taps, patterns = _check(taps, patterns, tile, num_removed)
    for name, value in (("alternations", alternations), ("sweeps", sweeps)):
        if not _is_size(value, least=0):
            raise ValueError(f"{name}={value!r}: expected an int, 0 or more")
    filters = int(tile[0])
    if filters == 1 or filters >= taps.shape[2]:
        return jnp.arange(taps.shape[2], dtype=jnp.int32)
    sizes = (filters, int(tile[1]))
    return _assign(taps, patterns, jnp.asarray(num_removed, jnp.int32), sizes, int(alternations), int(sweeps))


def retained_in_order(
    taps: Any, patterns: Any | None, order: Any, *, tile: tuple[int, int], num_removed: Any = 0
) -> jax.Array:
    """The score that a layer retains when its filters share tiles in the given order.

    Args:
        taps: float32 (T, cin, cout).
        patterns: bool (P, T), or None.
        order: int (cout,), a permutation.
        tile: (filters, channels).
        num_removed: tiles removed, those that retain least.

    Returns:
        float32 scalar: over the tiles that stay, the sum of each one's score under its best pattern.

    Raises:
        ValueError: as `assign_filters`; an order of another length.
    """
    taps, patterns = _check(taps, patterns, tile, num_removed)
    if jnp.shape(order) != taps.shape[2:]:
        raise ValueError(f"order of shape {jnp.shape(order)}: expected ({taps.shape[2]},), one index for each filter")
    filters = min(int(tile[0]), taps.shape[2])
    problem = _Problem(_row_scores(taps, patterns, tile[1], filters), taps.shape[2], jnp.asarray(num_removed))
    return _evaluate(problem, _sums(problem, _grouped(jnp.asarray(order), problem, filters)))[0]


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least


def _check(taps: Any, patterns: Any, tile: Any, num_removed: Any) -> tuple[jax.Array, jax.Array | None]:
    shape = tuple(jnp.shape(taps))
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"taps of shape {shape}: expected (taps, cin, cout), none of them 0")
    if not (isinstance(tile, tuple) and len(tile) == 2 and all(_is_size(size, least=1) for size in tile)):
        raise ValueError(f"tile={tile!r}: expected (filters, channels), two positive ints; give sizes in place of None")
    if not isinstance(taps, jax.core.Tracer):
        values = np.asarray(taps, np.float32)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("taps hold negative, NaN or infinite scores: expected importance scores, such as (w g)^2")
    if patterns is not None and (len(jnp.shape(patterns)) != 2 or jnp.shape(patterns)[1] != shape[0]):
        raise ValueError(
            f"patterns of shape {jnp.shape(patterns)}: expected (P, {shape[0]}), one flag for each tap of {shape}; "
            "reshape a set of (P, kh, kw)"
        )
    if jnp.shape(num_removed) != ():
        raise ValueError(f"num_removed of shape {jnp.shape(num_removed)}: expected one number for the layer")
    tiles = math.ceil(shape[1] / tile[1]) * math.ceil(shape[2] / tile[0])
    if not isinstance(num_removed, jax.core.Tracer) and not 0 <= int(num_removed) <= tiles:
        raise ValueError(f"num_removed={num_removed!r}: expected 0 to {tiles}, the number of tiles of {tile} here")
    keep = None if patterns is None else jnp.asarray(patterns).astype(bool)
    return jnp.asarray(taps, jnp.float32), keep


def _row_scores(taps: jax.Array, patterns: jax.Array | None, channels: int, filters: int) -> jax.Array:
    """(N, P, rows): retained scores of each filter, summed over the channels of each row of tiles."""
    num_taps, cin, cout = taps.shape
    rows = math.ceil(cin / channels)
    keep = jnp.ones((1, num_taps), bool) if patterns is None else patterns
    padded = jnp.pad(taps, ((0, 0), (0, rows * channels - cin), (0, -cout % filters)))
    row_taps = padded.reshape(num_taps, rows, channels, -1).sum(axis=2)
    return jnp.einsum("pt,trf->fpr", keep.astype(jnp.float32), row_taps, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("tile", "alternations", "sweeps"))
def _assign(
    taps: jax.Array,
    patterns: jax.Array | None,
    num_removed: jax.Array,
    tile: tuple[int, int],
    alternations: int,
    sweeps: int,
) -> jax.Array:
    filters, channels = tile
    scores = _row_scores(taps, patterns, channels, filters)
    # Scores may be as small as 1e-20: squares and sums of them should stay far from the smallest float32.
    largest = jnp.max(scores)
    problem = _Problem(scores / jnp.where(largest > 0, largest, 1.0), taps.shape[2], num_removed)
    identity = _grouped(jnp.arange(problem.num_filters, dtype=jnp.int32), problem, filters)
    mass = problem.scores.max(axis=1).sum(axis=1)
    by_mass = _grouped(jnp.argsort(-mass[: problem.num_filters]).astype(jnp.int32), problem, filters)
    orders = jnp.stack([identity, by_mass, identity])
    seeds = problem.scores[_seeds(problem, mass, filters)]
    sums = jnp.stack([_sums(problem, identity), _sums(problem, by_mass), seeds])
    found = lax.map(lambda start: _alternate(problem, *start, alternations), (orders, sums))
    # The index order itself comes first: it stays unless another one is better.
    candidates = jnp.concatenate([identity[None], found])
    reached = lax.map(lambda groups: _evaluate(problem, _sums(problem, groups))[0], candidates)
    best = jnp.argmax(reached)
    return _exchange(problem, candidates[best], reached[best], sweeps).reshape(-1)[: problem.num_filters]


def _grouped(order: jax.Array, problem: _Problem, filters: int) -> jax.Array:
    """(cout,) -> (groups, F), with the filters without scores at the end."""
    rest = jnp.arange(problem.num_filters, problem.scores.shape[0], dtype=order.dtype)
    return jnp.concatenate([order, rest]).reshape(-1, filters)


def _sums(problem: _Problem, groups: jax.Array) -> jax.Array:
    """(groups, P, rows): each tile's score under each pattern."""
    return problem.scores[groups].sum(axis=1)


def _evaluate(problem: _Problem, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The objective, and the score of the largest removed tile (0 where none is)."""
    tiles = jnp.sort(sums.max(axis=1).reshape(-1))
    retained = jnp.where(jnp.arange(tiles.size) >= problem.num_removed, tiles, 0.0).sum()
    return retained, jnp.where(problem.num_removed > 0, tiles[jnp.maximum(problem.num_removed - 1, 0)], 0.0)


def _seeds(problem: _Problem, mass: jax.Array, filters: int) -> jax.Array:
    """(groups,): filters far apart in what they retain, the heavy ones first."""
    flat = problem.scores.reshape(problem.scores.shape[0], -1)
    unit = flat * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(flat), axis=1, keepdims=True), 1e-30))
    num_groups = flat.shape[0] // filters

    def add(group: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seeds, alike = carry
        seed = jnp.argmax(mass * (1.0 - alike)).astype(jnp.int32)
        likeness = jnp.matmul(unit, unit[seed], precision=lax.Precision.HIGHEST)
        return seeds.at[group].set(seed), jnp.maximum(alike, likeness)

    start = (jnp.zeros(num_groups, jnp.int32), jnp.zeros(flat.shape[0]))
    return lax.fori_loop(0, num_groups, add, start)[0]


def _mutual_swaps(benefit: jax.Array, movable: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One round of swaps: which place's occupant each place takes, and whether any swap was made.

    Args:
        benefit: (n, n), of the occupant of place i (row) in place j (column).
        movable: bool (n,).
    """
    places = jnp.arange(benefit.shape[0])
    own = jnp.diagonal(benefit)
    gain = benefit + benefit.T - own[:, None] - own[None, :]
    worthwhile = (gain > _RELATIVE_GAIN * jnp.max(benefit)) & movable[:, None] & movable[None, :]
    gain = jnp.where(worthwhile, gain, 0.0)
    partner = jnp.argmax(gain, axis=1)
    swapped = (partner[partner] == places) & (gain[places, partner] > 0)
    return jnp.where(swapped, partner, places), jnp.any(swapped)


def _improve(benefit_of: Any, occupants: jax.Array, movable: jax.Array) -> jax.Array:
    """Rounds of swaps until none helps; ``benefit_of(occupants)`` is `_mutual_swaps`'s matrix."""

    def more(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return carry[1] & (carry[2] < _SWAP_ROUNDS)

    def swap(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        taken, changed = _mutual_swaps(benefit_of(carry[0]), movable)
        return carry[0][taken], changed, carry[2] + 1

    return lax.while_loop(more, swap, (occupants, jnp.bool_(True), jnp.int32(0)))[0]


def _alternate(problem: _Problem, groups: jax.Array, sums: jax.Array, alternations: int) -> jax.Array:
    """Choose patterns for the groups, then groups for the filters, in turn. ``sums`` makes the first choice."""
    num_groups, filters = groups.shape
    flat = problem.scores.reshape(problem.scores.shape[0], -1)
    group_of_place = jnp.repeat(jnp.arange(num_groups), filters)

    def turn(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        groups, sums = carry
        chosen = jax.nn.one_hot(jnp.argmax(sums, axis=1), sums.shape[1], axis=1)
        kept = sums.max(axis=1, keepdims=True) >= _evaluate(problem, sums)[1]
        chosen = jnp.where(kept, chosen, 0.0).reshape(num_groups, -1)
        benefit = jnp.matmul(flat, chosen.T, precision=lax.Precision.HIGHEST)
        occupants = groups.reshape(-1)
        movable = occupants < problem.num_filters
        occupants = _improve(lambda occupants: benefit[occupants][:, group_of_place], occupants, movable)
        groups = occupants.reshape(num_groups, filters)
        return groups, _sums(problem, groups)

    return lax.fori_loop(0, alternations, turn, (groups, sums))[0]


def _exchange(problem: _Problem, groups: jax.Array, reached: jax.Array, sweeps: int) -> jax.Array:
    """Every group gives away one filter and these are assigned anew; the slots take turns. The best groups seen."""
    num_groups, filters = groups.shape
    everyone = jnp.arange(num_groups)
    # Which slots meet differs from sweep to sweep.
    offsets = jnp.asarray(np.random.default_rng(0).integers(0, filters, (max(sweeps, 1), num_groups)), jnp.int32)

    def sweep(index: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        groups, sums, threshold, best, reached = carry

        def reassign(turn: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            groups, sums = carry
            slots = (turn + offsets[index]) % filters
            out = groups[everyone, slots]
            scores = problem.scores[out]
            without = sums - scores
            # (filter given away, group that takes it, P, rows)
            tiles = (without[None] + scores[:, None]).max(axis=2)
            benefit = jnp.maximum(tiles - threshold, 0.0).sum(axis=-1)
            taken = _improve(lambda taken: benefit[taken], everyone, out < problem.num_filters)
            return groups.at[everyone, slots].set(out[taken]), without + scores[taken]

        groups, _ = lax.fori_loop(0, filters, reassign, (groups, sums))
        # Summed anew: the running sums gather rounding errors.
        sums = _sums(problem, groups)
        value, threshold = _evaluate(problem, sums)
        return groups, sums, threshold, jnp.where(value > reached, groups, best), jnp.maximum(value, reached)

    sums = _sums(problem, groups)
    return lax.fori_loop(0, sweeps, sweep, (groups, sums, _evaluate(problem, sums)[1], groups, reached))[3]
