"""Choosing a few of many: the discrete search behind generated pattern sets.

The problem is maximum coverage with weights. Each of C items retains a score on each of N kernels, a kernel is
credited with the best item of the set, and the set's value is the sum over kernels. Items are single patterns,
or pairs of patterns chosen together; items that must not be chosen together *clash*.
"""

import jax
import jax.numpy as jnp

from clicktrain_jax.patterns.kernels import ordered_sum, total

# An exchange has to help by more than the rounding of the sums compared.
_MARGIN = 1e-6


def retained(sampled: tuple[jax.Array, jax.Array], indices: jax.Array) -> jax.Array:
    """What candidates retain of kernels.

    Args:
        sampled: scores (taps, rows, width) and the weight (rows, width) of each kernel.
        indices: int32 (C, entries), each candidate's taps in ascending order.

    Returns:
        float32 (C, rows, width), weighted.
    """
    scores, weights = sampled
    # Weighted after the sum, so that two tap sets of equal scores stay equal.
    sums = ordered_sum(jnp.moveaxis(scores[indices], 1, 0)) * weights[None]
    return jax.lax.optimization_barrier(sums)


def value(retained: jax.Array, chosen: jax.Array) -> jax.Array:
    """What the set of items ``chosen`` int (P,) is worth, float32 scalar."""
    return total(jnp.max(retained[chosen], axis=0))


def greedy(retained: jax.Array, clash: jax.Array, usable: jax.Array, count: int) -> jax.Array:
    """Take the item that adds most, ``count`` times, ties to the lowest index.

    Args:
        retained: float32 (C, rows, width), non-negative.
        clash: bool (C, C), symmetric, True on the diagonal.
        usable: bool (C,), False for items that may not be taken.
        count: how many; so many must be possible without a clash, whatever is taken first.

    Returns:
        int32 (count,), distinct. Without clashes its value is at least 1 - 1/e of the best possible.
    """

    def take(index: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, free, chosen = carry
        values = total(jnp.maximum(best[None], retained))
        pick = jnp.argmax(jnp.where(free, values, -1.0)).astype(jnp.int32)
        return jnp.maximum(best, retained[pick]), free & ~clash[pick], chosen.at[index].set(pick)

    start = (jnp.zeros(retained.shape[1:], retained.dtype), usable, jnp.zeros(count, jnp.int32))
    return jax.lax.fori_loop(0, count, take, start)[2]


def exchange(retained: jax.Array, clash: jax.Array, usable: jax.Array, chosen: jax.Array) -> jax.Array:
    """Replace items of a set by better ones, one at a time, until no single replacement helps.

    The places of the set take turns: the one whose turn it is gets the item that is best beside all the others.

    Args:
        retained: float32 (C, rows, width), non-negative.
        clash: bool (C, C), symmetric, True on the diagonal.
        usable: bool (C,), False for items that may not be taken.
        chosen: int32 (P,), a set without clashes.

    Returns:
        int32 (P,), without clashes, worth at least as much as ``chosen``.
    """
    places = jnp.arange(len(chosen))

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        return carry[3] < len(chosen)

    def turn(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        chosen, worth, place, idle = carry
        others = places != place
        best = jnp.max(jnp.where(others[:, None, None], retained[chosen], 0.0), axis=0)
        values = total(jnp.maximum(best[None], retained))
        blocked = (clash[chosen] & others[:, None]).any(axis=0)
        pick = jnp.argmax(jnp.where(usable & ~blocked, values, -1.0)).astype(jnp.int32)
        helps = values[pick] > worth * (1.0 + _MARGIN)
        return (
            jnp.where(helps & ~others, pick, chosen),
            jnp.where(helps, values[pick], worth),
            (place + 1) % len(chosen),
            jnp.where(helps, 0, idle + 1),
        )

    zero = jnp.int32(0)
    return jax.lax.while_loop(unfinished, turn, (chosen, value(retained, chosen), zero, zero))[0]
