"""What masks remove stays at zero: weights, and all that an optimizer remembers of them."""

from typing import Any

import jax
import jax.numpy as jnp

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

    def hold(name: str, update: Any, weight: Any) -> Any:
        if update is None or name not in keep:
            return update
        # w + (-w) is exactly zero, in a dtype that holds w.
        wide = jnp.promote_types(update.dtype, weight.dtype)
        return jnp.where(placed_like(keep[name], weight), update.astype(wide), -weight.astype(wide))

    updates = map_named(hold, updates, params, what="params")
    return updates, _mask_mirrors(inner_state, keep, [name for name, _ in named_leaves(params)])


def _mask_mirrors(inner_state: Any, keep: dict[str, Any], leaf_names: list[str]) -> Any:
    paths = {path_keys(path) for path, _ in jax.tree_util.tree_flatten_with_path(inner_state)[0]}
    names = {tuple(name.split("/")) if name else () for name in leaf_names}

    def name_of(keys: tuple[str, ...]) -> str | None:
        """The parameter whose path ends these keys. A module may be called like a field of the state: of several
        candidates the one below which most parameters are found is a copy of the parameter tree."""
        splits = [(keys[:start], keys[start:]) for start in range(len(keys) + 1) if keys[start:] in names]
        if not splits:
            return None
        return "/".join(max(splits, key=lambda split: sum((*split[0], *name) in paths for name in names))[1])

    def mask(path: tuple, leaf: Any) -> Any:
        name = name_of(path_keys(path))
        held = None if name is None else keep.get(name)
        if held is None or jnp.shape(leaf) != held.shape or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return kept(leaf, held)

    return jax.tree_util.tree_map_with_path(mask, inner_state)
