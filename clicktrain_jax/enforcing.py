"""What masks remove stays at zero: weights, and all that an optimizer remembers of them."""

import collections
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from clicktrain_jax.jaxprs import bind, walk
from clicktrain_jax.masks import Masks, kept, layers_for
from clicktrain_jax.trees import Tree, map_named, named_leaves, path_keys, placed_like


def enforce(updates: Tree, inner_state: Any, params: Tree, masks: Masks) -> tuple[Tree, Any]:
    """Make an update leave every masked weight, and all the optimizer remembers of it, at exactly zero.

    Args:
        updates: tree like ``params``, as an optax update returns it.
        inner_state: an optax state; arrays in it that mirror a parameter (the same path at its end, the same
            shape: momentum, second moments, averages) are masked.
        params: the parameters the updates will be added to.
        masks: `Masks` of that tree.

    Returns:
        ``(updates, inner_state)``.
    """
    keep = {name: layer.combined() for name, layer in layers_for(params, masks).items()}
    leaves, structure = jax.tree.flatten(inner_state)
    mirrored = _mirrored(inner_state, keep, [name for name, _ in named_leaves(params)])
    return _held_weights(updates, params, keep), structure.unflatten(map(_held, leaves, mirrored))


def _held_weights(updates: Tree, params: Tree, keep: dict[str, Any]) -> Tree:
    def hold(name: str, update: Any, weight: Any) -> Any:
        if update is None or name not in keep:
            return update
        # w + (-w) is exactly zero, in a dtype that holds w.
        wide = jnp.promote_types(update.dtype, weight.dtype)
        return jnp.where(placed_like(keep[name], weight), update.astype(wide), -weight.astype(wide))

    return map_named(hold, updates, params, what="params")


def _held(leaf: Any, mask: Any) -> Any:
    return leaf if mask is None else kept(leaf, mask)


def held_update(
    inner: Any, grads: Tree, inner_state: Any, params: Tree, extra: dict[str, Any], masks: Masks
) -> tuple[Tree, Any]:
    """`enforce` of an optimizer's update, with memory masked where it is made, before the rest of the update reads it.

    So one loop makes the memory and another the weights of it, as in the optimizer's own update. Were it masked
    afterwards, both would compute the unmasked memory from what was there before, which neither might overwrite: XLA
    would copy both.

    Args:
        inner: optax transformation.
        grads, inner_state, params, extra: of its update.
        masks: as `enforce` takes them.
    """
    arguments = grads, inner_state, params

    def update(grads: Tree, inner_state: Any, params: Tree) -> tuple[Tree, Any]:
        return inner.update(grads, inner_state, params, **extra)

    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
        return enforce(*update(*arguments), params, masks)
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(*arguments)
    keep = {name: layer.combined() for name, layer in layers_for(params, masks).items()}
    mirrored = _mirrored(shapes[1], keep, [name for name, _ in named_leaves(params)])
    variables = closed.jaxpr.outvars[len(closed.jaxpr.outvars) - len(mirrored) :]
    results = {id(result) for equation in closed.jaxpr.eqns for result in equation.outvars}
    # What is no result, or stands for several leaves, is masked at the end.
    seen = collections.Counter(map(id, variables))
    early = [id(variable) in results and seen[id(variable)] == 1 for variable in variables]
    masked = {id(variable): mask for variable, mask, is_early in zip(variables, mirrored, early) if is_early}

    def step(equation: Any, operands: list[Any]) -> list[Any]:
        return [_held(one, masked.get(id(result))) for one, result in zip(bind(equation, operands), equation.outvars)]

    found = walk(closed, jax.tree.leaves(arguments), step)
    updates, inner_state = jax.tree.unflatten(jax.tree.structure(shapes), found)
    leaves, structure = jax.tree.flatten(inner_state)
    rest = [None if is_early else mask for mask, is_early in zip(mirrored, early)]
    return _held_weights(updates, params, keep), structure.unflatten(map(_held, leaves, rest))


def _mirrored(inner_state: Any, keep: dict[str, Any], leaf_names: list[str]) -> list[Any]:
    """For each leaf of an optimizer's state the mask of the parameter that it mirrors, or None."""
    with_paths = jax.tree_util.tree_flatten_with_path(inner_state)[0]
    paths = {path_keys(path) for path, _ in with_paths}
    names = {tuple(name.split("/")) if name else () for name in leaf_names}

    def name_of(keys: tuple[str, ...]) -> str | None:
        """The parameter whose path ends these keys. A module may be called like a field of the state: of several
        candidates the one below which most parameters are found is a copy of the parameter tree."""
        splits = [(keys[:start], keys[start:]) for start in range(len(keys) + 1) if keys[start:] in names]
        if not splits:
            return None
        return "/".join(max(splits, key=lambda split: sum((*split[0], *name) in paths for name in names))[1])

    def mask_of(path: tuple, leaf: Any) -> Any:
        name = name_of(path_keys(path))
        held = None if name is None else keep.get(name)
        fits = held is not None and jnp.shape(leaf) == held.shape and jnp.issubdtype(leaf.dtype, jnp.inexact)
        return held if fits else None

    return [mask_of(*each) for each in with_paths]
