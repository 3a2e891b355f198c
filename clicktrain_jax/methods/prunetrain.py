"""PruneTrain: group lasso on whole channels during training, and every few epochs a net without the dead ones.

    R = sum over groups sqrt(||w_group||^2 + 1e-8)
    coeff = ratio * CE0 / ((1 - ratio) * R0)            from the first batch, constant afterwards

Groups are the output channels of every convolution, and the input channels of every convolution but the first and of
the classifier (its first linear layer). All convolutions count, also those whose channels must stay because of what
the net does with them. Depthwise kernels, which make no channels, and groups of one channel do not.

    tx = prunetrain(optax.sgd(0.1, momentum=0.9), nodes)
    updates, opt_state = tx.update(grads, opt_state, params, value=cross_entropy)
    ...                                                       # every 10 epochs, unless every= masks them instead:
    kept = living_channels({"params": params}, nodes)
    params, opt_state = (narrow(tree, kept, nodes, prefix="params/") for tree in (params, opt_state))
    batch_stats = narrow(batch_stats, kept, nodes, prefix="batch_stats/")

Source: Lym, Choukse, Zangeneh, Wen, Sanghavi, Erez, SC'19 (arXiv 1901.09290).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax.channels import ChannelNode
from clicktrain_jax.channels.narrowing import channels_of, check_leaves, is_written_by_convolutions, leaf_shapes
from clicktrain_jax.eager import branch, optimizer, transformation
from clicktrain_jax.lasso import EPSILON
from clicktrain_jax.methods.sparse import all_kept, sparse_training
from clicktrain_jax.methods.states import MaskDict, check_integer
from clicktrain_jax.plan import Plan
from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.trees import Tree, is_kernel_shape, map_named, named_leaves, spread_like


class PruneTrainState(NamedTuple):
    """The state of `prunetrain`: arrays only.

    Attributes:
        count: int32, updates done.
        coeff: float32, weight of the lasso in the loss; 0 until the first update has calibrated it.
        inner_state: the wrapped optimizer's state.
    """

    count: jax.Array
    coeff: jax.Array
    inner_state: Any


class _Slices(NamedTuple):
    """Groups along one axis of a leaf: channel c at (o * size + c) * inner + i for all o < outer and all i."""

    name: str
    axis: int
    outer: int
    size: int

    def by_channel(self, array: Any) -> Any:
        """A leaf's values as (all before, size, all behind)."""
        shape = array.shape
        inner = shape[self.axis] // (self.outer * self.size)
        return array.reshape(
            math.prod(shape[: self.axis]) * self.outer, self.size, inner * math.prod(shape[self.axis + 1 :])
        )

    def norms(self, weight: jax.Array) -> jax.Array:
        """float32 (size,): sqrt(sum of squares over a channel's weights + eps)."""
        return jnp.sqrt(jnp.sum(jnp.square(self.by_channel(weight)), axis=(0, 2)) + EPSILON)


def _slices(params: Tree, nodes: Sequence[ChannelNode], prefix: str) -> list[_Slices]:
    """All groups, leaf by leaf, with the widths that the tree has by now."""
    shapes = leaf_shapes(params, prefix)
    found = []
    for node in nodes:
        check_leaves([name for name, *_ in (*node.writers, *node.readers)], shapes, prefix)
        convolutions = [(name, axis, 1) for name, axis in node.writers if is_kernel_shape(shapes[name])]
        # The first convolution reads channels that nothing wrote, a second linear layer those of a first.
        if convolutions:
            size = channels_of(node, shapes)
            found += [
                _Slices(name.removeprefix(prefix), axis, outer, size)
                for name, axis, outer in (*convolutions, *node.readers)
            ]
    if not found:
        raise ValueError(f"nodes: no convolution writes any of the {len(nodes)} groups, so there is no lasso")
    return found


def channel_lasso(params: Tree, nodes: Sequence[ChannelNode], *, prefix: str = "params/") -> jax.Array:
    """R, the sum of the groups' norms.

    Args:
        params: tree of arrays.
        nodes: from `clicktrain_jax.channels.channel_nodes` of the net; a net that was narrowed since is right too.
        prefix: what the names in ``nodes`` have before those in the tree; "" for whole variables.

    Returns:
        float32 scalar, before any coefficient.

    Raises:
        ValueError: a leaf is missing; no convolution writes any of the groups.
    """
    by_name = dict(named_leaves(params))
    total = jnp.float32(0)
    for slices in _slices(params, nodes, prefix):
        total += slices.norms(jnp.asarray(by_name[slices.name], jnp.float32)).sum()
    return total


def add_channel_lasso(
    grads: Tree, params: Tree, nodes: Sequence[ChannelNode], coeff: float | jax.Array, *, prefix: str = "params/"
) -> Tree:
    """Add ``coeff * dR/dw`` to the gradients, in closed form: the sum of w / norm over the groups that w is in.

    Args:
        grads: tree like ``params``.
        params: tree of arrays.
        nodes: as for `channel_lasso`.
        coeff: weight of the lasso in the loss, a scalar.
        prefix: as for `channel_lasso`.

    Returns:
        A tree like ``grads``, each leaf in its own dtype; the sum is formed in float32 or wider.

    Raises:
        ValueError: a leaf or its gradient is missing; trees that do not belong together; no group, as above.
    """
    by_leaf: dict[str, list[_Slices]] = {}
    for slices in _slices(params, nodes, prefix):
        by_leaf.setdefault(slices.name, []).append(slices)

    def add(name: str, grad: Any, weight: Any) -> Any:
        if name not in by_leaf:
            return grad
        if grad is None:
            raise ValueError(f"{name!r} is regularised, but its gradient is None")
        weight = jnp.asarray(weight, jnp.float32)
        push = jnp.zeros_like(weight)
        for slices in by_leaf[name]:
            scaled = slices.by_channel(weight) / slices.norms(weight)[None, :, None]
            push += scaled.reshape(weight.shape)
        wide = jnp.promote_types(grad.dtype, jnp.float32)
        return (grad.astype(wide) + coeff * push).astype(grad.dtype)

    return map_named(add, grads, params, what="params")


def prunetrain(
    inner: optax.GradientTransformation,
    nodes: Sequence[ChannelNode],
    *,
    ratio: float = 0.2,
    prefix: str = "params/",
    every: int | None = None,
    threshold: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """PruneTrain's regularisation around any optax optimizer, and with ``every`` masks of the channels that it kills.

    Reconfigurations, which make the net itself smaller, are the loop's affair (`clicktrain_jax.channels`). A loop that
    keeps the net's shapes gets masks in their place: whole channels of zero, in the convolutions that write them and
    in those that read them. Put it last in a chain then.

    The first update sets the coefficient such that the lasso is ``ratio`` of the whole loss then; it stays. The
    transformation goes on with a narrowed net and the same nodes: it looks at the shapes it is given.

    Args:
        inner: the optimizer, weight decay and schedules included.
        nodes: from `clicktrain_jax.channels.channel_nodes` of the net.
        ratio: the lasso's share of the first loss, in (0, 1).
        prefix: what the names in ``nodes`` have before those of the parameters.
        every: after so many updates, and again after as many, channels are masked of which every weight, in any
            convolution that writes or reads it, is below the threshold; they do not come back, and each group keeps its
            strongest. None: no masks.
        threshold: magnitude below which a weight counts as zero.

    Returns:
        A transformation whose state is a `PruneTrainState`; with ``every`` a `clicktrain_jax.ClickTrainState` that has
        one inside. ``update`` needs ``value=``, the batch's cross entropy without the lasso (float scalar), and passes
        it on to ``inner``.

    Raises:
        ValueError: at once for a ratio outside (0, 1), ``every`` below 1, a negative threshold; in ``update`` for
            parameters of another net, when ``params`` or ``value`` is missing, or when ``value`` is no scalar.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> def net(params, x):
        ...     for kernel in (params["a"], params["b"]):
        ...         x = jax.nn.relu(jax.lax.conv_general_dilated(
        ...             x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        ...     return x
        >>> params = {"a": jnp.ones((3, 3, 2, 4)).at[..., 1].set(0.0), "b": jnp.ones((3, 3, 4, 3)).at[:, :, 1].set(0.0)}
        >>> nodes = ct.channels.channel_nodes(net, params, (8, 8, 2))
        >>> tx = ct.methods.prunetrain(optax.sgd(0.1), nodes, prefix="", every=1)
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> updates, state = tx.update(grads, tx.init(params), params, value=1.0)
        >>> ct.masks_of(state).kernel["a"][0, 0, 0].tolist()
        [True, False, True, True]

    Source: Lym et al. 2019.
    """
    if every is not None:
        check_integer("every", every, 1)
        _check_threshold(threshold)
        lasso = prunetrain(inner, nodes, ratio=ratio, prefix=prefix)
        return _under_masks(lasso, nodes, prefix, every, threshold)
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio!r}: expected the lasso's share of the first loss, between 0 and 1")
    inner = optimizer(inner)

    def init(params: Tree) -> PruneTrainState:
        count, coeff = spread_like((jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)), params)
        return PruneTrainState(count, coeff, inner.init(params))

    def whole_update(
        grads: Tree, state: PruneTrainState, params: Tree, extra: dict[str, Any]
    ) -> tuple[Tree, PruneTrainState]:
        def calibrate() -> jax.Array:
            value = jnp.asarray(extra["value"], jnp.float32)
            return ratio * value / ((1 - ratio) * channel_lasso(params, nodes, prefix=prefix))

        # Not by the count: a run may start from another one's state, whose updates had no lasso.
        coeff = branch(state.coeff == 0, [lambda: state.coeff, calibrate])
        grads = add_channel_lasso(grads, params, nodes, coeff, prefix=prefix)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        return updates, PruneTrainState(jnp.asarray(optax.safe_increment(state.count)), coeff, inner_state)

    def check(grads: Tree, params: Tree | None, extra: dict[str, Any]) -> None:
        if params is None:
            raise ValueError("prunetrain needs the parameters: call update(grads, state, params, value=loss)")
        value = extra.get("value")
        if value is None or jnp.ndim(value):
            raise ValueError(
                f"value={value!r}: prunetrain sets its coefficient from the loss of the first batch, a scalar; call "
                "update(grads, state, params, value=loss)"
            )

    return transformation(init, whole_update, check)


def _under_masks(
    lasso: optax.GradientTransformationExtraArgs,
    nodes: Sequence[ChannelNode],
    prefix: str,
    every: int,
    threshold: float,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with dead channels at zero from then on."""

    @functools.cache
    def of_shapes(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> optax.GradientTransformationExtraArgs:
        by_name = {f"{prefix}{name}": shape for name, shape in shapes}
        free = []
        for node in nodes:
            check_leaves([name for name, *_ in (*node.writers, *node.readers)], by_name, prefix)
            if not node.fixed and is_written_by_convolutions(node, by_name):
                entries = [*node.writers, *((name, axis) for name, axis, _ in node.readers)]
                free.append(
                    [(name.removeprefix(prefix), axis) for name, axis in entries if is_kernel_shape(by_name[name])]
                )
        masked = {name for entries in free for name, _ in entries}
        if not masked:
            raise ValueError(f"nodes: none of the {len(nodes)} groups is free to lose channels, so there are no masks")
        layers = tuple(
            LayerPlan(name, shape, 0.0) for name, shape in shapes if name in masked and is_kernel_shape(shape)
        )
        plan = Plan(layers, tuple(name for name, _ in shapes))

        def renew(count: jax.Array, masks: MaskDict, weights: MaskDict, _: MaskDict) -> MaskDict:
            new = dict(masks)
            for entries in free:
                lives = _lives([(weights[name], axis) for name, axis in entries], threshold)
                for name, axis in entries:
                    new[name] &= lives.reshape([-1 if other == axis else 1 for other in range(4)])
            return new

        return sparse_training(
            "prunetrain",
            lasso,
            plan,
            start=lambda: all_kept(plan),
            is_due=lambda count: (count + 1) % every == 0,
            renew=renew,
        )

    def of(params: Tree) -> optax.GradientTransformationExtraArgs:
        return of_shapes(tuple((name, jnp.shape(leaf)) for name, leaf in named_leaves(params) if leaf is not None))

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        if params is None:
            raise ValueError("prunetrain needs the parameters: call update(grads, state, params, value=loss)")
        return of(params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: of(params).init(params), update)


def _lives(slices: Sequence[tuple[jax.Array, int]], threshold: float) -> jax.Array:
    """bool (channels,): some weight of the channel is not below the threshold, or none is stronger than it."""
    size = slices[0][0].shape[slices[0][1]]
    lives, strength = jnp.zeros(size, bool), jnp.zeros(size, jnp.float32)
    for weight, axis in slices:
        others = tuple(other for other in range(4) if other != axis)
        # What is not a number is not zero.
        lives |= ~jnp.all(jnp.abs(weight) < threshold, axis=others)
        strength += jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=others)
    return lives | (strength == strength.max())


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold!r}: expected a finite magnitude >= 0")


def living_channels(
    variables: Tree, nodes: Sequence[ChannelNode], *, threshold: float = 1e-4, multiple: int = 8, prefix: str = ""
) -> dict[str, np.ndarray]:
    """The channels that a reconfiguration keeps.

    A weight below the threshold counts as zero, and a channel lives while one of its weights does, in any kernel that
    writes it or reads it: across a residual sum, in any of the layers that are added. So nothing is dropped that
    a kernel still looks at. BatchNorm's scale and bias do not count.

    Each count is rounded up to a multiple, with the strongest (sum of squared weights) of the dead channels, since
    each new width is a new program; one multiple always stays. Here this departs from the paper, where a convolution
    left with no channel goes with its residual branch: such a branch keeps ``multiple`` channels of almost zero.

    Args:
        variables: the variables, or with ``prefix="params/"`` the parameters; concrete arrays.
        nodes: from `clicktrain_jax.channels.channel_nodes` of the net.
        threshold: smaller magnitudes count as zero.
        multiple: counts are multiples of it, or a group's whole width if that is less.
        prefix: what the names in ``nodes`` have before those in the tree.

    Returns:
        ``{name of the kernel that writes first: bool (size,)}`` in network order, for `narrow`: one entry for each
        group that is free and written by convolutions alone. The hidden layers of a classifier are not channels.

    Raises:
        ValueError: traced or missing leaves; a negative threshold; a multiple below 1.

    Source: Lym et al. 2019 (channel union).
    """
    _check_threshold(threshold)
    if isinstance(multiple, bool) or not hasattr(multiple, "__index__") or multiple < 1:
        raise ValueError(f"multiple={multiple!r}: expected an integer >= 1")
    shapes = leaf_shapes(variables, prefix)
    leaves = {f"{prefix}{name}": leaf for name, leaf in named_leaves(variables)}
    kept = {}
    for node in nodes:
        entries = [*((name, axis, 1) for name, axis in node.writers), *node.readers]
        check_leaves([name for name, *_ in entries], shapes, prefix)
        if node.fixed or not is_written_by_convolutions(node, shapes):
            continue
        size = channels_of(node, shapes)
        lives, strength = np.zeros(size, bool), np.zeros(size, np.float64)
        for name, axis, outer in entries:
            if isinstance(leaves[name], jax.core.Tracer):
                raise ValueError(f"{name!r} is traced: which channels live is read from values; call it outside jit")
            weights = np.asarray(leaves[name], np.float32)
            weights = _Slices(name, axis, outer, size).by_channel(weights)
            # What is not a number is not zero.
            lives |= ~(np.abs(weights) < threshold).all(axis=(0, 2))
            strength += np.square(weights, dtype=np.float64).sum(axis=(0, 2))
        count = min(size, multiple * max(1, math.ceil(lives.sum() / multiple)))
        strongest = np.lexsort((-strength, ~lives))[:count]
        kept[node.writers[0][0]] = np.isin(np.arange(size), strongest)
    return kept
