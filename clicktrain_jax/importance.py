"""Importance of single weights: trees of non-negative float32 scores, shaped like the parameters.

The score of a kernel, of a pattern on a kernel, or of a tile is the sum of these over its taps; that part
is shared by all criteria and lives in `clicktrain_jax.masks`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from clicktrain_jax.trees import Tree, map_named

Criterion = Callable[[Tree, Tree], Tree]


def _squared(value: Any) -> Any:
    return jnp.square(value.astype(jnp.float32))


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

    def score(name: str, weight: Any, grad: Any) -> Any:
        if weight is None or grad is None:
            return None
        if jnp.shape(weight) != jnp.shape(grad):
            raise ValueError(f"{name}: gradient of shape {jnp.shape(grad)}, weight {jnp.shape(weight)}")
        return jnp.square(jnp.asarray(weight, jnp.float32) * jnp.asarray(grad, jnp.float32))

    return map_named(score, params, grads, what="grads")


def magnitude(params: Tree, grads: Tree | None = None) -> Tree:
    """Magnitude importance ``w**2``; ``grads`` is accepted, and not read, so that criteria are exchangeable."""
    return map_named(lambda _, w: None if w is None else _squared(jnp.asarray(w)), params)


CRITERIA: dict[str, Criterion] = {"taylor": taylor, "magnitude": magnitude}


def criterion(which: str | Criterion) -> Criterion:
    """Look a criterion up by name; a function ``(params, grads) -> scores`` passes through.

    Raises:
        ValueError: unknown name.
    """
    if callable(which):
        return which
    if which not in CRITERIA:
        raise ValueError(f"importance={which!r}: expected one of {sorted(CRITERIA)} or a function (params, grads)")
    return CRITERIA[which]
