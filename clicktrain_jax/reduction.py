"""Gradients that travel between devices without the weights that a prune has removed.

From the prune on, the gradient of a removed weight is of no use to anybody, so an all-reduce need not carry it. What
is left of all leaves, the dense ones among them, goes as one vector in one reduction, and is put back into its places::

    retained = ct.reduction.retained(params, ct.masks_of(opt_state))      # once, outside jit

    def device_step(params, opt_state, retained, images, labels):         # inside jax.shard_map, over axis "data"
        grads = jax.grad(loss)(params, images, labels)
        grads = ct.reduction.pmean(grads, retained, "data")
        ...

With 8 times fewer weights some 8 times fewer bytes travel (`num_bytes`). In the form of ``lax.pmean`` every retained
entry has the same bits as without this; removed ones are zero.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.masks import Masks, layers_for
from clicktrain_jax.trees import Tree, check_same_names, named_leaves


@jax.tree_util.register_pytree_node_class
class Retained:
    """Where the retained weights of a parameter tree stand; a pytree, to be handed to a compiled step as an argument.

    Attributes:
        indices: ``{leaf name: int32 (retained,)}``, ascending positions in the flattened leaf; dense leaves are
            missing.
        sizes: ``{leaf name: retained weights}`` of all leaves.
    """

    def __init__(self, indices: dict[str, Any], sizes: dict[str, int]) -> None:
        self.indices, self.sizes = indices, sizes

    def tree_flatten(self) -> tuple[Any, Any]:
        """For jax."""
        return (self.indices,), tuple(self.sizes.items())

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "Retained":
        """For jax."""
        return cls(children[0], dict(static))

    def __repr__(self) -> str:
        return f"Retained({len(self.indices)} of {len(self.sizes)} leaves pruned, {sum(self.sizes.values()):,} weights)"


def retained(params: Tree, masks: Masks) -> Retained:
    """Where the weights stand that stay.

    Args:
        params: tree of arrays, or of their `jax.ShapeDtypeStruct`.
        masks: of that tree or of a part of it, concrete; as `clicktrain_jax.masks_of` reads them after the prune.

    Returns:
        `Retained`, four bytes a retained weight of the pruned leaves.

    Raises:
        ValueError: masks of another tree; traced masks; masks of a run that has not come to its prune: weights that
            are only marked still train, and need their gradient.
    """
    masks = Masks.of(masks)
    if masks.pending:
        raise ValueError(
            "masks: are of a run between selection and prune, when every weight still trains. Reduce the whole "
            "gradient until prune_step (jax.lax.pmean), and make this from then on."
        )
    layers = layers_for(params, masks)
    indices, sizes = {}, {}
    for name, leaf in named_leaves(params):
        if leaf is None:
            continue
        size = math.prod(jnp.shape(leaf))
        if name not in layers:
            sizes[name] = size
            continue
        if any(isinstance(part, jax.core.Tracer) for part in layers[name]):
            raise ValueError("masks: are traced. What travels is a compiled step's shape: make this outside of jit.")
        kept = np.flatnonzero(np.asarray(layers[name].combined()))
        sizes[name] = kept.size
        if kept.size < size:
            indices[name] = jnp.asarray(kept.astype(np.int32))
    return Retained(indices, sizes)


def pmean(
    grads: Tree, retained: Retained, axis_name: Any, *, dtype: Any = jnp.float32, reduce: Any = jax.lax.pmean
) -> Tree:
    """The mean of a gradient over a mesh axis, of the retained weights alone, in one reduction.

    Args:
        grads: this device's gradient; floating arrays.
        retained: from `retained` of the same tree.
        axis_name: as `jax.lax.pmean` takes it; so it is called inside `jax.shard_map`.
        dtype: what travels, and what is summed in: float32, or bfloat16 for half the bytes and three digits (on CPUs
            XLA widens it again).
        reduce: ``jax.lax.psum`` for the sum.

    Returns:
        The same tree and dtypes; zeros at removed weights.

    Raises:
        ValueError: a gradient of another tree.
    """
    leaves = named_leaves(grads)
    check_same_names(list(retained.sizes), [name for name, leaf in leaves if leaf is not None], "grads")
    parts = {}
    for name, leaf in leaves:
        if leaf is not None:
            flat = jnp.ravel(leaf).astype(dtype)
            where = retained.indices.get(name)
            parts[name] = flat if where is None else flat.at[where].get(unique_indices=True, indices_are_sorted=True)
            if parts[name].size != retained.sizes[name]:
                raise ValueError(
                    f"grads: {name!r} has {flat.size} entries, {retained.sizes[name]} were expected. Use the tree "
                    "that the masks were made for."
                )
    whole = reduce(jnp.concatenate(list(parts.values())), axis_name)
    found, begin = {}, 0
    for name, leaf in leaves:
        if leaf is None:
            continue
        values = whole[begin : begin + parts[name].size].astype(leaf.dtype)
        begin += parts[name].size
        where = retained.indices.get(name)
        if where is not None:
            values = (
                jnp.zeros(leaf.size, leaf.dtype).at[where].set(values, unique_indices=True, indices_are_sorted=True)
            )
        found[name] = values.reshape(leaf.shape)
    structure = jax.tree.structure(grads, is_leaf=lambda leaf: leaf is None)
    return structure.unflatten([found.get(name) for name, _ in leaves])


class Bytes(NamedTuple):
    """What an all-reduce of one gradient carries, in bytes of one copy.

    Attributes:
        dense: of the whole gradient.
        compact: of the retained weights.
        pruned_dense: ``dense`` of the leaves that are pruned alone.
        pruned_compact: ``compact`` of those.
    """

    dense: int
    compact: int
    pruned_dense: int
    pruned_compact: int


def num_bytes(params: Tree, retained: Retained, *, dtype: Any = jnp.float32) -> Bytes:
    """How many bytes `pmean` reduces, beside those of the whole gradient.

    Args:
        params: tree of arrays, or of their `jax.ShapeDtypeStruct`.
        retained: from `retained` of that tree.
        dtype: what travels, in both.
    """
    each = jnp.dtype(dtype).itemsize
    sizes = {name: math.prod(jnp.shape(leaf)) for name, leaf in named_leaves(params) if leaf is not None}
    return Bytes(
        each * sum(sizes.values()),
        each * sum(retained.sizes.values()),
        each * sum(sizes[name] for name in retained.indices),
        each * sum(retained.sizes[name] for name in retained.indices),
    )
