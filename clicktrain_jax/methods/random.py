"""Random pruning: masks of like sparsity and like shapes that know nothing, the floor for every criterion.

`random` masks single weights from the first update on. `random_importance` and `random_scores` are criteria for the
shapes that ClickTrain prunes in.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax.importance import Criterion
from clicktrain_jax.methods.densities import by_plan, counts_of
from clicktrain_jax.methods.sparse import key_of, random_masks, sparse_training
from clicktrain_jax.methods.states import check_integer, check_key
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import Tree, map_named


def random(
    inner: optax.GradientTransformation, plan: Plan, *, key: jax.Array, densities: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Static random sparsity, around any optax optimizer: the masks are drawn once and never change.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`: which layers.
        key: of the masks, from ``jax.random.key``.
        densities: ``{layer name: share that stays}``, in (0, 1], as of `clicktrain_jax.methods.densities`; None for
            what the plan's rules leave, 1 - fraction.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`. The first gradient is still that of the
        weights as they were initialised; from the first update on masked ones are zero.

    Raises:
        ValueError: at once for something that is no key, densities of other layers or out of range, a plan with a
            target and no densities; in ``init`` for parameters of another tree; in ``update`` when ``params`` is
            missing.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 4))}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.75})
        >>> tx = ct.methods.random(optax.sgd(0.1), plan, key=jax.random.key(0))
        >>> int(ct.masks_of(tx.init(params)).kernel["Conv_0"]["kernel"].sum())
        72

    Source: Liu et al. 2022, "The Unreasonable Effectiveness of Random Pruning" (arXiv 2202.02643).
    """
    check_key(key)
    kept = counts_of(plan, by_plan(plan, densities))
    return sparse_training(
        "random", inner, plan, start=lambda: random_masks(plan, kept, key), is_due=None, renew=None, chosen=True
    )


def random_importance(seed: int) -> Criterion:
    """A criterion that gives every weight a score from the uniform distribution.

    Args:
        seed: integer >= 0.

    Returns:
        A function ``(params, grads=None) -> scores`` for ``importance=`` of `clicktrain_jax.clicktrain` and
        `clicktrain_jax.phase_updates`: float32 in [0, 1), a tree like ``params``. A leaf's scores depend on the seed,
        its name and its shape alone, so that every update, and every net with such a leaf, gets the same ones.

    Raises:
        ValueError: a seed that is no integer >= 0.

    Example:
        >>> import jax.numpy as jnp, clicktrain_jax as ct
        >>> ct.methods.random_importance(0)({"kernel": jnp.zeros((3, 3, 8, 4))})["kernel"].shape
        (3, 3, 8, 4)
    """
    seed = check_integer("seed", seed, 0)

    def scores(params: Tree, grads: Tree | None = None) -> Tree:
        return map_named(lambda name, weight: _uniform(jax.random.key(seed), name, weight), params)

    return scores


def random_scores(params: Tree, grads: Tree | None = None) -> Tree:
    """A criterion as of `random_importance`, with the weights themselves as the seed.

    For a program that serves runs of many seeds: each run draws its own scores, and the same ones when it is repeated
    to the bit. ``grads`` is not read.

    Returns:
        A tree like ``params``, float32 in [0, 1).
    """

    def draw(name: str, weight: Any) -> Any:
        if weight is None:
            return None
        bits = jax.lax.bitcast_convert_type(jnp.asarray(weight, jnp.float32), jnp.uint32)
        return _uniform(jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32)), name, weight)

    return map_named(draw, params)


def _uniform(key: jax.Array, name: str, weight: Any) -> Any:
    if weight is None:
        return None
    return jax.random.uniform(key_of(key, name), jnp.shape(weight), jnp.float32)
