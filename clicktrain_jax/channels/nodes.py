"""Channels: who writes, follows and reads them.

The channels between two layers have no natural order: the filters of a convolution, the BatchNorm behind it and the
input channels of the next convolution may be reordered alike, and the net computes the same function. Such groups of
axes are what pruning whole channels needs. They are found by tracing the net (`clicktrain_jax.channels.axes`), not from
layer names.

    nodes = channel_nodes(lambda variables, x: model.apply(variables, x, train=False), variables, (32, 32, 3))
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clicktrain_jax.channels.axes import Part, TracedAxes, trace_axes
from clicktrain_jax.trees import Tree

_PARAMS = "params"
_Parts = tuple[Part, ...]  # at least one


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

    A divided axis (by a group norm, by heads) makes one node whose order stays.
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
    if not lists["writer"] and not (read_whole and next(iter(group)).from_input):
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
            raise ValueError(f"{full!r} writes {len(found)} groups of channels: it names none of them")
        if found:
            return found[0]
    known = [writer for node in nodes for writer, _ in node.writers]
    raise ValueError(f"{name!r} writes no group of channels; expected the name of a kernel such as {known[:4]}")
