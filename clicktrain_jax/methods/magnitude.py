"""One-shot magnitude pruning: the smallest weights go, once; in training, or of a net that is trained already."""

from collections.abc import Mapping

import optax

from clicktrain_jax.masks import Masks, build_masks
from clicktrain_jax.methods.densities import by_plan, counts_of
from clicktrain_jax.methods.sparse import MaskDict, largest, magnitudes, one_shot
from clicktrain_jax.methods.states import check_integer, planned
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import Tree, replicated


def magnitude_masks(params: Tree, plan: Plan, densities: Mapping[str, float] | None = None) -> Masks:
    """Masks that keep each planned layer's weights of largest magnitude. Jittable.

    Args:
        params: tree of float arrays, such as those of a trained net.
        plan: from `clicktrain_jax.make_plan`: which layers.
        densities: ``{layer name: share that stays}``, in (0, 1], as of `clicktrain_jax.methods.densities`; None for
            what the plan's rules leave, 1 - fraction.

    Returns:
        `clicktrain_jax.Masks`, bool of the leaves' shapes: exactly ``round(density * size)`` of each layer stay, ties
        to the lowest index. `clicktrain_jax.apply_masks` makes the others zero.

    Raises:
        ValueError: densities of other layers or out of range; a plan with a target and no densities; parameters of
            another tree.

    Example:
        >>> import jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"kernel": jnp.array([0.3, -2.0, 0.1, 1.0]).reshape(1, 1, 4, 1)}
        >>> masks = ct.methods.magnitude_masks(params, ct.make_plan(params, {"kernel": 0.5}))
        >>> ct.apply_masks(params, masks)["kernel"].ravel().tolist()
        [0.0, -2.0, 0.0, 1.0]

    Source: Han et al. 2015 (arXiv 1506.02626).
    """
    plan.check_tree(params)
    kept = counts_of(plan, by_plan(plan, densities))
    weights = {name: replicated(weight) for name, weight in planned(params, plan).items()}
    return build_masks(params, {name: (None, mask) for name, mask in _choose(weights, kept).items()})


def magnitude(
    inner: optax.GradientTransformation, plan: Plan, *, prune_step: int, densities: Mapping[str, float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """One-shot magnitude pruning of single weights, around any optax optimizer. Put it last in a chain.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`: which layers.
        prune_step: the update (from 0) after which the smallest weights are zero, to the end; 0 fine-tunes a trained
            net under its masks.
        densities: as for `magnitude_masks`.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`. The masks are chosen from the weights after
        update ``prune_step``.

    Raises:
        ValueError: at once for a negative ``prune_step`` and what `magnitude_masks` refuses of densities; in ``init``
            for parameters of another tree; in ``update`` when ``params`` is missing.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.arange(1.0, 289.0).reshape(3, 3, 8, 4)}}
        >>> tx = ct.methods.magnitude(optax.adam(1e-3), ct.make_plan(params, {".*/kernel": 0.75}), prune_step=0)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> int((optax.apply_updates(params, updates)["Conv_0"]["kernel"] != 0).sum())
        72

    Source: Han et al. 2015 (arXiv 1506.02626), with one round of pruning.
    """
    prune_step = check_integer("prune_step", prune_step, 0)
    kept = counts_of(plan, by_plan(plan, densities))
    return one_shot("magnitude", inner, plan, prune_step, lambda weights: _choose(weights, kept))


def _choose(weights: MaskDict, kept: Mapping[str, int]) -> MaskDict:
    return {name: largest(magnitudes(weight), kept[name]) for name, weight in weights.items()}
