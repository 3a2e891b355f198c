"""Which pattern each kernel gets: shared by a tile, from a superset that a tile shares, or in quads.

Everywhere the choice is the one that retains the largest sum of scores, ties to the lowest index.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.patterns.kernels import ordered_sum
from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.selection.tiles import tile_sums, untile

# P ** 4 combinations are listed.
MAX_QUAD_PATTERNS = 16


def retained_scores(taps: jax.Array, patterns: jax.Array) -> jax.Array:
    """float32 (T, ...) scores and bool (P, kh, kw) patterns -> (P, ...): what each pattern keeps."""
    keep = jnp.asarray(patterns).reshape(patterns.shape[0], -1).T
    keep = keep.reshape(*keep.shape, *(1,) * (taps.ndim - 1))
    return ordered_sum(jnp.where(keep, taps[:, None], 0.0))


def choose_patterns(taps: jax.Array, layer: LayerPlan, patterns: jax.Array) -> jax.Array:
    """Pattern ids of a layer.

    Args:
        taps: float32 (kh * kw, cin, cout), scores.
        layer: the layer.
        patterns: bool (P, kh, kw).

    Returns:
        uint8 (cin, cout).
    """
    grid = layer.shape[2:]
    if layer.quads:
        return _choose_quads(retained_scores(taps, patterns), patterns)
    if layer.superset is not None:
        return _choose_within_supersets(taps, layer, patterns)
    sums = tile_sums(taps, layer.tile)
    ids = jnp.argmax(retained_scores(sums, patterns), axis=0).astype(jnp.uint8)
    return untile(ids, layer.tile, grid)


def retained_by(taps: jax.Array, pattern_ids: jax.Array, patterns: jax.Array) -> jax.Array:
    """float32 (cin, cout): what each kernel keeps of its score under its pattern."""
    retained = retained_scores(taps, patterns)
    return jnp.take_along_axis(retained, pattern_ids[None].astype(jnp.int32), axis=0)[0]


def _choose_within_supersets(taps: jax.Array, layer: LayerPlan, patterns: jax.Array) -> jax.Array:
    """Each tile takes the superset in which its kernels, each under its best pattern there, retain most."""
    assert layer.superset is not None
    places = range(taps.shape[0])
    supersets = np.stack([np.isin(places, kept) for kept in itertools.combinations(places, layer.superset)])
    flat = patterns.reshape(patterns.shape[0], -1)
    allowed = ~(flat[None] & ~supersets[:, None]).any(axis=-1)  # (supersets, P): the pattern lies inside
    # The patterns inside each superset, listed first: only as many as the fullest one has are looked at.
    most = int(allowed.sum(axis=1).max()) if isinstance(allowed, np.ndarray) else patterns.shape[0]
    listed = jnp.argsort(~allowed, axis=1, stable=True)[:, :most]
    number = jnp.asarray(allowed).sum(axis=1)
    retained = retained_scores(taps, patterns)

    def value(superset: tuple[jax.Array, jax.Array]) -> jax.Array:
        inside, count = superset
        best = jax.lax.fori_loop(
            0, count, lambda i, best: jnp.maximum(best, retained[inside[i]]), jnp.full(retained.shape[1:], -1.0)
        )
        # A superset without any pattern is worth less than any other, wherever scores are zero too.
        return jnp.where(count > 0, tile_sums(best, layer.tile), -1.0)

    values = jax.lax.map(value, (listed, number))
    chosen = untile(jnp.argmax(values, axis=0), layer.tile, layer.shape[2:])
    inside = jnp.moveaxis(jnp.asarray(allowed)[chosen], -1, 0)
    return jnp.argmax(jnp.where(inside, retained, -1.0), axis=0).astype(jnp.uint8)


def quad_combinations(patterns: Any, channels: int = 4) -> tuple[np.ndarray, Any]:
    """All ordered choices of a pattern for each of 4 channels, and which of them keep every tap at most twice.

    Args:
        patterns: bool (P, kh, kw).
        channels: fewer than 4 for what is left over at a layer's end.

    Returns:
        int32 (P ** channels, channels) and bool (P ** channels,), the latter a numpy array for patterns in one, so
        that they can be checked while something else is traced.
    """
    count = patterns.shape[0]
    combinations = np.stack(np.meshgrid(*[np.arange(count)] * channels, indexing="ij"), axis=-1).reshape(-1, channels)
    flat = patterns.reshape(count, -1).astype(np.int8)
    used = flat[combinations].sum(axis=1, dtype=np.int8)
    return combinations.astype(np.int32), (used <= 2).all(axis=-1)


def check_quads(patterns: np.ndarray) -> None:
    """Raise a ValueError when no four patterns of a set can stand beside each other."""
    if len(patterns) > MAX_QUAD_PATTERNS:
        raise ValueError(f"quads with {len(patterns)} patterns: at most {MAX_QUAD_PATTERNS} are supported")
    if not quad_combinations(np.asarray(patterns))[1].any():
        raise ValueError(
            "quads: no 4 of these patterns use every tap at most twice (the published sets of 4 and 8 have none); use "
            "generated ones, clicktrain_jax.patterns.Generated(8, complementary=True)"
        )


def _choose_quads(retained: jax.Array, patterns: jax.Array) -> jax.Array:
    """The best allowed combination for each filter's groups of 4 input channels, and for those left over."""
    cin = retained.shape[1]
    whole = cin - cin % 4
    parts = []
    if whole:
        parts.append(_choose_jointly(retained[:, :whole], patterns, 4))
    if cin % 4:
        parts.append(_choose_jointly(retained[:, whole:], patterns, cin % 4))
    return jnp.concatenate(parts)


def _choose_jointly(retained: jax.Array, patterns: jax.Array, channels: int) -> jax.Array:
    """uint8 (cin, cout) from (P, cin, cout), cin a multiple of ``channels``."""
    combinations, allowed = quad_combinations(jnp.asarray(patterns), channels)
    count, cin, cout = retained.shape
    by_place = jnp.moveaxis(retained.reshape(count, cin // channels, channels, cout), 2, 0)
    order = jnp.argsort(~allowed, stable=True)
    table = jnp.asarray(combinations)

    def better(index: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, which = best
        row = table[order[index]]
        here = ordered_sum(jnp.stack([by_place[place, row[place]] for place in range(channels)]))
        return jnp.maximum(value, here), jnp.where(here > value, order[index], which)

    # Only as many turns as there are allowed combinations.
    grid = cin // channels, cout
    _, which = jax.lax.fori_loop(0, allowed.sum(), better, (jnp.full(grid, -1.0), jnp.full(grid, order[0])))
    return jnp.moveaxis(table[which], -1, 1).reshape(cin, cout).astype(jnp.uint8)
