"""n:m sparsity along the input channels: chosen once, or trained with a straight-through estimator (SR-STE).

Of every m neighbouring input channels n weights stay, those of largest magnitude. `n_of_m` chooses them once and keeps
all others at zero (Mishra et al., arXiv 2104.08378). With a straight-through estimator (Zhou et al., "Learning N:M
Fine-grained Structured Sparse Neural Networks From Scratch", arXiv 2102.04010) the choice is that of the moment, and
the dense weights are trained: the net computes with the masked ones, the gradient passes the mask as if it were not
there, and weights that are masked are pulled to zero. That is two parts, `straight_through` inside the loss and
`sr_ste`, which holds the masks, around the optimizer.
"""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax.eager import optimizer, transformation
from clicktrain_jax.masks import Masks, build_masks
from clicktrain_jax.methods.sparse import one_shot
from clicktrain_jax.methods.states import MaskDict, check_integer, check_update, masks_tree, planned, single_weights
from clicktrain_jax.plan import Plan, check_plan
from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.states import ClickTrainState, check_state, first_state
from clicktrain_jax.trees import Tree, map_named, placed_like, replicated, spread_like


def n_of_m_mask(w: jax.Array, n: int = 2, m: int = 4, axis: int = 2) -> jax.Array:
    """Which weights stay: of every m neighbours along an axis the n of largest magnitude.

    Args:
        w: float array; by default a kernel (kh, kw, cin, cout), grouped along cin.
        n: weights that stay, 1 <= n <= m.
        m: neighbours in a group.
        axis: along which groups are formed, from its start.

    Returns:
        bool, like ``w``; exactly n True in each group, ties to the lower index.

    Raises:
        ValueError: n and m out of range; an axis that is not a multiple of m.

    Example:
        >>> import jax.numpy as jnp, clicktrain_jax as ct
        >>> ct.methods.n_of_m_mask(jnp.array([3.0, -1.0, 0.0, 2.0]), axis=0).tolist()
        [True, False, False, True]
    """
    _check(n, m)
    shape = jnp.shape(w)
    if shape[axis] % m:
        raise ValueError(f"axis {axis} of shape {shape} has {shape[axis]} entries: expected a multiple of m={m}")
    magnitude = jnp.moveaxis(jnp.abs(w), axis, -1)
    moved = magnitude.shape
    groups = magnitude.reshape(*moved[:-1], moved[-1] // m, m)
    # With so few members every one is held against every other: no sort is needed.
    mine, other = groups[..., :, None], groups[..., None, :]
    place = jnp.arange(m)
    earlier = jnp.broadcast_to(place[None, :] < place[:, None], (*groups.shape, m))
    before = (other > mine) | ((other == mine) & earlier)
    return jnp.moveaxis((before.sum(axis=-1) < n).reshape(moved), -1, axis)


def n_of_m_masks(params: Tree, plan: Plan, n: int = 2, m: int = 4) -> Masks:
    """The masks of every planned layer. Jittable.

    Args:
        params: tree of float arrays.
        plan: from `clicktrain_jax.make_plan`: which layers; fractions are not read.
        n: weights that stay of every ``m`` neighbouring input channels.
        m: neighbours.

    Returns:
        `clicktrain_jax.Masks`, bool of the leaves' shapes.

    Raises:
        ValueError: n and m out of range; parameters of another tree; a planned layer whose input channels are not a
            multiple of m.

    Example:
        >>> import jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"kernel": jnp.array([3.0, -1.0, 0.0, 2.0]).reshape(1, 1, 4, 1)}
        >>> masks = ct.methods.n_of_m_masks(params, ct.make_plan(params, {"kernel": 0.0}))
        >>> masks.kernel["kernel"].ravel().tolist()
        [True, False, False, True]
    """
    _check_layers(params, plan, n, m)
    chosen = _choose(planned(params, plan), plan, n, m)
    return build_masks(params, {name: (None, mask) for name, mask in chosen.items()})


def n_of_m(
    inner: optax.GradientTransformation, plan: Plan, *, prune_step: int, n: int = 2, m: int = 4
) -> optax.GradientTransformationExtraArgs:
    """n:m sparsity chosen once by magnitude, around any optax optimizer. Put it last in a chain.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`: which layers; fractions are not read.
        prune_step: the update (from 0) after which the other weights are zero, to the end; 0 fine-tunes a trained net.
        n: weights that stay of every ``m`` neighbouring input channels.
        m: neighbours.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`.

    Raises:
        ValueError: at once for n, m or ``prune_step`` out of range, and for a planned layer whose input channels are
            not a multiple of m; in ``init`` for parameters of another tree; in ``update`` when ``params`` is missing.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.arange(1.0, 289.0).reshape(3, 3, 8, 4)}}
        >>> tx = ct.methods.n_of_m(optax.sgd(0.1), ct.make_plan(params, {".*/kernel": 0.0}), prune_step=0)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> int((optax.apply_updates(params, updates)["Conv_0"]["kernel"] != 0).sum())
        144

    Source: Mishra et al. 2021 (arXiv 2104.08378): prune a trained net to 2:4 once, then train on under the masks.
    """
    prune_step = check_integer("prune_step", prune_step, 0)
    _check(n, m)
    _check_channels(plan, m)
    return one_shot("n_of_m", inner, plan, prune_step, lambda weights: _choose(weights, plan, n, m))


def sr_ste(
    inner: optax.GradientTransformation, plan: Plan, *, n: int = 2, m: int = 4
) -> optax.GradientTransformationExtraArgs:
    """The optimizer's half of straight-through n:m training: holds the masks of the moment. The loss has the other.

    The update is the inner optimizer's own, and the dense weights live on. What the net computes with is
    ``straight_through(params, plan, n, m)``, zero where the masks say so: for `clicktrain_jax.export` and
    `clicktrain_jax.report` these count as applied.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`: which layers; fractions are not read.
        n: weights that stay of every ``m`` neighbouring input channels; as in `straight_through`.
        m: neighbours.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`, whose masks are those of the weights after
        the update.

    Raises:
        ValueError: as `n_of_m`.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.arange(1.0, 289.0).reshape(3, 3, 8, 4)}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.0})
        >>> tx = ct.methods.sr_ste(optax.sgd(0.1), plan)
        >>> state = tx.init(params)
        >>> loss = lambda params: jnp.sum(ct.methods.straight_through(params, plan)["Conv_0"]["kernel"])
        >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
        >>> ct.report(optax.apply_updates(params, updates), ct.masks_of(state)).conv_compression
        2.0

    Source: Zhou et al. 2021 (arXiv 2102.04010).
    """
    _check(n, m)
    _check_channels(plan, m)
    inner = optimizer(inner)

    def init(params: Tree) -> ClickTrainState:
        like = plan.tree_of(params)
        masks = _choose(planned(like, plan), plan, n, m)
        return first_state(like, single_weights(masks), inner.init(params), selected=0, pruned=0)

    def whole_update(
        grads: Tree, state: ClickTrainState, params: Tree, extra: dict[str, Any]
    ) -> tuple[Tree, ClickTrainState]:
        plan.check_tree(params)
        state = check_state(state, plan, 0, 1)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        after: Any = optax.apply_updates(planned(params, plan), planned(updates, plan))
        return updates, state._replace(
            count=optax.safe_increment(state.count),
            selected=state.count,
            masks=spread_like(masks_tree(state.masks, _choose(after, plan, n, m)), params),
            inner_state=inner_state,
        )

    return transformation(init, whole_update, functools.partial(check_update, "sr_ste", plan))


def straight_through(params: Tree, plan: Plan, n: int = 2, m: int = 4, decay: float = 2e-4) -> Tree:
    """The parameters with n:m sparse kernels, for use inside the loss: ``net(straight_through(params, plan), x)``.

    Args:
        params: tree of arrays, dense weights.
        plan: from `clicktrain_jax.make_plan`; its layers' kernels are masked along their input channels. Fractions
            are not read.
        n: weights that stay of every ``m`` neighbouring input channels.
        m: neighbours.
        decay: weight of the pull on masked weights, >= 0; 0 is the plain straight-through estimator.

    Returns:
        A tree like ``params``, same dtypes, masked weights exactly zero. Its derivative in reverse mode is
        ``dL/dw = dL/d(masked w) + decay * (1 - mask) * w``; forward mode is not defined.

    Raises:
        ValueError: n, m or decay out of range; parameters of another tree; a planned layer whose input channels are
            not a multiple of m.

    Example:
        >>> import jax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"kernel": jnp.array([3.0, -1.0, 0.0, 2.0]).reshape(1, 1, 4, 1)}
        >>> plan = ct.make_plan(params, {"kernel": 0.0})
        >>> ct.methods.straight_through(params, plan)["kernel"].ravel().tolist()
        [3.0, 0.0, 0.0, 2.0]
        >>> loss = lambda params: jnp.sum(ct.methods.straight_through(params, plan, decay=0.5)["kernel"])
        >>> jax.grad(loss)(params)["kernel"].ravel().tolist()
        [1.0, 0.5, 1.0, 1.0]

    Source: Zhou et al. 2021 (arXiv 2102.04010), SR-STE, there with decay 2e-4.
    """
    _check_layers(params, plan, n, m)
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real) or not 0 <= decay < math.inf:
        raise ValueError(f"decay={decay!r}: expected a finite number >= 0")
    layers = plan.by_name()
    return map_named(
        lambda name, leaf: _masked(leaf, int(n), int(m), float(decay), _cin(layers[name])) if name in layers else leaf,
        params,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _masked(w: jax.Array, n: int, m: int, decay: float, axis: int) -> jax.Array:
    return _forward(w, n, m, decay, axis)[0]


def _forward(w: jax.Array, n: int, m: int, decay: float, axis: int) -> tuple[jax.Array, Any]:
    mask = placed_like(n_of_m_mask(replicated(w), n, m, axis), w)
    zero = jnp.zeros((), w.dtype)
    return jnp.where(mask, w, zero), jnp.where(mask, zero, w)


def _backward(n: int, m: int, decay: float, axis: int, removed: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    wide = jnp.promote_types(grad.dtype, jnp.float32)
    return ((grad.astype(wide) + decay * removed.astype(wide)).astype(removed.dtype),)


_masked.defvjp(_forward, _backward)


def _check(n: int, m: int) -> None:
    check_integer("m", m, 1)
    if check_integer("n", n, 1) > m:
        raise ValueError(f"n={n}, m={m}: expected at most m weights to stay of m")


def _check_layers(params: Tree, plan: Plan, n: int, m: int) -> None:
    _check(n, m)
    plan.check_tree(params)
    _check_channels(plan, m)


def _check_channels(plan: Plan, m: int) -> None:
    check_plan(plan)
    for layer in plan.layers:
        channels = layer.leaf_shape[_cin(layer)]
        if channels % m:
            raise ValueError(
                f"{layer.name!r} has {channels} input channels, which is no multiple of m={m}: leave that layer out of "
                "the plan"
            )


def _cin(layer: LayerPlan) -> int:
    """The axis of the input channels in the leaf's own layout."""
    return layer.axes.index("I")


def _choose(weights: MaskDict, plan: Plan, n: int, m: int) -> MaskDict:
    return {layer.name: n_of_m_mask(replicated(weights[layer.name]), n, m, _cin(layer)) for layer in plan.layers}
