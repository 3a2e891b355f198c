"""RigL: sparse from the first update on, with connections that move to where the gradient wants them.

Evci et al., "Rigging the Lottery: Making All Tickets Winners" (arXiv 1911.11134).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from clicktrain_jax.methods.sparse import exchanging, magnitudes
from clicktrain_jax.plan import Plan


def exchange_fraction(step: Any, end_step: int, drop_fraction: Any) -> float:
    """Share of the kept weights that change places in update ``step``: drop_fraction / 2 (1 + cos(pi step / end))."""
    return drop_fraction / 2 * (1 + math.cos(math.pi * step / end_step))


def rigl(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    every: int,
    end_step: int,
    densities: Mapping[str, float] | None = None,
    drop_fraction: float | optax.Schedule = 0.3,
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
        plan: from `clicktrain_jax.make_plan`: which layers.
        key: of the first masks, from ``jax.random.key``.
        every: exchanges in updates every, 2 * every, ... (updates are counted from 0).
        end_step: exchanges come before this update only.
        densities: ``{layer name: share that stays}``, in (0, 1], as of `clicktrain_jax.methods.densities`; None for
            what the plan's rules leave, 1 - fraction.
        drop_fraction: share of the kept weights exchanged, in [0, 1]: where it begins to fall, along a cosine to 0 at
            ``end_step``; or a function of the update.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`.

    Raises:
        ValueError: at once for densities of other layers or out of range, a plan with a target and no densities, other
            arguments out of range; in ``init`` for parameters of another tree; in ``update`` when ``params`` is
            missing.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 4))}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.75})
        >>> tx = ct.methods.rigl(optax.sgd(0.1), plan, key=jax.random.key(0), every=100, end_step=1_000)
        >>> int(ct.masks_of(tx.init(params)).kernel["Conv_0"]["kernel"].sum())
        72

    Source: Evci et al. 2020 (arXiv 1911.11134), algorithm 1.
    """
    return exchanging(
        "rigl",
        inner,
        plan,
        densities=densities,
        key=key,
        every=every,
        end_step=end_step,
        drop_fraction=drop_fraction,
        falls=lambda step: exchange_fraction(step, end_step, drop_fraction),
        pull=lambda count, name, grad: magnitudes(grad),
    )
