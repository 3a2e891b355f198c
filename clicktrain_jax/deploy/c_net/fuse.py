"""Steps on single entries taken into the step before: biases, ReLU, sums of maps, and what is done to 8-bit pixels."""

import collections

import numpy as np

from clicktrain_jax.deploy.c_net.nodes import Convolution, Entrywise, Graph, Input, Node, Op, Pool


def fuse(graph: Graph) -> Graph:
    """The same net with fewer nodes; those that nothing depends on are left out.

    Args:
        graph: as read; its nodes are changed.
    """
    uses = collections.Counter(source for node in graph.nodes for source in node.inputs)
    uses[graph.output] += 1
    became: dict[Node, Node] = {}
    position = {node: index for index, node in enumerate(graph.nodes)}
    kept: list[Node] = []
    for node in graph.nodes:
        node.inputs = [became.get(source, source) for source in node.inputs]
        taken = _take(node, uses, position) if isinstance(node, Entrywise) else None
        if taken is None:
            kept.append(node)
        else:
            became[node] = taken
            uses[taken] = uses[node]
    output = became.get(graph.output, graph.output)
    return Graph(_needed(kept, output), output, graph.where)


def _take(node: Entrywise, uses: collections.Counter, position: dict[Node, int]) -> Node | None:
    """The node before, if it took the steps of this one."""
    if len(node.inputs) == 2:
        return _take_sum(node, uses, position)
    (source,) = node.inputs
    if uses[source] != 1:
        return None
    if isinstance(source, Input) and source.table is not None and all(np.ndim(op.operand) < 2 for op in node.ops):
        for op in node.ops:
            source.table = op(source.table)
        return source
    if isinstance(source, Convolution):
        return source if all(_into_convolution(source, op) for op in node.ops) else None
    if isinstance(source, Pool) or (isinstance(source, Entrywise) and len(source.inputs) == 1):
        source.ops += node.ops
        return source
    return None


def _into_convolution(source: Convolution, op: Op) -> bool:
    if op.operand is None or np.ndim(op.operand) > 1:
        return False
    if not source.ops and op.name in ("add", "sub"):
        # Linear so far: bias + operand, bias - operand, or operand - (all of it), which changes the kernel's sign.
        if op.name == "sub" and not op.is_first:
            source.kernel, source.bias = -source.kernel, op.operand - source.bias
        else:
            source.bias = source.bias + (op.operand if op.name == "add" else -op.operand)
        return True
    if op.name in ("max", "min") and not np.ndim(op.operand):
        source.ops.append(op)
        return True
    return False


def _take_sum(node: Entrywise, uses: collections.Counter, position: dict[Node, int]) -> Node | None:
    (op,) = node.ops
    if op.name != "add" or node.inputs[0].shape != node.inputs[1].shape:
        return None
    # The later of the two: the other map is there when it is computed.
    later = max(node.inputs, key=position.__getitem__)
    other = node.inputs[0] if later is node.inputs[1] else node.inputs[1]
    if not isinstance(later, Convolution) or len(later.inputs) == 2 or uses[later] != 1 or other is later:
        return None
    later.inputs.append(other)
    later.ops.append(op)
    return later


def _needed(nodes: list[Node], output: Node) -> list[Node]:
    needed = {output, nodes[0]}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.inputs)
    return [node for node in nodes if node in needed]
