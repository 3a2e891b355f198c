"""Training with masks of single weights that change on the way: what gradual pruning and RigL share.

Masks are bool arrays by layer name, True where a weight stays, each with exactly as many True as its density asks for.
"""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax.layer_plan import LayerPlan
from clicktrain_jax.masks import apply_masks, build_masks
from clicktrain_jax.methods.states import check_update, find_state, planned
from clicktrain_jax.plan import Plan
from clicktrain_jax.transform import enforce
from clicktrain_jax.trees import Tree

MaskDict = dict[str, jax.Array]
_DISTRIBUTIONS = ("uniform", "erk")


class SparseState(NamedTuple):
    """The state of `gradual_magnitude` and of `rigl`.

    Attributes:
        count: int32, updates done.
        masks: bool (kh, kw, cin, cout) by layer name.
        inner_state: the wrapped optimizer's state.
    """

    count: jax.Array
    masks: MaskDict
    inner_state: Any


def masks_of(opt_state: Any) -> MaskDict:
    """The masks inside an optimizer state.

    Args:
        opt_state: any state that holds one of `gradual_magnitude` or `rigl`: chained, wrapped, restored.

    Returns:
        bool (kh, kw, cin, cout) by layer name.

    Raises:
        ValueError: no such state, or several.
    """
    return find_state(opt_state, SparseState, "gradual_magnitude(...) or rigl(...)").masks


def densities(
    plan: Plan, retained: int, distribution: Literal["uniform", "erk"] = "uniform"
) -> dict[str, float]:
    """How many of each planned layer's weights stay, as shares.

    Args:
        plan: from `clicktrain_jax.make_plan`; its fractions are not read.
        retained: weights that stay in all planned layers together.
        distribution: "uniform": the same share everywhere. "erk", Erdos-Renyi-Kernel: a share in proportion to
            (kh + kw + cin + cout) / (kh * kw * cin * cout), at most 1; what full layers leave over goes to the others.

    Returns:
        ``{layer name: density}``, each a whole number of weights (at least 1) over the layer's size, so that the sum of
        ``round(density * size)`` is ``retained`` exactly; what rounding leaves goes by largest remainder, ties to the
        plan's order.

    Raises:
        ValueError: an unknown distribution; fewer retained weights than layers, or more than there are.

    Source: Evci et al., "Rigging the Lottery" (arXiv 1911.11134), section 3.
    """
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r}: expected one of {_DISTRIBUTIONS}")
    sizes = {layer.name: size_of(layer) for layer in plan.layers}
    total = sum(sizes.values())
    if isinstance(retained, bool) or not isinstance(retained, numbers.Integral):
        raise ValueError(f"retained={retained!r}: expected an integer, the number of weights that stay")
    if not len(sizes) <= retained <= total:
        raise ValueError(
            f"retained={retained}: expected {len(sizes)} (a weight in every planned layer) to {total} (all of them)"
        )
    if distribution == "uniform":
        raw = {name: 1.0 for name in sizes}
    else:
        raw = {layer.name: sum(layer.shape) / size_of(layer) for layer in plan.layers}
    ideal = _capped_shares(raw, sizes, retained)
    counts = {name: min(max(int(ideal[name]), 1), size) for name, size in sizes.items()}
    while (missing := retained - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        free = [name for name in sizes if 1 <= counts[name] + step <= sizes[name]]
        chosen = max(free, key=lambda name: step * (ideal[name] - counts[name]))
        counts[chosen] += step
    return {name: counts[name] / sizes[name] for name in sizes}


def _capped_shares(raw: Mapping[str, float], sizes: Mapping[str, int], retained: int) -> dict[str, float]:
    """Weights of each layer, not yet whole: in proportion to raw * size, no layer above its size."""
    full: set[str] = set()
    while True:
        left = retained - sum(sizes[name] for name in full)
        others = [name for name in sizes if name not in full]
        whole = sum(raw[name] * sizes[name] for name in others)
        scale = left / whole if others else 0.0
        # A little above 1 is rounding: all of a layer's weights are its size then too.
        over = {name for name in others if scale * raw[name] > 1.0}
        if not over:
            return {name: float(sizes[name]) if name in full else scale * raw[name] * sizes[name] for name in sizes}
        full |= over


def size_of(layer: LayerPlan) -> int:
    """How many weights a layer has."""
    kh, kw, cin, cout = layer.shape
    return kh * kw * cin * cout


def counts_of(plan: Plan, layer_densities: Mapping[str, float]) -> dict[str, int]:
    """``round(density * size)`` of every planned layer.

    Raises:
        ValueError: other names than the plan's; a density outside (0, 1], or one that leaves no weight.
    """
    names = {layer.name for layer in plan.layers}
    for name in sorted(names ^ set(layer_densities)):
        problem = "has no density" if name in names else "is no layer of the plan"
        raise ValueError(f"densities: {name!r} {problem}; expected one for each of {sorted(names)}")
    counts = {}
    for layer in plan.layers:
        density = layer_densities[layer.name]
        if isinstance(density, bool) or not isinstance(density, numbers.Real) or not 0 < density <= 1:
            raise ValueError(f"densities[{layer.name!r}]={density!r}: expected the share that stays, in (0, 1]")
        counts[layer.name] = round(float(density) * size_of(layer))
        if counts[layer.name] < 1:
            raise ValueError(
                f"densities[{layer.name!r}]={density!r} leaves none of {size_of(layer)} weights: raise it to "
                f"{1 / size_of(layer):.2g} or more"
            )
    return counts


def largest(values: jax.Array, count: int | jax.Array) -> jax.Array:
    """bool, like ``values``: True at exactly ``count`` of the largest, ties to the lowest (row-major) index.

    Args:
        values: float array of any shape, no NaN.
        count: 0 to ``values.size``; may be traced.
    """
    flat = values.reshape(-1)
    # One sort of the values and a running count of the ties: cheaper than sorting indices along.
    threshold = jnp.sort(flat)[jnp.clip(flat.size - count, 0, flat.size - 1)]
    above = flat > threshold
    tied = flat == threshold
    among_tied = count - above.sum(dtype=jnp.int32)
    chosen = above | (tied & (jnp.cumsum(tied, dtype=jnp.int32) <= among_tied))
    return chosen.reshape(values.shape)


def sparse_training(
    name: str,
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    start: Callable[[], MaskDict],
    is_due: Callable[[jax.Array], jax.Array],
    renew: Callable[[jax.Array, MaskDict, MaskDict, MaskDict], MaskDict],
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under masks that change now and then.

    The inner optimizer sees the masked gradient. After its update masked weights, and what it remembers of them, are
    exactly zero. A weight whose mask has just been opened starts at zero, with nothing remembered of it.

    Args:
        name: of the method, for errors.
        inner: the optimizer.
        plan: from `clicktrain_jax.make_plan`; its fractions are not read.
        start: makes the first masks.
        is_due: update (int32 scalar, from 0) -> bool scalar, whether masks change in it.
        renew: ``(update, masks, weights after the update, dense gradients of it) -> masks``, by layer name.

    Returns:
        A transformation whose state is a `SparseState`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SparseState:
        plan.check_tree(params)
        return SparseState(jnp.zeros([], jnp.int32), start(), inner.init(params))

    def update(grads: Tree, state: SparseState, params: Tree | None = None, **extra: Any) -> tuple[Tree, SparseState]:
        check_update(name, plan, grads, params)
        old = state.masks
        updates, inner_state = inner.update(apply_masks(grads, _tree(params, old)), state.inner_state, params, **extra)

        def changed() -> MaskDict:
            after = optax.apply_updates(planned(params, plan), planned(updates, plan))
            return renew(state.count, old, after, planned(grads, plan))

        new = jax.lax.cond(is_due(state.count), changed, lambda: old)
        both = {layer: old[layer] & new[layer] for layer in old}
        updates, inner_state = enforce(updates, inner_state, params, _tree(params, both))
        return updates, SparseState(optax.safe_increment(state.count), new, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _tree(params: Tree, masks: MaskDict) -> Any:
    """The masks in the parameters' containers: masks of single weights stand where masks of kernels do."""
    return build_masks(params, {name: (None, mask) for name, mask in masks.items()})
