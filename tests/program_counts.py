"""What a compiled program does, read from its optimised text: loops, conditionals, kernels, and the bytes they move.

A loop whose trip count the compiler does not know fetches its condition to the host in every turn; so does a
conditional. A kernel is what is launched by itself: a fusion, a library call, a copy, and whatever else XLA left as it
was. What a kernel moves is what it reads and writes: a large array that it only slices counts for the slices.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

_BYTES = (
    {"pred": 1, "s4": 1, "u4": 1, "token": 0, "opaque": 0}
    | {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)}
    | {"bf16": 2, "c64": 8, "c128": 16}
)
# Neither launches anything nor moves a byte.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "add-dependency",
    "copy-done",
    "async-done",
}
_CALLS = {"call", "async-start"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_CONVOLUTION = re.compile(r"__cudnn\$conv|mosaic_gpu|clicktrain_(?!batch_norm)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: of the instruction.
        kind: its opcode; of a custom call the target.
        bytes_moved: read and written.
        is_convolution: cuDNN's, a Mosaic GPU kernel, a native one, or XLA's own.
        is_inside: whether it stands in a branch of a conditional or in an inner loop.
        source: the op name that jax gave it; empty where there is none.
    """

    name: str
    kind: str
    bytes_moved: int
    is_convolution: bool
    is_inside: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop's body, with whatever it calls; loops and branches inside count once.

    Attributes:
        trip_count: None where the compiler does not know it.
        conditionals: how many there are.
        inner_loops: how many there are.
        kernels: one a launch.
        kernels_inside: those in branches and in inner loops.
    """

    trip_count: int | None
    conditionals: int
    inner_loops: int
    kernels: tuple[Kernel, ...]
    kernels_inside: tuple[Kernel, ...]

    @property
    def bytes_beside_convolutions(self) -> int:
        """Moved by everything that is not a convolution."""
        kernels = self.kernels + self.kernels_inside
        return sum(kernel.bytes_moved for kernel in kernels if not kernel.is_convolution)

    def record(self) -> dict[str, Any]:
        """As plain data."""
        kinds = collections.Counter(kernel.kind for kernel in self.kernels)
        return {
            "trip_count": self.trip_count,
            "conditionals": self.conditionals,
            "inner_loops": self.inner_loops,
            "kernels": len(self.kernels),
            "kernels_in_branches_and_inner_loops": len(self.kernels_inside),
            "convolutions": sum(kernel.is_convolution for kernel in self.kernels),
            "bytes_beside_convolutions": self.bytes_beside_convolutions,
            "kinds": dict(kinds.most_common()),
        }


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(
            _BYTES.get(kind, 4) * math.prod(map(int, filter(None, lengths.split(","))))
            for kind, lengths in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", self.type)
        )

    def named(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found and found[1]


def epoch_loop(hlo: str) -> Loop:
    """The loop with the most kernels that the entry computation runs.

    Args:
        hlo: ``jax.stages.Compiled.as_text()``, of any backend.

    Raises:
        ValueError: there is no loop.
    """
    computations = _parse(hlo)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)[1]
    loops = [
        _loop(computations, instruction)
        for instruction, _ in _reached(computations, entry, into_loops=False)
        if instruction.opcode == "while"
    ]
    if not loops:
        raise ValueError("the program's entry runs no loop: give the text of a compiled epoch")
    return max(loops, key=lambda loop: len(loop.kernels))


def _loop(computations: dict[str, dict[str, _Instruction]], loop: _Instruction) -> Loop:
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    inside = list(_reached(computations, loop.named("body"), into_loops=True))
    opcodes = collections.Counter(instruction.opcode for instruction, _ in inside)
    kernels = [kernel for instruction, is_inside in inside for kernel in _kernel(computations, instruction, is_inside)]
    return Loop(
        None if trips is None else int(trips[1]),
        opcodes["conditional"],
        opcodes["while"],
        tuple(kernel for kernel in kernels if not kernel.is_inside),
        tuple(kernel for kernel in kernels if kernel.is_inside),
    )


def _reached(
    computations: dict[str, dict[str, _Instruction]], name: str, *, into_loops: bool, is_inside: bool = False
) -> Iterator[tuple[_Instruction, bool]]:
    for instruction in computations[name].values():
        yield instruction, is_inside
        inner = []
        if instruction.opcode in _CALLS:
            inner = [instruction.named("to_apply") or instruction.named("calls")]
        elif instruction.opcode == "conditional":
            inner = [instruction.named("true_computation"), instruction.named("false_computation")]
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            inner += re.findall(r"[\w.\-]+", branches[1]) if branches else []
        elif instruction.opcode == "while" and into_loops:
            inner = [instruction.named("body")]
        for each in filter(None, inner):
            deeper = is_inside or instruction.opcode not in _CALLS
            yield from _reached(computations, each, into_loops=into_loops, is_inside=deeper)


def _kernel(
    computations: dict[str, dict[str, _Instruction]], instruction: _Instruction, is_inside: bool
) -> Iterator[Kernel]:
    if instruction.opcode in _FREE | _CALLS | {"while", "conditional"}:
        return
    kind, place = instruction.opcode, computations[_home(computations, instruction)]
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    if target is not None:
        kind = target[1]
        if kind == "AllocateBuffer":
            return
    fused = instruction.named("calls") if instruction.opcode == "fusion" else None
    inside = list(computations[fused].values()) if fused else [instruction]
    read = sum(
        _read_of(inside, number, place[operand].size) if fused else place[operand].size
        for number, operand in enumerate(instruction.operands)
    )
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    is_convolution = bool(_CONVOLUTION.search(kind)) or any(each.opcode == "convolution" for each in inside)
    written = _written(inside, instruction.size) if fused else instruction.size
    yield Kernel(instruction.name, kind, read + written, is_convolution, is_inside, source[1] if source else "")


def _home(computations: dict[str, dict[str, _Instruction]], instruction: _Instruction) -> str:
    return next(name for name, inside in computations.items() if inside.get(instruction.name) is instruction)


def _read_of(inside: list[_Instruction], number: int, size: int) -> int:
    """Bytes that a fusion reads of its operand: only what it slices, where it does nothing else with it."""
    names = {each.name for each in inside if each.opcode == "parameter" and each.operands == (str(number),)}
    read = 0
    for each in inside:  # users stand after what they use
        if not names & set(each.operands):
            continue
        if each.opcode == "bitcast":
            names.add(each.name)
        elif each.opcode in _SLICES and each.operands[0] in names:
            read += each.size
        elif not (each.opcode == "dynamic-update-slice" and each.operands[0] in names):
            return size
    return min(read, size)


def _written(inside: list[_Instruction], size: int) -> int:
    """Bytes that a fusion writes: of arrays that are updated in place only what is new."""
    by_name = {each.name: each for each in inside}
    return size - sum(
        each.size - by_name[each.operands[1]].size for each in inside if each.opcode == "dynamic-update-slice"
    )


def _parse(hlo: str) -> dict[str, dict[str, _Instruction]]:
    """Instructions by name by computation."""
    computations: dict[str, dict[str, _Instruction]] = {}
    inside: dict[str, _Instruction] | None = None
    for line in hlo.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head is not None:
            inside = computations[head[1]] = {}
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)):
            kind, rest = _split_type(found[2])
            opcode, _, rest = rest.partition("(")
            operands, rest = _split_operands(rest)
            inside[found[1]] = _Instruction(found[1], kind, opcode.strip(), operands, rest)
    return computations


def _split_type(text: str) -> tuple[str, str]:
    """``"(f32[2], s32[]) tuple(...)"`` -> the type and what follows it."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: place + 1], text[place + 2 :]
    raise ValueError(f"this is no instruction of HLO text: {text[:80]}")


def _split_operands(text: str) -> tuple[tuple[str, ...], str]:
    """What stands before the closing parenthesis, and what follows it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if not depth:
            inner = text[:place]
            names = re.findall(r"%([\w.\-]+)", inner)
            return tuple(names or filter(None, [inner.strip()])), text[place + 1 :]
    return (), text
