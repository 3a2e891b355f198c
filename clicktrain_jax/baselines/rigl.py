"""RigL: sparse from the first update on, with connections that move to where the gradient wants them.

Evci et al., "Rigging the Lottery: Making All Tickets Winners" (arXiv 1911.11134).
"""

import math
import numbers
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax.baselines.sparse import MaskDict, counts_of, largest, size_of, sparse_training
from clicktrain_jax.baselines.states import check_integer
from clicktrain_jax.plan import Plan


def exchange_fraction(step: int, end_step: int, drop_fraction: float) -> float:
    """Share of the kept weights that change places in update ``step``: drop_fraction / 2 (1 + cos(pi step / end))."""
    return drop_fraction / 2 * (1 + math.cos(math.pi * step / end_step))


def rigl(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    densities: Mapping[str, float],
    key: jax.Array,
    every: int,
    end_step: int,
    drop_fraction: float = 0.3,
) -> optax.GradientTransformationExtraArgs:
    """RigL, around any optax optimizer. Put it last in a chain.

    Masks are random at first. Now and then, in each layer, the kept weights of least magnitude (after the update) are
    dropped, and as many of those masked before are grown where the dense gradient of that update is largest, so that
    the number kept never changes. Grown weights start at zero, with nothing remembered of them. Ties go to the lower
    index, which stays, or grows.

    Two things differ from the paper's algorithm: an exchange comes with an update of the weights rather than instead
    of one, so that all methods do the same number of updates; and what has just been dropped cannot grow at once.

    The first gradient is still that of the weights as they were initialised; from the first update on masked ones
    are zero.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`; its fractions are not read.
        densities: ``{layer name: share that stays}``, in (0, 1], as of `clicktrain_jax.baselines.densities`.
        key: of the first masks, from ``jax.random.key``.
        every: exchanges in updates every, 2 * every, ... (updates are counted from 0).
        end_step: exchanges come before this update only.
        drop_fraction: share of the kept weights exchanged, falling along a cosine to 0 at ``end_step``; in [0, 1].

    Returns:
        A transformation whose state is a `SparseState`.

    Raises:
        ValueError: at once for densities of other layers or out of range, other arguments out of range; in ``init``
            for parameters of another tree; in ``update`` when ``params`` is missing.

    Source: Evci et al. 2020 (arXiv 1911.11134), algorithm 1.
    """
    every = check_integer("every", every, 1)
    end_step = check_integer("end_step", end_step, 1)
    real = isinstance(drop_fraction, numbers.Real) and not isinstance(drop_fraction, bool)
    if not real or not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction={drop_fraction!r}: expected a share in [0, 1]")
    if not isinstance(key, jax.Array):
        raise ValueError(f"key={key!r}: expected a key of jax's, such as jax.random.key(0)")
    kept = counts_of(plan, densities)
    # How many change places in each exchange, worked out beforehand in 64 bits; entry 0 is no exchange.
    shares = [0.0, *(exchange_fraction(step, end_step, drop_fraction) for step in range(every, end_step, every))]
    exchanged = {
        layer.name: np.array(
            [min(round(share * kept[layer.name]), size_of(layer) - kept[layer.name]) for share in shares], np.int32
        )
        for layer in plan.layers
    }

    def start() -> MaskDict:
        masks = {}
        for layer in plan.layers:
            order = jax.random.permutation(jax.random.fold_in(key, zlib.crc32(layer.name.encode())), size_of(layer))
            masks[layer.name] = (order < kept[layer.name]).reshape(layer.leaf_shape)
        return masks

    def is_due(count: jax.Array) -> jax.Array:
        return (count > 0) & (count % every == 0) & (count < end_step)

    def renew(count: jax.Array, masks: MaskDict, weights: MaskDict, grads: MaskDict) -> MaskDict:
        new = {}
        for name, mask in masks.items():
            number = jnp.asarray(exchanged[name])[count // every]
            # Magnitudes are not negative: -1 marks what cannot be chosen.
            magnitude = jnp.where(mask, jnp.abs(weights[name]).astype(jnp.float32), -1.0)
            pull = jnp.where(mask, -1.0, jnp.abs(grads[name]).astype(jnp.float32))
            new[name] = largest(magnitude, kept[name] - number) | largest(pull, number)
        return new

    return sparse_training("rigl", inner, plan, start=start, is_due=is_due, renew=renew)
