"""The text of ``net.c``, collected piece by piece."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from clicktrain_jax.deploy.c_net.layouts import VECTOR, round_up

_A_LINE = 12
# How many floats before they are needed weights are fetched; as in runtime.c.
AHEAD = 1024


@dataclasses.dataclass
class Source:
    """Functions, tables and weights.

    Attributes:
        parts: of the file, in order.
        body: statements of the function that runs the net.
        kinds: of each table, the C type of its entries.
    """

    parts: list[str] = dataclasses.field(default_factory=list)
    body: list[str] = dataclasses.field(default_factory=list)
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    _weights: list[np.ndarray] = dataclasses.field(default_factory=list)
    _floats: int = 0
    _tables: dict[tuple[str, tuple[int, ...]], str] = dataclasses.field(default_factory=dict)
    _functions: dict[str, str] = dataclasses.field(default_factory=dict)

    def weights(self, values: np.ndarray) -> str:
        """Keep weights; returns the C expression of where they begin, at a multiple of a vector."""
        begin = self._floats
        values = np.ascontiguousarray(values, np.float32).reshape(-1)
        room = round_up(len(values), VECTOR)
        self._weights.append(np.pad(values, (0, room - len(values))))
        self._floats += room
        return f"(NET_WEIGHTS + {begin})"

    def all_weights(self) -> np.ndarray:
        """float32, all that was kept, and zeros: weights are fetched before they are needed, past the end too."""
        return np.concatenate([*self._weights, np.zeros(AHEAD, np.float32)])

    def table(self, name: str, values: Iterable[int], kind: str | None = None) -> str:
        """A constant array of integers; those of equal contents are one."""
        values = tuple(int(value) for value in values) or (0,)
        kind = kind or ("uint16_t" if 0 <= min(values) and max(values) < 1 << 16 else "int32_t")
        if (kind, values) not in self._tables:
            self._tables[kind, values], self.kinds[name] = name, kind
            self.parts.append(f"static const {kind} {name}[{len(values)}] = {{\n{lines(map(str, values))}}};\n")
        return self._tables[kind, values]

    def function(self, name: str, text: str) -> str:
        """A function of the file; of equal texts only the first is written. ``NAME`` in the text is its name."""
        if text not in self._functions:
            self._functions[text] = name
            self.parts.append(text.replace("NAME", name))
        return self._functions[text]


def lines(words: Iterable[str]) -> str:
    """Words with commas, a few a line."""
    words = list(words)
    rows = (words[begin : begin + _A_LINE] for begin in range(0, len(words), _A_LINE))
    return "".join(f"  {', '.join(row)},\n" for row in rows)


def number(value: Any) -> str:
    """A float32 as C has it, to the bit."""
    value = float(np.float32(value))
    if np.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    if np.isnan(value):
        return "NAN"
    text = value.hex()
    return f"({text}f)" if value < 0 else f"{text}f"


def at(name: str, offset: int) -> str:
    """A pointer so many floats on."""
    return f"{name} + {offset}" if offset >= 0 else f"{name} - {-offset}"


def finish(vector: int, variable: str, ops: Sequence[Any], other: str) -> str:
    """Statements that apply a convolution's steps to a vector; ``other`` is where the second map's stands."""
    text = []
    for op in ops:
        operand = f"load{vector}({other})" if op.name == "add" else f"splat{vector}({number(op.operand)})"
        text.append(f"{variable} = {op.name}{vector}({variable}, {operand});")
    return " ".join(text)
