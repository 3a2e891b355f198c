"""Importance of single weights: trees of non-negative float32 scores, shaped like the parameters.

The score of a kernel, of a pattern on a kernel, or of a tile is the sum of these over its taps; that part
is shared by all criteria and lives in `clicktrain_jax.selection`. Over N batches the score is the mean of the
batches' scores, each taken at the weights of its own update (`clicktrain_jax.clicktrain`, ``importance_steps``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from clicktrain_jax.convolutions import Axes, tap_axes
from clicktrain_jax.trees import Tree, is_kernel_shape, map_named

Criterion = Callable[[Tree, Tree], Tree]


def _square(value: Any) -> Any:
    return None if value is None else jnp.square(value)


def _change(name: str, weight: Any, grad: Any) -> Any:
    """w * g in float32: to first order, minus the change of the loss when the weight is removed."""
    if weight is None or grad is None:
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
    return map_named(lambda _, w: None if w is None else jnp.square(jnp.asarray(w, jnp.float32)), params)


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
