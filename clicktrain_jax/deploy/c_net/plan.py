"""The program of a net: each step, the layouts between them, and where everything is in the workspace."""

import collections
import dataclasses
import math

from clicktrain_jax.deploy.c_net import forms
from clicktrain_jax.deploy.c_net.layouts import NO_MARGIN, VECTOR, Buffer, Lanes, Margin, Rows, Step, allocate, round_up
from clicktrain_jax.deploy.c_net.nodes import Convolution, Entrywise, Gather, Graph, Input, Node, Pool, Total


@dataclasses.dataclass(frozen=True)
class Program:
    """A net as a list of steps.

    Attributes:
        graph: that it computes.
        steps: in order.
        output: holds the logits.
        workspace: floats.
    """

    graph: Graph
    steps: list[Step]
    output: Buffer
    workspace: int


# What a change of layout costs for each number, in vector products.
_CONVERSION = 2.5

Forms = dict[Node, "forms.Tiles | forms.LaneForm"]


def plan(graph: Graph) -> Program:
    """Choose a form for each convolution and a layout for each map.

    Args:
        graph: fused.
    """
    found = {node: forms.candidates(node) for node in graph.nodes if isinstance(node, Convolution)}
    work: dict[tuple[Node, object], float] = {(node, form): cost for node, each in found.items() for form, cost in each}
    chosen: Forms = {node: min(each, key=lambda pair: pair[1])[0] for node, each in found.items()}

    def cost(chosen: Forms) -> float:
        steps = _Planner(graph, chosen).steps()
        moved = sum(math.prod(step.node.shape) for step in steps if step.kind in ("to_lanes", "to_rows"))
        return sum(work[pair] for pair in chosen.items()) + _CONVERSION * moved

    # One that would be slower by itself may save a change of layout.
    least = cost(chosen)
    for node, each in found.items():
        for form, _ in each:
            other = {**chosen, node: form}
            if form != chosen[node] and (now := cost(other)) < least:
                chosen, least = other, now
    return _Planner(graph, chosen).run()


class _Planner:
    def __init__(self, graph: Graph, chosen: Forms) -> None:
        self._graph, self._forms = graph, chosen
        self._users: dict[Node, list[Node]] = collections.defaultdict(list)
        for node in graph.nodes:
            for source in node.inputs:
                self._users[source].append(node)
        self._own: dict[Node, Rows | Lanes] = {}
        for node in graph.nodes:
            self._own[node] = self._layout(node)
        # What each map is wanted in, with the widest margin of all that read it so.
        self._wanted: dict[Node, dict[Rows | Lanes, Margin]] = collections.defaultdict(dict)
        self._buffers: dict[tuple[Node, Rows | Lanes], Buffer] = {}
        self._steps: list[Step] = []

    def run(self) -> Program:
        steps = self.steps()
        last = self._buffers[self._graph.output, self._last]
        return Program(self._graph, steps, last, allocate(steps, last))

    def steps(self) -> list[Step]:
        """The steps; buffers have no place yet."""
        for node in self._graph.nodes:
            for place, source in enumerate(node.inputs):
                self._want(source, *self._reads(node, place))
        self._want(self._graph.output, self._last, NO_MARGIN)
        for node in self._graph.nodes:
            self._compute(node)
        return self._steps

    @property
    def _last(self) -> Rows:
        """The layout that the logits are read in."""
        own = self._own[self._graph.output]
        return own if isinstance(own, Rows) else _rows(self._graph.output)

    def _layout(self, node: Node) -> Rows | Lanes:
        form = self._forms.get(node)
        if isinstance(form, forms.LaneForm):
            return form.target
        if isinstance(node, Pool):
            return self._pooled(node) or _rows(node)
        return _rows(node)

    def _pooled(self, node: Pool) -> Lanes | None:
        """Piece by piece, where windows do not overlap pieces and all that read the result want it so."""
        source = self._own[node.inputs[0]]
        if not isinstance(source, Lanes) or node.window != node.strides or any(node.padding) or node.ops:
            return None
        (height, width), (rows, columns) = source.piece, node.strides
        if height % rows or width % columns:
            return None
        result = Lanes(source.grid, (height // rows, width // columns))
        wanted = [self._forms.get(user) for user in self._users[node]]
        return result if all(isinstance(f, forms.LaneForm) and f.source == result for f in wanted) else None

    def _reads(self, node: Node, place: int) -> tuple[Rows | Lanes, Margin]:
        """The layout in which a node reads its input, and the margin."""
        source, form = node.inputs[place], self._forms.get(node)
        if isinstance(node, Convolution):
            if isinstance(form, forms.LaneForm):
                return (form.source, form.margin(node)) if place == 0 else (form.target, NO_MARGIN)
            if place == 1:
                return Rows(round_up(source.shape[2], VECTOR)), NO_MARGIN
            return _rows(source), forms.margin_of(node, node.shape[:2], source.shape[:2])
        if isinstance(node, Pool) and isinstance(self._own[node], Lanes):
            return self._own[source], NO_MARGIN
        return _rows(source), NO_MARGIN

    def _want(self, node: Node, layout: Rows | Lanes, margin: Margin) -> None:
        wanted = self._wanted[node]
        above, below, left, right = map(max, wanted.get(layout, NO_MARGIN), margin)
        wanted[layout] = above, below, left, right
        own = self._own[node]
        if isinstance(node, Input) or layout == own:
            return
        wanted.setdefault(own, NO_MARGIN)
        if isinstance(layout, Lanes) and isinstance(own, Lanes):
            wanted.setdefault(_rows(node), NO_MARGIN)

    def _compute(self, node: Node) -> None:
        wanted, own = self._wanted[node], self._own[node]
        if isinstance(node, Input):
            for layout in wanted:
                self._step("input", node, (), layout)
            return
        sources = tuple(self._buffers[source, self._reads(node, place)[0]] for place, source in enumerate(node.inputs))
        self._step(self._kind(node), node, sources, own)
        for layout in sorted(wanted, key=lambda layout: isinstance(layout, Lanes)):
            if (node, layout) in self._buffers:
                continue
            if isinstance(layout, Rows):
                source = self._buffers[node, own]
                self._step("to_rows" if isinstance(own, Lanes) else "gather", node, (source,), layout)
            else:
                source = self._buffers[node, own if isinstance(own, Rows) else _rows(node)]
                self._step("to_lanes", node, (source,), layout)

    def _kind(self, node: Node) -> str:
        if isinstance(node, Convolution):
            return "lanes" if isinstance(self._forms[node], forms.LaneForm) else "tiles"
        if isinstance(node, Pool):
            return "lane_pool" if isinstance(self._own[node], Lanes) else "pool"
        return {Entrywise: "entrywise", Gather: "gather", Total: "total"}[type(node)]

    def _step(self, kind: str, node: Node, sources: tuple[Buffer, ...], layout: Rows | Lanes) -> None:
        target = Buffer(node.shape, layout, self._wanted[node][layout])
        self._buffers[node, layout] = target
        self._steps.append(Step(kind, node, sources, target, self._forms.get(node)))


def _rows(node: Node) -> Rows:
    """Pixel by pixel; the image as it comes, all others in whole vectors."""
    return Rows(node.shape[2] if isinstance(node, Input) else round_up(node.shape[2], VECTOR))
