"""ADMM pattern and kernel pruning of a trained net (PatDNN, arXiv 2001.00138; PCONV, arXiv 1909.05073).

The loss gets two quadratic terms that pull the weights W of every planned layer to a copy Z whose kernels each keep a
pattern, and to a copy Y that has lost its weakest kernels:

    loss + sum rho/2 ||W - Z + U||^2 + sum rho/2 ||W - Y + V||^2

Every so many updates Z becomes the pattern-sparse tensor nearest to W + U and Y the kernel-sparse one nearest to W + V,
and the scaled dual variables advance: U += W - Z, V += W - Y. After that the net is masked (kernels and patterns) and
trained on; that part is any masked training and is not done here.

W always means the ``params`` that ``update`` is handed: the weights before that update, those after the one before. The
projections and duals are renewed from them first, and the same update's gradient already has the new ones in it.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax.eager import branch, optimizer, transformation
from clicktrain_jax.methods.states import check_axes, check_integer, check_update, find_state, planned
from clicktrain_jax.patterns import Generated
from clicktrain_jax.plan import Plan
from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.selection import check_patterns, select_layers
from clicktrain_jax.transform import clicktrain
from clicktrain_jax.trees import Tree, map_named, spread_like

Arrays = dict[str, jax.Array]


class AdmmState(NamedTuple):
    """The state of `admm`. Arrays are float32 or wider, shaped like their layers, zero until begin_step.

    Attributes:
        count: int32, updates done.
        pattern_copy: Z by layer name; layers above 1x1 alone.
        pattern_dual: U.
        kernel_copy: Y by layer name; layers that lose kernels alone (not those of fraction 0).
        kernel_dual: V.
        inner_state: the wrapped optimizer's state.
    """

    count: jax.Array
    pattern_copy: Arrays
    pattern_dual: Arrays
    kernel_copy: Arrays
    kernel_dual: Arrays
    inner_state: Any


def project_patterns(values: Arrays, plan: Plan, patterns: Any) -> Arrays:
    """The nearest tensors in which every kernel keeps one pattern (every tile shares one, with tiles).

    Args:
        values: float (kh, kw, cin, cout) by layer name, at least every planned layer.
        plan: from `clicktrain_jax.make_plan`.
        patterns: bool (P, kh, kw).

    Returns:
        The planned layers above 1x1: each tile under the pattern that keeps the largest sum of squares, which is the
        nearest point; ties to the lowest index. Same shapes and dtypes.
    """
    choices = _select(values, plan, patterns)
    return {name: _keep(choices[name].full().pattern, values[name]) for name in _with_patterns(plan)}


def project_kernels(values: Arrays, plan: Plan, patterns: Any) -> Arrays:
    """The nearest tensors that have lost as many kernels (units of removal) as the plan says.

    Args:
        values: float (kh, kw, cin, cout) by layer name, at least every planned layer.
        plan: from `clicktrain_jax.make_plan`. Whatever its ``removal_score``, kernels go by the sum of squares of all
            their taps, which makes the result the nearest point. With a target the numbers of kernels are first
            spread over the layers as the project's selection does it.
        patterns: bool (P, kh, kw); a target counts with their taps.

    Returns:
        The planned layers that lose kernels. Same shapes and dtypes.
    """
    choices = _select(values, plan, patterns)
    return {name: _keep(choices[name].full().kernel, values[name]) for name in _with_removal(plan)}


def admm(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    patterns: Any,
    rho: float | optax.Schedule,
    every: int,
    begin_step: int = 0,
    end_step: int | None = None,
    prune_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ADMM towards patterns and removed kernels, around any optax optimizer. Put it last in a chain.

    Args:
        inner: the optimizer; it sees the gradient with both quadratic terms.
        plan: from `clicktrain_jax.make_plan`: layers, fractions of kernels, tiles. Layers of 1x1 have the kernel
            term alone, layers that lose no kernel the pattern term alone.
        patterns: bool (P, kh, kw).
        rho: weight of the quadratic terms, > 0; or a function of the updates since ``begin_step`` (int32 scalar, the
            first one sees 0), as optax's schedules are. The scaled duals stand as they are when it changes.
        every: projections and duals are renewed every so many updates, counted from ``begin_step``.
        begin_step: the update (from 0) that has the terms first. There the copies are the projections of the
            weights, the duals are zero.
        end_step: the first update without the terms; None for ``prune_step``, or never.
        prune_step: the update after which the net is pruned, by the magnitudes of the weights in the update before, and
            stays so: masked weights are exactly zero. None leaves that to others: no masks are held.

    Returns:
        A transformation whose state is an `AdmmState`; with ``prune_step`` a `clicktrain_jax.ClickTrainState` that has
        one inside. Before ``begin_step`` and from ``end_step`` on it does what ``inner`` does. Further arguments of
        ``update`` are handed to ``inner``.

    Raises:
        ValueError: at once for steps, ``every`` or ``rho`` out of range, generated patterns, patterns that do not fit
            the plan; in ``init`` for parameters of another tree; in ``update`` when ``params`` is missing.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.arange(1.0, 289.0).reshape(3, 3, 8, 4)}}
        >>> tx = ct.methods.admm(optax.sgd(0.1), ct.make_plan(params, {".*/kernel": 0.5}),
        ...                      patterns=ct.patterns.fixed_set(4), rho=1e-3, every=2, prune_step=4)
        >>> state = tx.init(params)
        >>> for _ in range(5):
        ...     updates, state = tx.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((params["Conv_0"]["kernel"] != 0).sum())  # half of 32 kernels, 4 taps each
        64

    Source: PatDNN, arXiv 2001.00138, and PCONV, arXiv 1909.05073: both projections, scaled duals.
    """
    begin_step = check_integer("begin_step", begin_step, 0)
    if prune_step is not None:
        if check_integer("prune_step", prune_step, 0) <= begin_step:
            raise ValueError(f"prune_step={prune_step}: expected more than begin_step={begin_step}")
        end_step = prune_step if end_step is None else end_step
        pulled = admm(inner, plan, patterns=patterns, rho=rho, every=every, begin_step=begin_step, end_step=end_step)
        return clicktrain(
            pulled,
            plan,
            select_step=prune_step - 1,
            prune_step=prune_step,
            coeff=0.0,
            patterns=patterns,
            importance="magnitude",
        )
    every = check_integer("every", every, 1)
    if end_step is not None and check_integer("end_step", end_step, 0) <= begin_step:
        raise ValueError(f"end_step={end_step}: expected more than begin_step={begin_step}, or None for no end")
    check_axes("admm", plan)
    rho_at = _schedule(rho)
    if isinstance(patterns, Generated):
        raise ValueError(
            "patterns=Generated(...): ADMM needs a set that stands, bool (P, kh, kw); generate one from the trained "
            "net first (clicktrain_jax.patterns)"
        )
    patterns = check_patterns(plan, patterns)
    inner = optimizer(inner)

    def init(params: Tree) -> AdmmState:
        like = plan.tree_of(params)
        weights = _wide(planned(like, plan))

        def zeros(names: list[str]) -> Arrays:
            return {name: jnp.zeros(weights[name].shape, weights[name].dtype) for name in names}

        both, removed = _with_patterns(plan), _with_removal(plan)
        variables = jnp.zeros([], jnp.int32), zeros(both), zeros(both), zeros(removed), zeros(removed)
        count, z, u, y, v = spread_like(variables, like)
        return AdmmState(count, z, u, y, v, inner.init(params))

    def renew(state: AdmmState, weights: Arrays) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        first = state.count == begin_step

        def step(project: Callable[..., Arrays], duals: Arrays) -> tuple[Arrays, Arrays]:
            duals = {name: jnp.where(first, 0.0, dual) for name, dual in duals.items()}
            sums = {name: weight + duals[name] if name in duals else weight for name, weight in weights.items()}
            copies = project(sums, plan, patterns)
            # U + W - Z, with the sum that was projected.
            return copies, {name: jnp.where(first, 0.0, sums[name] - copies[name]) for name in duals}

        return *step(project_patterns, state.pattern_dual), *step(project_kernels, state.kernel_dual)

    def whole_update(grads: Tree, state: AdmmState, params: Tree, extra: dict[str, Any]) -> tuple[Tree, AdmmState]:
        plan.check_tree(params)
        weights = _wide(planned(params, plan))
        since = state.count - begin_step
        active = since >= 0
        if end_step is not None:
            active &= state.count < end_step
        variables = tuple(state[1:5])
        z, u, y, v = branch(active & (since % every == 0), [lambda: variables, lambda: renew(state, weights)])

        def pulled() -> Tree:
            weight_of_terms = rho_at(since)

            def add(name: str, grad: Any) -> Any:
                if name not in weights:
                    return grad
                pull = jnp.zeros_like(weights[name])
                for copies, duals in ((z, u), (y, v)):
                    if name in copies:
                        pull += weights[name] - copies[name] + duals[name]
                wide = jnp.promote_types(grad.dtype, jnp.float32)
                return (grad.astype(wide) + weight_of_terms * pull).astype(grad.dtype)

            return map_named(add, grads)

        grads = branch(active, [lambda: grads, pulled])
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        return updates, AdmmState(jnp.asarray(optax.safe_increment(state.count)), z, u, y, v, inner_state)

    return transformation(init, whole_update, functools.partial(check_update, "admm", plan))


def admm_residual(state: Any, params: Tree) -> dict[str, float]:
    """How far the weights are from satisfying the constraints.

    Args:
        state: an `AdmmState`, or an optimizer state with one inside; from ``begin_step`` on.
        params: concrete parameters.

    Returns:
        ``{"pattern": ||W - Z|| / ||W||, "kernel": ||W - Y|| / ||W||}``, each over all layers that have the copy
        (planned layers above 1x1; planned layers that lose kernels), 0 when there are none.

    Raises:
        ValueError: no such state, or several; parameters of another tree.
    """
    state = find_state(state, AdmmState, "admm(...)")

    def relative(copies: Arrays) -> float:
        leaves: Arrays = {}
        map_named(lambda name, weight: leaves.__setitem__(name, weight) if name in copies else None, params)
        missing = sorted(set(copies) - set(leaves))
        if missing:
            raise ValueError(f"params: belongs to another tree, {missing[0]!r} is missing")
        weights = _wide(leaves)
        distance = sum(float(jnp.sum(jnp.square(weights[name] - copy))) for name, copy in copies.items())
        if distance == 0:
            return 0.0
        whole = sum(float(jnp.sum(jnp.square(weight))) for weight in weights.values())
        return math.sqrt(distance / whole) if whole else math.inf

    return {"pattern": relative(state.pattern_copy), "kernel": relative(state.kernel_copy)}


def _select(values: Arrays, plan: Plan, patterns: Any) -> dict[str, Any]:
    """The project's selection by sums of squares; every choice by whole scores, which makes it a projection."""
    layers = tuple(dataclasses.replace(layer, removal_score="whole") for layer in plan.layers)
    scores = {layer.name: jnp.square(values[layer.name]) for layer in plan.layers}
    return select_layers(scores, dataclasses.replace(plan, layers=layers), patterns)


def _keep(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _with_patterns(plan: Plan) -> list[str]:
    return [layer.name for layer in plan.layers if layer.has_patterns]


def _with_removal(plan: Plan) -> list[str]:
    """A copy without any constraint would only hold the weights back."""

    def loses(layer: LayerPlan) -> bool:
        return layer.fraction is None or layer.num_removed > 0

    return [layer.name for layer in plan.layers if loses(layer)]


def _wide(leaves: Arrays) -> Arrays:
    """float32 at least: duals add up small differences, which 16 bits would lose."""
    return {name: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for name, leaf in leaves.items()}


def _schedule(rho: float | optax.Schedule) -> optax.Schedule:
    if callable(rho):
        return rho
    if isinstance(rho, bool) or not isinstance(rho, numbers.Real) or not 0 < rho < math.inf:
        raise ValueError(f"rho={rho!r}: expected a finite number > 0, or a function of the updates since begin_step")
    return lambda _: float(rho)
