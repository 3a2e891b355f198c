"""The scores of many layers' kernels as one array, and a sample of them.

Programs over one array compile in a time that does not grow with the number of layers. Arrays over kernels have two
axes, (rows, `WIDTH`), so that sums have two levels: one long float32 sum would be off in its fifth digit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 256
# A layer's scores below this count as none: their inverse would overflow.
_TINY = float(np.finfo(np.float32).tiny)
# So many patterns at once are held against all kernels.
_AT_ONCE = 8


class Kernels(NamedTuple):
    """The kernels of several layers of one kernel size, one layer after the other.

    Attributes:
        scores: float32 (taps, rows, `WIDTH`), zero past the last kernel.
        weights: float32 (rows, `WIDTH`), 1 / the sum of the layer's scores, 0 for a layer without any score.
        counted: float32 scalar, the number of layers that have any score.
        sizes: kernels of each layer.
    """

    scores: jax.Array
    weights: jax.Array
    counted: jax.Array
    sizes: tuple[int, ...]

    @property
    def number(self) -> int:
        """How many kernels there are."""
        return sum(self.sizes)

    def share(self, patterns: jax.Array) -> jax.Array:
        """The mean over layers of the share that the best of bool (P, kh, kw) patterns retain, float32 scalar."""
        keep = patterns.reshape(len(patterns), -1).astype(jnp.float32)
        keep = jnp.pad(keep, ((0, -len(keep) % _AT_ONCE), (0, 0))).reshape(-1, _AT_ONCE, keep.shape[1])

        def compare(best: jax.Array, some: jax.Array) -> tuple[jax.Array, None]:
            # A contraction is several times faster here than sums in order, and no near-tie hangs on it.
            retained = jnp.tensordot(some, self.scores, 1, precision=jax.lax.Precision.HIGHEST)
            return jnp.maximum(best, retained.max(axis=0)), None

        best = jax.lax.scan(compare, jnp.zeros_like(self.weights), keep)[0]
        return total(best * self.weights) / jnp.maximum(self.counted, 1.0)


def gather(layers: Sequence[jax.Array]) -> Kernels:
    """`Kernels` from the scores (kh, kw, cin, cout) of each layer, non-negative."""
    # The barrier keeps a compiler from fusing a criterion's products into the sums with multiply-adds.
    layers = jax.lax.optimization_barrier([layer.astype(jnp.float32) for layer in layers])
    sizes = tuple(layer.shape[2] * layer.shape[3] for layer in layers)
    sums = jnp.stack([total(layer).sum() for layer in layers])
    counted = (sums >= _TINY).sum().astype(jnp.float32)
    inverse = _inverse(sums)
    weights = [jnp.broadcast_to(inverse[index], (1, size)) for index, size in enumerate(sizes)]
    flat = [layer.reshape(-1, size) for layer, size in zip(layers, sizes)]
    return Kernels(_fold(flat), _fold(weights)[0], counted, sizes)


def sample(kernels: Kernels, limit: int) -> tuple[jax.Array, jax.Array]:
    """At most ``limit`` kernels to search on.

    Kernels are drawn at even distances along the running sum of their weighted scores: a kernel of twice the score
    is drawn twice as often, and every draw stands for the same score. Few kernels hold most of the score, and the
    share that a pattern retains differs little from kernel to kernel, so a set's value on the sample is close to
    that on all kernels (to about 0.1 percent at the default limit).

    Returns:
        ``(scores (taps, rows, WIDTH), weights (rows, WIDTH))``: of all kernels when they are few enough.
    """
    if kernels.number <= limit:
        return kernels.scores, kernels.weights
    taps = len(kernels.scores)
    whole = ordered_sum(kernels.scores)
    # Integers, so that the running sum is exact and never falls.
    parts = (whole * kernels.weights * (2.0**31 / len(kernels.sizes))).astype(jnp.uint32)
    reached = jnp.cumsum(parts.reshape(-1), dtype=jnp.uint32)
    distance = reached[-1] // limit
    marks = distance // 2 + distance * jnp.arange(limit, dtype=jnp.uint32)
    # Past the end when there is no score at all.
    picks = jnp.minimum(jnp.searchsorted(reached, marks, side="right"), len(reached) - 1)
    weights = _inverse(whole.reshape(-1)[picks]) / limit
    return _fold([kernels.scores.reshape(taps, -1)[:, picks]]), _fold([weights[None]])[0]


def ordered_sum(terms: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """Sum over the first axis, strictly from the first term to the last.

    A near-tie then falls the same way on every backend: a contraction could run in another order, or in TF32.
    """
    result = terms[0]
    for index in range(1, len(terms)):
        result = result + terms[index]
    return result


def total(values: jax.Array) -> jax.Array:
    """(..., rows, `WIDTH`) -> (...): the sum over kernels."""
    # Without the barrier the two sums would be compiled into one.
    return jax.lax.optimization_barrier(values.sum(axis=-1)).sum(axis=-1)


def _fold(parts: Sequence[jax.Array]) -> jax.Array:
    """(M, N) each, joined -> (M, rows, `WIDTH`), filled up with zeros."""
    height, missing = len(parts[0]), -sum(part.shape[1] for part in parts) % WIDTH
    filled = [*parts, jnp.zeros((height, missing), parts[0].dtype)]
    return jnp.concatenate(filled, axis=1).reshape(height, -1, WIDTH)


def _inverse(sums: jax.Array) -> jax.Array:
    """1 / sums; 0 where there is nothing to divide by."""
    return jnp.where(sums >= _TINY, 1.0 / jnp.maximum(sums, _TINY), 0.0)
