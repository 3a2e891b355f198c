"""A net with fewer channels: parameters, statistics and whatever mirrors them, sliced to the channels that are kept.

Channels are named by the kernel that writes them first, ``"params/Conv_1/kernel"``. The groups (`ChannelNode`) are
found once, from the whole net, and serve for any number of reconfigurations: what is read of a node is its names,
not its size.

    nodes = channel_nodes(lambda variables, x: model.apply(variables, x, train=False), variables, (32, 32, 3))
    kept = living_channels(variables, nodes)
    variables = narrow(variables, kept, nodes)
    opt_state = narrow(opt_state, kept, nodes, prefix="params/")

The net must take its widths from its parameters: `clicktrain_jax.models.NarrowConv`.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.channels.nodes import ChannelNode, find_node
from clicktrain_jax.trees import Tree, is_kernel_shape, map_named, named_leaves


def narrow(tree: Tree, kept: Mapping[str, Any], nodes: Sequence[ChannelNode], *, prefix: str = "") -> Tree:
    """Drop channels from all the leaves that know of them.

    Where the kernels that read a dropped channel hold zeros for it, or the ones that write it and its BatchNorm do,
    the net computes the same function as before. Works under jit; what is kept is static. Outside jit numpy arrays are
    sliced on the host; a jax array is sliced by a small program for each shape, which adds up in a deep net.

    Args:
        tree: the variables; or one collection of them; or any tree with leaves that mirror the parameters, known by
            the parameter's path at the end of theirs: gradients, an optax state with its momentum. Single numbers and
            ``None`` stay as they are.
        kept: ``{name of a kernel that writes the channels: bool (size,)}``, True for those that stay, size being the
            present one. Groups that are not mentioned stay whole.
        nodes: from `clicktrain_jax.channels.channel_nodes`, of this net or of a wider form of it.
        prefix: what the names in ``nodes`` have before the leaf's path in the tree: "" for variables, "params/" for
            parameters, gradients and optimizer states, "batch_stats/" for statistics.

    Returns:
        A tree with the same containers. Leaves without dropped channels are the same objects.

    Raises:
        ValueError: an unknown kernel; a mask that is not boolean, not 1-D, or keeps nothing; two masks for one group;
            channels that must stay; a leaf of another shape; no leaf of the tree has channels, as with a wrong prefix.
    """
    steps: dict[str, list[tuple[int, int | None, np.ndarray]]] = {}
    for node, mask in _by_node(kept, nodes).items():
        for name, axis, outer in leaf_axes(node):
            steps.setdefault(name, []).append((axis, outer, mask))
    mirrored = _mirrored([name for name, _ in named_leaves(tree)], nodes, prefix)
    has_arrays = any(leaf is not None and jnp.ndim(leaf) for _, leaf in named_leaves(tree))
    if has_arrays and not mirrored:
        raise ValueError(
            f"prefix={prefix!r}: no leaf of the tree is one of the net's with that prefix left out; expected '' for "
            "variables, 'params/' for parameters and optimizer states, 'batch_stats/' for statistics"
        )

    def cut(name: str, leaf: Any) -> Any:
        # Optimizers keep a single number where a leaf has no state.
        if leaf is None or jnp.size(leaf) <= 1:
            return leaf
        for axis, outer, mask in steps.get(mirrored.get(name, ""), ()):
            shape, block = jnp.shape(leaf), (outer or 1) * mask.size
            if len(shape) <= axis or shape[axis] % block or (outer is None and shape[axis] != block):
                raise ValueError(
                    f"{name!r} has shape {shape}; axis {axis} was expected to hold {mask.size} channels, as many as "
                    "the mask of those kept has entries"
                )
            places = np.arange(shape[axis]).reshape(outer or 1, mask.size, -1)[:, mask].reshape(-1)
            if places.size < shape[axis]:
                leaf = leaf[(slice(None),) * axis + (places,)]
        return leaf

    return map_named(cut, tree)


def widths(kept: Mapping[str, Any]) -> dict[str, int]:
    """How many channels of each group are kept: plain numbers to record, enough for `narrow_shapes`."""
    return {name: int(np.sum(mask)) for name, mask in kept.items()}


def narrow_shapes(tree: Tree, sizes: Mapping[str, int], nodes: Sequence[ChannelNode], *, prefix: str = "") -> Tree:
    """The shapes of a narrowed tree, from the number of channels alone: what to restore a checkpoint into.

    Args:
        tree: as for `narrow`, of the whole net that ``nodes`` come from; arrays or `jax.ShapeDtypeStruct`.
        sizes: ``{name of a kernel that writes the channels: number kept}``, from `widths`.
        nodes: from `clicktrain_jax.channels.channel_nodes`.
        prefix: as for `narrow`.

    Returns:
        A tree with the same containers and `jax.ShapeDtypeStruct` leaves.

    Raises:
        ValueError: a number of channels that the group cannot have; what `narrow` refuses.
    """
    kept = {}
    for name, size in sizes.items():
        node = find_node(name, nodes)
        if isinstance(size, bool) or not hasattr(size, "__index__") or not 1 <= size <= node.size:
            raise ValueError(f"sizes[{name!r}]={size!r}: expected 1 to {node.size} channels")
        kept[name] = np.arange(node.size) < size
    return jax.eval_shape(functools.partial(narrow, kept=kept, nodes=nodes, prefix=prefix), tree)


def leaf_axes(node: ChannelNode) -> list[tuple[str, int, int | None]]:
    """``(leaf name, axis, outer)`` of all leaves that know of a group; outer is None where the axis is the channels."""
    return [*((*entry, None) for entry in (*node.writers, *node.followers)), *node.readers]


def leaf_shapes(tree: Tree, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree's leaves by the names that they have in the nodes."""
    return {f"{prefix}{name}": jnp.shape(leaf) for name, leaf in named_leaves(tree) if leaf is not None}


def check_leaves(names: Sequence[str], shapes: Mapping[str, Any], prefix: str) -> None:
    """Refuse a tree that lacks one of the leaves.

    Raises:
        ValueError: names the first one.
    """
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"prefix={prefix!r}: the tree has no leaf {missing[0].removeprefix(prefix)!r}; expected the tree that the "
            "nodes were found in ('' for variables, 'params/' for parameters)"
        )


def channels_of(node: ChannelNode, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many channels a group has by now."""
    name, axis = node.writers[0]
    return shapes[name][axis]


def is_written_by_convolutions(node: ChannelNode, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True for channels of feature maps, false for those that a linear layer has a share in."""
    return bool(node.writers) and all(is_kernel_shape(shapes[name]) for name, _ in node.writers)


def _by_node(kept: Mapping[str, Any], nodes: Sequence[ChannelNode]) -> dict[ChannelNode, np.ndarray]:
    masks: dict[ChannelNode, np.ndarray] = {}
    for name, given in kept.items():
        node, mask = find_node(name, nodes), np.asarray(given)
        if mask.dtype != bool or mask.ndim != 1 or not mask.any():
            raise ValueError(
                f"kept[{name!r}] is {mask.dtype} {mask.shape} with {np.count_nonzero(mask)} channels: expected bool "
                "(channels,) with one True or more"
            )
        if node.fixed and not mask.all():
            raise ValueError(f"kept[{name!r}]: its {node.size} channels must stay, because {node.fixed}")
        if not np.array_equal(masks.setdefault(node, mask), mask):
            raise ValueError(
                f"kept[{name!r}]: another mask was given for the same channels, which "
                f"{[writer for writer, _ in node.writers]} write together; give one"
            )
    return masks


def _mirrored(names: Sequence[str], nodes: Sequence[ChannelNode], prefix: str) -> dict[str, str]:
    """``{name in the tree: name in the nodes}`` of the leaves whose path ends in that of a leaf of the net.

    A block's path ends in the stem's ("Block_0/Conv_0/kernel"), so the places below which copies of the net's leaves
    stand are found first, those with the most leaves before others; none of them lies inside another one.
    """
    known = {name.removeprefix(prefix) for node in nodes for name, *_ in leaf_axes(node) if name.startswith(prefix)}
    splits: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for name in names:
        keys = tuple(name.split("/"))
        ends = [(keys[:start], "/".join(keys[start:])) for start in range(len(keys))]
        splits[name] = [(root, end) for root, end in ends if end in known]
    counts = collections.Counter(root for found in splits.values() for root, _ in found)
    roots: list[tuple[str, ...]] = []
    for root in sorted(counts, key=lambda root: (-counts[root], len(root))):
        if not any(root == other[: len(root)] or other == root[: len(other)] for other in roots):
            roots.append(root)
    return {name: prefix + end for name, found in splits.items() for root, end in found if root in roots}
