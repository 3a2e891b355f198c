"""What a net is made of, between jax's equations and C: maps of one image, and steps from maps to a map."""

import dataclasses
from typing import Any

import numpy as np

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Op:
    """One step that is applied to each entry of a map.

    Attributes:
        name: one of `OPS`.
        operand: float32: one number (), one for each channel (channels,) or one for each entry (height, width,
            channels); None for a step of one operand; "map" where it is the second map of the node.
        is_first: whether the map is the first operand.
    """

    name: str
    operand: Any = None
    is_first: bool = True

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Computes it on float32 (..., channels)."""
        if self.operand is None:
            return _UNARY[self.name][0](x).astype(np.float32)
        left, right = (x, self.operand) if self.is_first else (self.operand, x)
        return _BINARY[self.name][0](left, right).astype(np.float32)

    def statement(self, operand: str) -> str:
        """The C statement that applies it to the variable ``t``."""
        if self.operand is None:
            return f"t = {_UNARY[self.name][1]};"
        left, right = ("t", operand) if self.is_first else (operand, "t")
        return f"t = {_BINARY[self.name][1].format(left, right)};"


_UNARY = {
    "neg": (np.negative, "-t"),
    "exp": (np.exp, "expf(t)"),
    "log": (np.log, "logf(t)"),
    "log1p": (np.log1p, "log1pf(t)"),
    "expm1": (np.expm1, "expm1f(t)"),
    "tanh": (np.tanh, "tanhf(t)"),
    "logistic": (lambda x: 1 / (1 + np.exp(-x)), "1.0f / (1.0f + expf(-t))"),
    "sqrt": (np.sqrt, "sqrtf(t)"),
    "rsqrt": (lambda x: 1 / np.sqrt(x), "1.0f / sqrtf(t)"),
    "abs": (np.abs, "fabsf(t)"),
    "square": (np.square, "t * t"),
    "cube": (lambda x: x * x * x, "t * t * t"),
}
_BINARY = {
    "add": (np.add, "{} + {}"),
    "sub": (np.subtract, "{} - {}"),
    "mul": (np.multiply, "{} * {}"),
    "div": (np.divide, "{} / {}"),
    "max": (np.maximum, "fmaxf({}, {})"),
    "min": (np.minimum, "fminf({}, {})"),
    "pow": (np.power, "powf({}, {})"),
}
UNARY, BINARY = frozenset(_UNARY), frozenset(_BINARY)


@dataclasses.dataclass(eq=False)
class Node:
    """A map of one image and the step that makes it.

    Attributes:
        shape: (height, width, channels).
        inputs: the maps that it is made of.
        ops: applied to each entry of the result, in order; of a convolution only "add" with its second map, "max" and
            "min" with one number.
    """

    shape: Shape
    inputs: list["Node"]
    ops: list[Op] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Input(Node):
    """The image.

    Attributes:
        table: float32 (256, channels), what each value of an 8-bit pixel stands for; None for floating images.
    """

    table: np.ndarray | None = None


@dataclasses.dataclass(eq=False, kw_only=True)
class Convolution(Node):
    """A convolution; a dense layer is one whose window is the whole map.

    Attributes:
        name: of its kernel, for messages and comments.
        kernel: float32 (kh, kw, cin, cout).
        mask: bool, of the kernel's shape: what is retained.
        bias: float32 (cout,).
        strides: (rows, columns).
        padding: (above, left); what lies outside is zero.
    """

    name: str = ""
    kernel: np.ndarray
    mask: np.ndarray
    bias: np.ndarray
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


@dataclasses.dataclass(eq=False)
class Pool(Node):
    """The largest entry or the sum of each window of each channel.

    Attributes:
        kind: "max", "min" or "sum".
        window: (rows, columns).
        strides: (rows, columns).
        padding: (above, left); what lies outside is left out.
    """

    kind: str = "max"
    window: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


@dataclasses.dataclass(eq=False)
class Total(Node):
    """The largest entry or the sum of all entries of a map: (1, 1, 1).

    Attributes:
        kind: "max", "min" or "sum".
    """

    kind: str = "sum"


@dataclasses.dataclass(eq=False)
class Entrywise(Node):
    """Steps that are applied to each entry, all in ``ops``; the second of two maps is of its shape or (1, 1, 1)."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Gather(Node):
    """Entries of another map in another place.

    Attributes:
        where: int (height, width, channels): the place of each entry in the other map, counted row by row with
            channels last; -1 for zero.
    """

    where: np.ndarray


@dataclasses.dataclass(frozen=True)
class Graph:
    """A net.

    Attributes:
        nodes: in the order in which they can be computed; the first is the `Input`.
        output: the node that holds the logits.
        where: int (classes,): the place of each logit in it, as for `Gather`.
    """

    nodes: list[Node]
    output: Node
    where: np.ndarray
