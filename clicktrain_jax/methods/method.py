"""The door of a training loop: what any method asks of it, in five fields."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from clicktrain_jax.masks import Masks
from clicktrain_jax.trees import Tree


def _as_they_are(params: Tree) -> Tree:
    return params


def _no_masks(params: Tree, opt_state: Any) -> Masks | None:
    return None


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method does to a run that a plain optimizer would train.

    A loop that asks for these five things runs every method: it steps ``optimizer``, computes loss and gradient at
    ``forward(params)``, and trains ``epochs_after`` epochs more.

    Attributes:
        optimizer: the plain optimizer with the method around it. Its ``update`` takes ``params`` and ``value=``, the
            loss (a float scalar).
        forward: parameters -> the parameters that the net computes with, a tree of the same shapes and dtypes; it
            stands inside the loss.
        masks: ``(params, opt_state) -> Masks``, or None where nothing is masked; for `clicktrain_jax.report`,
            `clicktrain_jax.export` and `clicktrain_jax.accelerate`.
        begins_at: the update (from 0) in which the method does something for the first time. Before it the run is that
            of the plain optimizer, which several methods may share.
        epochs_after: epochs that the method adds to the plain run.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.arange(1.0, 289.0).reshape(3, 3, 8, 4)}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.75})
        >>> method = ct.methods.Method(
        ...     ct.methods.magnitude(optax.sgd(0.1), plan, prune_step=1),
        ...     masks=lambda params, opt_state: ct.masks_of(opt_state), begins_at=1)
        >>> state = method.optimizer.init(params)
        >>> for _ in range(2):
        ...     grads = jax.grad(lambda params: jnp.sum(method.forward(params)["Conv_0"]["kernel"]))(params)
        ...     updates, state = method.optimizer.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> ct.report(params, method.masks(params, state)).conv_compression
        4.0
    """

    optimizer: optax.GradientTransformationExtraArgs
    forward: Callable[[Tree], Tree] = _as_they_are
    masks: Callable[[Tree, Any], Masks | None] = _no_masks
    begins_at: int = 0
    epochs_after: int = 0
