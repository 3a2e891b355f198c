"""SET: sparse from the first update on, with connections that move at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science" (arXiv 1707.04780).
"""

from collections.abc import Mapping

import jax
import optax

from clicktrain_jax.methods.sparse import exchanging, key_of
from clicktrain_jax.plan import Plan


def sparse_evolutionary(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    every: int,
    end_step: int,
    densities: Mapping[str, float] | None = None,
    drop_fraction: float | optax.Schedule = 0.3,
) -> optax.GradientTransformationExtraArgs:
    """SET, around any optax optimizer. Put it last in a chain.

    As `clicktrain_jax.methods.rigl`, but what grows is drawn at random among the weights masked before, and the share
    that changes places stays the same. Of kept weights those of least magnitude are dropped, where the paper drops the
    positive and the negative ones closest to zero.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`: which layers.
        key: of the first masks and of what grows, from ``jax.random.key``.
        every: exchanges in updates every, 2 * every, ... (updates are counted from 0).
        end_step: exchanges come before this update only.
        densities: ``{layer name: share that stays}``, in (0, 1], as of `clicktrain_jax.methods.densities`; None for
            what the plan's rules leave, 1 - fraction.
        drop_fraction: share of the kept weights exchanged, in [0, 1]; or a function of the update.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`.

    Raises:
        ValueError: as `clicktrain_jax.methods.rigl`.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 4))}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.75})
        >>> tx = ct.methods.sparse_evolutionary(optax.sgd(0.1), plan, key=jax.random.key(0), every=2, end_step=10)
        >>> int(ct.masks_of(tx.init(params)).kernel["Conv_0"]["kernel"].sum())
        72

    Source: Mocanu et al. 2018 (arXiv 1707.04780).
    """
    return exchanging(
        "sparse_evolutionary",
        inner,
        plan,
        densities=densities,
        key=key,
        every=every,
        end_step=end_step,
        drop_fraction=drop_fraction,
        falls=lambda step: drop_fraction,
        pull=lambda count, name, grad: jax.random.uniform(key_of(jax.random.fold_in(key, count + 1), name), grad.shape),
    )
