"""Channels and their order: who writes, follows and reads them, and how to reorder them.

The channels between two layers have no natural order. Reorder the filters of a convolution, the BatchNorm behind it
and the input channels of the next convolution alike, and the net computes the same function. Filters that keep the
same weights can so be brought next to each other, to share a tile. The same groups of axes are what pruning whole
channels needs. They are found by tracing the net (`clicktrain_jax.channels.axes`), not from layer names.

    nodes = channel_nodes(lambda variables, x: model.apply(variables, x, train=False), variables, (32, 32, 3))
    order = filter_order(mask)
    variables = permute(variables, {"params/Conv_1/kernel": order}, nodes)
    momentum = permute_tree(momentum, {"params/Conv_1/kernel": order}, nodes)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.channels.axes import Part, TracedAxes, trace_axes
from clicktrain_jax.trees import KERNEL_AXES, Tree, map_named, named_leaves

_PARAMS = "params"
_Parts = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class ChannelNode:
    """A group of axes along which the parameters must be reordered together.

    Leaves are called by their names in the tree that was traced, ``"params/Conv_1/kernel"``.

    Attributes:
        size: number of channels.
        writers: ``((leaf name, axis), ...)``, kernels that make these channels, in network order: several where
            their outputs are added.
        followers: ``((leaf name, axis), ...)``, what has one entry a channel: BatchNorm's parameters and statistics,
            biases, depthwise kernels.
        readers: ``((leaf name, axis, outer), ...)``, kernels that sum over these channels. The axis has
            ``outer * size * inner`` places, channel c at ``(o * size + c) * inner + i``: a linear layer behind a
            flattened (rows, columns, channels) map has ``outer = rows * columns`` and ``inner = 1``.
        fixed: why the channels must stay in order; empty when they are free.
    """

    size: int
    writers: tuple[tuple[str, int], ...]
    followers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int, int], ...]
    fixed: str = ""


def channel_nodes(apply_fn: Callable[[Tree, Any], Any], variables: Tree, example: Any) -> tuple[ChannelNode, ...]:
    """Find the groups of channels of a net from the jaxpr of its forward pass. Nothing is computed.

    Args:
        apply_fn: called as ``apply_fn(variables, images)``, any function that jax can trace. Whatever it returns
            keeps its order: let it return the logits alone, for evaluation (no new BatchNorm statistics).
        variables: tree of arrays or `jax.ShapeDtypeStruct`: linen variables, parameters alone, or any other.
        example: ``(height, width, channels)`` of one image, for a float32 batch; or what to pass for the images,
            arrays or `jax.ShapeDtypeStruct` with the batch axis.

    Returns:
        One `ChannelNode` for each group that a kernel writes, in network order, and one for the network's input
        channels where a kernel reads them. Groups of one channel are left out. Input channels and logits are fixed,
        and so is every group that meets an operation which depends on its order or is not known here: padding or
        concatenation along the channels, grouped convolutions and norms, gathers, loops, custom kernels. The
        models' ``PatchConv`` and `pallas_kernels.dense_conv` are followed through.

    Raises:
        ValueError: two leaves of one name; an image shape with entries below 1.
    """
    if isinstance(example, Sequence) and all(isinstance(size, int) for size in example):
        if len(example) != 3 or min(example) < 1:
            raise ValueError(f"example={example!r}: expected (height, width, channels), each 1 or more, or an array")
        example = jax.ShapeDtypeStruct((2, *example), jnp.float32)
    traced = trace_axes(apply_fn, variables, example)
    groups = _groups(traced)
    places: dict[_Parts, list[tuple[str, int, int]]] = {}
    rank = {key: index for index, key in enumerate(traced.roles)}
    for key in sorted(traced.axes, key=lambda key: rank.get(key, len(rank))):
        axis = traced.axes[key]
        for index, part in enumerate(axis):
            group = groups[part]
            if axis[index : index + len(group)] == group:
                places.setdefault(group, []).append((*key, _length(axis[:index])))
    nodes = [_node(group, entries, traced) for group, entries in places.items()]
    return tuple(node for node in nodes if node is not None)


def _length(parts: _Parts) -> int:
    return math.prod(part.length for part in parts)


def _groups(traced: TracedAxes) -> dict[Part, _Parts]:
    """The parts that make one node, by part: one alone, or all of a divided axis of a writer or follower.

    A divided axis (by a group norm, by heads) makes one node whose order stays: `permute` knows whole axes there.
    """
    groups: dict[Part, _Parts] = {}
    for key, axis in traced.axes.items():
        whole = len(axis) > 1 and traced.roles.get(key) != "reader"
        for part in axis:
            if whole or part not in groups:
                groups[part] = axis if whole else (part,)
    return groups


def _node(group: _Parts, entries: list[tuple[str, int, int]], traced: TracedAxes) -> ChannelNode | None:
    """A node of a group's ``(leaf name, axis, outer)``; None if it is none of channels."""
    lists: dict[str | None, list] = {"writer": [], "reader": [], None: []}
    fixed = next((part.fixed for part in group if part.fixed), "it is divided" if len(group) > 1 else "")
    read_whole = False
    for name, axis, outer in entries:
        role = traced.roles.get((name, axis))
        lists[role].append((name, axis, outer) if role == "reader" else (name, axis))
        read_whole |= role == "reader" and traced.axes[name, axis] == group
    # A group that nothing writes is worth telling when it is the input's channels; others are taps and positions.
    if not lists["writer"] and not (read_whole and group[0].from_input):
        return None
    return ChannelNode(_length(group), tuple(lists["writer"]), tuple(lists[None]), tuple(lists["reader"]), fixed)


def find_node(name: str, nodes: Sequence[ChannelNode]) -> ChannelNode:
    """The group of channels that a kernel writes.

    Args:
        name: the kernel's leaf name, ``"params/Conv_1/kernel"``; ``"params/"`` may be left out.
        nodes: from `channel_nodes`.

    Raises:
        ValueError: no group, or more than one, is written by that leaf.
    """
    for full in (name, f"{_PARAMS}/{name}"):
        found = [node for node in nodes if any(writer == full for writer, _ in node.writers)]
        if len(found) > 1:
            raise ValueError(f"{full!r} writes {len(found)} groups of channels: give the order for a ChannelNode")
        if found:
            return found[0]
    known = [writer for node in nodes for writer, _ in node.writers]
    raise ValueError(f"{name!r} writes no group of channels; expected the name of a kernel such as {known[:4]}")


def permute(variables: Tree, orders: Mapping[ChannelNode | str, Any], nodes: Sequence[ChannelNode]) -> Tree:
    """Reorder channels in all the leaves that know of them, so that the net computes the same function.

    Args:
        variables: the tree that `channel_nodes` saw, or one with the same leaf names and shapes; numpy or jax arrays.
        orders: ``{node or name of a kernel that writes it: order}``; an order is an int (size,) permutation, and
            channel i becomes what channel ``order[i]`` was. An order for one of several writers is for all of them.
        nodes: from `channel_nodes`.

    Returns:
        A tree with the same containers. Leaves that no order touches are the same objects.

    Raises:
        ValueError: an unknown key; an order that is no permutation; two different orders for one group; an order for
            a fixed group; a leaf that is missing or has another shape.
    """
    return _permute(variables, _orders_by_node(orders, nodes), "")


def permute_tree(
    tree: Tree, orders: Mapping[ChannelNode | str, Any], nodes: Sequence[ChannelNode], collection: str = _PARAMS
) -> Tree:
    """Reorder a tree that mirrors one collection of the variables: masks, momentum, gradients.

    Args:
        tree: leaf names are those of ``variables[collection]``, shapes too; a ``None`` leaf stays None.
        orders: as for `permute`.
        nodes: from `channel_nodes` on the variables.
        collection: the first key of the variables that the tree mirrors.

    Returns:
        A tree with the same containers.

    Raises:
        ValueError: as `permute`; no group has a leaf in the collection.
    """
    prefix = f"{collection}/"
    if not any(name.startswith(prefix) for node in nodes for name, *_ in _leaf_axes(node)):
        raise ValueError(f"collection={collection!r}: no group has a leaf in it; for all variables, use permute")
    return _permute(tree, _orders_by_node(orders, nodes), prefix)


def filter_order(mask: Any) -> np.ndarray:
    """An order of filters that puts those with the same mask next to each other.

    Args:
        mask: concrete bool (kh, kw, cin, cout).

    Returns:
        int64 (cout,), for `permute`. Groups stand in the order of their first filters, and filters in their own
        order inside a group: where all masks differ, or all are equal, the order is 0, 1, 2, ...

    Raises:
        ValueError: the mask is traced, not boolean or not 4-D.
    """
    if isinstance(mask, jax.core.Tracer):
        raise ValueError("mask is traced: the order of filters is chosen from values; call filter_order outside jit")
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != len(KERNEL_AXES):
        raise ValueError(f"mask is {mask.dtype} {mask.shape}: expected bool {KERNEL_AXES}")
    columns = np.packbits(mask.reshape(-1, mask.shape[-1]), axis=0).T
    _, first, group = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    return np.argsort(first[group.reshape(-1)], kind="stable")


def _leaf_axes(node: ChannelNode) -> list[tuple[str, int, int | None]]:
    """(name, axis, outer) of all leaves of a node; outer is None where the axis is the channels alone."""
    return [(*entry, None) for entry in (*node.writers, *node.followers)] + list(node.readers)


def _orders_by_node(
    orders: Mapping[ChannelNode | str, Any], nodes: Sequence[ChannelNode]
) -> dict[ChannelNode, np.ndarray]:
    checked: dict[ChannelNode, np.ndarray] = {}
    for key, given in orders.items():
        node = find_node(key, nodes) if isinstance(key, str) else key
        if node not in nodes:
            raise ValueError(
                f"orders: {key!r} is none of the {len(nodes)} groups; take it from nodes, or name a kernel"
            )
        label = key if isinstance(key, str) else f"the group written by {[name for name, _ in node.writers]}"
        order = np.asarray(given)
        is_order = order.dtype.kind in "iu" and order.shape == (node.size,)
        if not is_order or not np.array_equal(np.sort(order), np.arange(node.size)):
            raise ValueError(
                f"{label}: the order, {order.dtype} {order.shape}, is no permutation of 0 ... {node.size - 1}; "
                "every channel must come once"
            )
        if node.fixed:
            raise ValueError(f"{label}: its {node.size} channels must stay in order, because {node.fixed}")
        if not np.array_equal(checked.setdefault(node, order), order):
            raise ValueError(
                f"{label}: another order was given for the same channels, which {[name for name, _ in node.writers]} "
                "write together; give one"
            )
    return checked


def _permute(tree: Tree, orders: Mapping[ChannelNode, np.ndarray], prefix: str) -> Tree:
    steps: dict[str, list[tuple[int, int | None, np.ndarray]]] = {}
    for node, order in orders.items():
        for name, axis, outer in _leaf_axes(node):
            if name.startswith(prefix):
                steps.setdefault(name.removeprefix(prefix), []).append((axis, outer, order))
    missing = sorted(steps.keys() - {name for name, _ in named_leaves(tree)})
    if missing:
        raise ValueError(f"the tree has no leaf {missing[0]!r}, which holds reordered channels: pass the whole tree")

    def reorder(name: str, leaf: Any) -> Any:
        for axis, outer, order in steps.get(name, ()) if leaf is not None else ():
            shape = jnp.shape(leaf)
            block = (outer or 1) * order.size
            if len(shape) <= axis or shape[axis] % block or (outer is None and shape[axis] != block):
                raise ValueError(
                    f"{name!r} has shape {shape}; axis {axis} was expected to hold {order.size} channels: "
                    "the tree must be like the one that was traced"
                )
            places = np.arange(shape[axis]).reshape(outer or 1, order.size, -1)[:, order].reshape(-1)
            leaf = leaf[(slice(None),) * axis + (places,)]
        return leaf

    return map_named(reorder, tree)
