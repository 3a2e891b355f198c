"""Importance of single weights: trees of non-negative float32 scores, shaped like the parameters.

The score of a kernel, of a pattern on a kernel, or of a tile is the sum of these over its taps; that part
is shared by all criteria and lives in `clicktrain_jax.selection`. Over N batches the score is the mean of the
batches' scores, each taken at the weights of its own update (`clicktrain_jax.clicktrain`, ``importance_steps``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from clicktrain_jax.plan.convolutions import Axes, tap_axes
from clicktrain_jax.trees import Tree, is_kernel_shape, is_key, map_named, named_leaves

Criterion = Callable[[Tree, Tree], Tree]
# Scores are scaled by powers of two, which changes no bit but the exponent's: a layer's largest to about 2**80, so that
# what is 2**200 times smaller does not underflow and the sum over a layer does not overflow.
_SCALE = 80
# The exponent of scores that are all zero: below any other.
NO_SCORE = -(2**20)


def _square(value: Any) -> Any:
    return None if value is None else jnp.square(value)


def _change(name: str, weight: Any, grad: Any) -> Any:
    """w * g in float32: to first order, minus the change of the loss when the weight is removed."""
    if weight is None or grad is None or is_key(weight):
        return None
    if jnp.shape(weight) != jnp.shape(grad):
        raise ValueError(f"{name}: gradient of shape {jnp.shape(grad)}, weight {jnp.shape(weight)}")
    return jnp.asarray(weight, jnp.float32) * jnp.asarray(grad, jnp.float32)


def taylor(params: Tree, grads: Tree) -> Tree:
    """First-order Taylor importance ``(w * g)**2`` of every weight, g the loss gradient of one batch.

    Args:
        params: tree of arrays.
        grads: tree of the same structure and shapes: the global gradient when there are several devices.

    Returns:
        A tree like ``params``, float32.

    Raises:
        ValueError: ``grads`` belongs to another tree.

    Source: the selection of ClickTrain's reference code: the squared first-order change of the loss when
    the weight is removed.
    """

    return map_named(lambda name, weight, grad: _square(_change(name, weight, grad)), params, grads, what="grads")


def group_taylor(params: Tree, grads: Tree, axes: Axes = "HWIO") -> Tree:
    """First-order Taylor importance of whole kernels, spread over their weights.

    The score of a kernel is ``(sum over its taps of w * g)**2``, the squared first-order change of the loss when all
    of it is removed. It is spread over the taps in proportion to ``(w * g)**2``, so that scores are non-negative, a
    kernel's add up to its own, and its best pattern is that of `taylor`.

    Args:
        params: tree of arrays; leaves that are not (kh, kw, cin, cout) are scored as by `taylor`.
        grads: as for `taylor`.
        axes: the layout of the kernels, "HWIO" or "OIHW".

    Returns:
        A tree like ``params``, float32.

    Raises:
        ValueError: ``grads`` belongs to another tree.

    Source: group criteria of this kind are known from Molchanov et al., "Importance Estimation for Neural Network
    Pruning" (arXiv 1906.10771), there for whole filters; spreading it over taps is this project's own.
    """

    def score(name: str, weight: Any, grad: Any) -> Any:
        change = _change(name, weight, grad)
        if change is None or not is_kernel_shape(change.shape):
            return _square(change)
        squared = jnp.square(change)
        taps = tap_axes(change.shape, axes)
        whole = jnp.sum(squared, axis=taps, keepdims=True)
        group = jnp.square(jnp.sum(change, axis=taps, keepdims=True))
        return squared * jnp.where(whole > 0, group / jnp.where(whole > 0, whole, 1.0), 0.0)

    return map_named(score, params, grads, what="grads")


def magnitude(params: Tree, grads: Tree | None = None) -> Tree:
    """Magnitude importance ``w**2``; ``grads`` is accepted, and not read, so that criteria are exchangeable."""
    return map_named(lambda _, w: None if w is None or is_key(w) else jnp.square(jnp.asarray(w, jnp.float32)), params)


CRITERIA: dict[str, Criterion] = {"taylor": taylor, "group_taylor": group_taylor, "magnitude": magnitude}


def criterion(which: str | Criterion, axes: Axes = "HWIO") -> Criterion:
    """Look a criterion up by name, for kernels of a layout; a function ``(params, grads) -> scores`` passes through.

    Raises:
        ValueError: unknown name.
    """
    if callable(which):
        return which
    if which not in CRITERIA:
        raise ValueError(f"importance={which!r}: expected one of {sorted(CRITERIA)} or a function (params, grads)")
    return partial(group_taylor, axes=axes) if (which, axes) == ("group_taylor", "OIHW") else CRITERIA[which]


def scaled_scores(
    which: Criterion, params: Tree, grads: Tree, names: list[str]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """A criterion's scores of some leaves, each leaf's scaled so that its squares neither underflow nor overflow.

    The criteria of this module are given scaled weights and gradients: the gradients of a net that has nearly
    converged, or of a loss in another unit, may be 1e-24, whose square float32 does not hold. Functions of others see
    the trees as they are.

    Args:
        which: a criterion.
        params: tree of arrays.
        grads: tree like it.
        names: of the leaves that count.

    Returns:
        ``{name: (float32 scores, int32 exponent)}``; the score itself is ``scores * 2.0**exponent``.
    """
    if getattr(which, "func", which) not in CRITERIA.values():
        found = dict(named_leaves(which(params, grads)))
        return {name: rescaled(found[name].astype(jnp.float32)) for name in names}
    trees, exponent = [], dict.fromkeys(names, 0)
    for tree, goal, read in ((params, 0, True), (grads, _SCALE // 2, which is not magnitude)):
        leaves = dict(named_leaves(tree))
        pairs = {name: rescaled(jnp.asarray(leaves[name], jnp.float32), goal) for name in names}
        trees.append({name: leaf for name, (leaf, _) in pairs.items()})
        if read:
            exponent = {name: exponent[name] + 2 * pairs[name][1] for name in names}
    return {name: (score, jnp.where(score.any(), exponent[name], NO_SCORE)) for name, score in which(*trees).items()}


def rescaled(values: jax.Array, goal: int = _SCALE) -> tuple[jax.Array, jax.Array]:
    """Float32 values (...) scaled by a power of two so that the largest is about ``2**goal``, and the exponent () of
    what is left: ``values == scaled * 2.0**exponent``. All zero, or not finite: as they are."""
    bits = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(values), initial=0.0), jnp.int32)
    exponent = jnp.right_shift(bits, 23) - 127 - goal
    exponent = jnp.where((bits >= 1 << 23) & (bits < 255 << 23), exponent, 0)
    return times_power_of_two(values, -exponent), jnp.where(bits == 0, NO_SCORE, exponent)


def times_power_of_two(values: jax.Array, exponent: jax.Array) -> jax.Array:
    """Float32 ``values * 2**exponent``, (...) and a scalar, exact where the result is in float32's range."""
    exponent = jnp.clip(exponent, -252, 252)
    half = exponent // 2
    for part in (half, exponent - half):
        values = values * jax.lax.bitcast_convert_type((part + 127) << 23, jnp.float32)
    return values
