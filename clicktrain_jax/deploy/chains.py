"""Which steps of a folded net run in one call of the native kernels, one layer after the other.

A run of steps that stand side by side becomes one: convolutions that the native kernels do, pools, sums of maps, dense
layers behind them, what rescales or rectifies a result that nothing else reads, and reshapes that move nothing. It may
read several values from before it and gives one.
"""

import collections
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from clicktrain_jax.deploy import layers
from clicktrain_jax.deploy.steps import ConvStep, OtherStep, Steps

_NHWC = (0, 3, 1, 2)  # where jax has batch, channels, rows and columns
_POOLS: dict[str, Literal["max", "sum"]] = {
    "reduce_window_max": "max",
    "reduce_window_sum": "sum",
    "reduce_max": "max",
    "reduce_sum": "sum",
}
# One alone runs as well without.
_LEAST_CONVOLUTIONS = 2


@dataclasses.dataclass(frozen=True)
class Chained:
    """A run of steps, in the place of an equation.

    Attributes:
        steps: as `pallas_kernels.chain.chain` takes them.
        inputs: how many of the operands are images; behind them are the arrays.
        outvars: the value that it gives.
    """

    steps: tuple[Any, ...]
    inputs: int
    outvars: tuple[Any]

    def __call__(self, operands: Sequence[Any]) -> list[jax.Array]:
        """The result, of images and arrays."""
        from pallas_kernels import chain

        images = [x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1) for x in operands[: self.inputs]]
        y = chain.chain(images, self.steps, [array.reshape(-1) for array in operands[self.inputs :]])
        return [y.reshape(len(y), *self.outvars[0].aval.shape[1:])]


def chained(steps: Steps, sites: Mapping[str, Any]) -> tuple[Steps, dict[str, tuple[str, Any]]]:
    """The same steps with runs of them in one.

    Args:
        steps: of a folded net.
        sites: how its convolutions run, by name: `clicktrain_jax.deploy.inference.Site`.

    Returns:
        The steps, `Chained` for equations among them, and what of arrays is new: ``{name: (array, structure)}``, a
        dense layer's weights (inputs, outputs) that are to be packed for a structure.
    """
    return _Reader(steps, sites).run()


class _RefusedError(Exception):
    """A step that is none of a chain."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of a chain: the step that makes it, or -1 - n for input n; its shape in the net without the batch."""

    index: int
    shape: tuple[int, ...]


@dataclasses.dataclass
class _Run:
    """What was read of a run; steps count values as `_Value` does."""

    inputs: list[Any] = dataclasses.field(default_factory=list)
    input_shapes: list[Any] = dataclasses.field(default_factory=list)
    steps: list[Any] = dataclasses.field(default_factory=list)
    shapes: list[Any] = dataclasses.field(default_factory=list)
    arrays: list[str] = dataclasses.field(default_factory=list)
    values: dict[Any, _Value] = dataclasses.field(default_factory=dict)
    convolutions: int = 0

    def copy(self) -> "_Run":
        fields: dict[str, Any] = {key: copy.copy(value) for key, value in vars(self).items()}
        return _Run(**fields)

    def shape(self, index: int) -> Any:
        return self.shapes[index] if index >= 0 else self.input_shapes[-1 - index]

    def array(self, name: str) -> int:
        if name not in self.arrays:
            self.arrays.append(name)
        return self.arrays.index(name)

    def add(self, step: Any, result: Any) -> None:
        from pallas_kernels import chain

        # As the shapes are told by place: the step's own, one after the other.
        read = _values(step)
        own = dataclasses.replace(step, **{name: place for place, name in enumerate(read)})
        self.shapes.append(chain.shape_after(own, [self.shape(index) for index in read.values()]))
        self.steps.append(step)
        self.values[result] = _Value(len(self.steps) - 1, tuple(result.aval.shape[1:]))

    def change(self, value: _Value, result: Any, **fields: Any) -> None:
        self.steps[value.index] = dataclasses.replace(self.steps[value.index], **fields)
        self.values[result] = _Value(value.index, tuple(result.aval.shape[1:]))

    def numbered(self) -> tuple[Any, ...]:
        """The steps, counted as `chain.chain` does: inputs first."""

        def number(index: int) -> int:
            return index + len(self.inputs) if index >= 0 else -1 - index

        return tuple(
            dataclasses.replace(step, **{name: number(index) for name, index in _values(step).items()})
            for step in self.steps
        )


class _Reader:
    def __init__(self, steps: Steps, sites: Mapping[str, Any]) -> None:
        self._steps, self._sites = steps, sites
        self._batch = steps.input.aval.shape[0]
        self._uses = collections.Counter(var for step in steps.steps for var in _reads(step))
        if steps.output[0] == "value":
            self._uses[steps.output[1]] += 1
        self._packed: dict[str, tuple[str, Any]] = {}

    def run(self) -> tuple[Steps, dict[str, tuple[str, Any]]]:
        steps, found, at = self._steps.steps, [], 0
        while at < len(steps):
            count, run = self._longest(at)
            if run is None:
                found.append(steps[at])
                at += 1
                continue
            at += count
            result = next(var for var, value in reversed(run.values.items()) if value.index == len(run.steps) - 1)
            chained = Chained(run.numbered(), len(run.inputs), (result,))
            operands = [("value", var) for var in run.inputs] + [("array", name) for name in run.arrays]
            found.append(OtherStep(chained, tuple(operands)))
        used = {name for step in found if _is_chained(step) for kind, name in step.operands if kind == "array"}
        packed = {name: what for name, what in self._packed.items() if name in used}
        return dataclasses.replace(self._steps, steps=tuple(found)), packed

    def _longest(self, at: int) -> tuple[int, _Run | None]:
        """The longest run from a step on that gives one value, and how many steps it is."""
        best: tuple[int, _Run | None] = (0, None)
        run, inside = _Run(), collections.Counter()
        for count, step in enumerate(self._steps.steps[at:], 1):
            run = run.copy()
            try:
                self._read(run, step)
            except (_RefusedError, ValueError):
                break
            inside.update(_reads(step))
            live = [var for var in run.values if self._uses[var] > inside[var] and run.values[var].index >= 0]
            is_one = len(live) == 1 and run.values[live[0]].index == len(run.steps) - 1
            if is_one and run.convolutions >= _LEAST_CONVOLUTIONS:
                best = count, run
        return best

    def _read(self, run: _Run, step: Any) -> None:
        if isinstance(step, ConvStep):
            return self._convolution(run, step)
        equation = step.equation
        if [var.aval.dtype for var in equation.outvars] != [np.float32]:
            raise _RefusedError
        result, name = equation.outvars[0], equation.primitive.name
        if name in _POOLS:
            return self._pool(run, equation, self._value(run, step.operands[0]))
        if name in ("reshape", "squeeze", "expand_dims"):
            value, shape = self._value(run, step.operands[0], alone=True), result.aval.shape
            if (
                len(shape) not in (2, 4)
                or shape[0] != self._batch
                or equation.params.get("dimensions")
                and name == "reshape"
            ):
                raise _RefusedError
            run.values[result] = _Value(value.index, tuple(shape[1:]))
            return None
        if name == "dot_general":
            return self._dense(run, step)
        if len(step.operands) != 2:
            raise _RefusedError
        return self._entrywise(run, step, name)

    def _value(self, run: _Run, operand: tuple[str, Any], alone: bool = False) -> _Value:
        """A value that a step reads; ``alone``: that a step makes and nothing else reads."""
        kind, var = operand
        if kind != "value":
            raise _RefusedError
        if alone and (self._uses[var] != 1 or var not in run.values or run.values[var].index < 0):
            raise _RefusedError
        if var not in run.values:
            shape = tuple(var.aval.shape)
            if var.aval.dtype != np.float32 or len(shape) not in (2, 4) or shape[0] != self._batch:
                raise _RefusedError
            run.inputs.append(var)
            run.input_shapes.append(shape[1:] if len(shape) == 4 else (1, 1, shape[1]))
            run.values[var] = _Value(-len(run.inputs), shape[1:])
        return run.values[var]

    def _map(self, run: _Run, operand: tuple[str, Any]) -> _Value:
        """A value that the chain has in the shape that the net has it in."""
        value = self._value(run, operand)
        if value.shape != run.shape(value.index):
            raise _RefusedError
        return value

    def _convolution(self, run: _Run, step: ConvStep) -> None:
        from pallas_kernels import chain

        site, params = self._sites[step.name], step.equation.params
        numbers = params["dimension_numbers"]
        dtypes = {step.dtype, step.images.aval.dtype}
        if site.layer is None or site.plan.backend != "cpu" or dtypes != {np.dtype(np.float32)}:
            raise _RefusedError
        if tuple(numbers.lhs_spec) != _NHWC or tuple(numbers.out_spec) != _NHWC:
            raise _RefusedError
        value = self._map(run, ("value", step.images))
        (top, bottom), (left, right) = params["padding"]
        is_dense = site.plan.run == "dense"
        conv = chain.Conv(
            value.index,
            run.array(step.name),
            layers.everything(site.layer.mask.shape) if is_dense else site.structure,
            tuple(params["window_strides"]),
            ((top, bottom), (left, right)),
            None if step.bias is None else run.array(step.bias),
            step.relu,
        )
        run.add(conv, step.result)
        run.convolutions += 1

    def _pool(self, run: _Run, equation: Any, value: _Value) -> None:
        from pallas_kernels import chain

        kind, params = _POOLS[equation.primitive.name], equation.params
        height, width, _ = shape = run.shape(value.index)
        if value.shape != shape:
            raise _RefusedError
        if "window_dimensions" not in params:
            if tuple(params["axes"]) != (1, 2):
                raise _RefusedError
            return run.add(chain.Pool(value.index, kind, (height, width), (1, 1)), equation.outvars[0])
        window, strides, padding = (params[key] for key in ("window_dimensions", "window_strides", "padding"))
        dilations = (*params["base_dilation"], *params["window_dilation"])
        others = (window[0], window[3], strides[0], strides[3], *dilations)
        if any(number != 1 for number in others) or any((*padding[0], *padding[3])):
            raise _RefusedError
        (top, bottom), (left, right) = padding[1:3]
        place = (tuple(window[1:3]), tuple(strides[1:3]), ((top, bottom), (left, right)))
        pool = chain.Pool(value.index, kind, *place)
        return run.add(pool, equation.outvars[0])

    def _dense(self, run: _Run, step: OtherStep) -> None:
        """A matrix product with weights: a convolution whose window is the whole map."""
        from pallas_kernels import chain

        (kind, name), weights = step.operands[1], step.equation.invars[1].aval
        value = self._value(run, step.operands[0])
        numbers = step.equation.params["dimension_numbers"]
        if kind != "array" or len(value.shape) != 1 or weights.ndim != 2 or weights.dtype != np.float32:
            raise _RefusedError
        if tuple(map(tuple, numbers[0])) != ((1,), (0,)) or any(numbers[1]):
            raise _RefusedError
        structure = layers.everything((*run.shape(value.index), weights.shape[1]))
        packed = f"{name} packed for {structure.shape[:3]}"
        self._packed[packed] = (name, structure)
        run.add(chain.Conv(value.index, run.array(packed), structure), step.equation.outvars[0])

    def _entrywise(self, run: _Run, step: OtherStep, name: str) -> None:
        from pallas_kernels import chain

        first, second = step.operands
        result = step.equation.outvars[0]
        if first[0] == second[0] == "value":
            a, b = self._value(run, first), self._value(run, second)
            if name != "add" or a.shape != b.shape:
                raise _RefusedError
            return self._sum(run, (a, first[1]), (b, second[1]), result)
        is_first = first[0] == "value"
        value = self._value(run, first if is_first else second, alone=True)
        kind, other = second if is_first else first
        made = run.steps[value.index]
        number = float(other) if kind == "literal" and np.ndim(other) == 0 else None
        if name == "max" and number == 0.0:
            return run.change(value, result, relu=True)
        if made.relu:
            raise _RefusedError
        if (
            isinstance(made, chain.Pool)
            and made.kind == "sum"
            and number
            and (name == "mul" or (name == "div" and is_first))
        ):
            return run.change(value, result, factor=made.factor * (number if name == "mul" else 1 / number))
        atom = step.equation.invars[1 if is_first else 0].aval
        filters = value.shape[-1]
        is_bias = kind == "array" and name == "add" and atom.dtype == np.float32 and atom.size == filters
        is_bare = isinstance(made, chain.Conv) and made.bias is None and made.second is None
        if is_bias and is_bare and atom.shape[-1:] == (filters,):
            return run.change(value, result, bias=run.array(other))
        raise _RefusedError

    def _sum(self, run: _Run, one: tuple[_Value, Any], other: tuple[_Value, Any], result: Any) -> None:
        """The later of two values is a convolution's as a rule, which then adds the earlier one."""
        from pallas_kernels import chain

        (before, _), (value, var) = sorted((one, other), key=lambda each: each[0].index)
        made = run.steps[value.index] if value.index >= 0 else None
        is_bare = isinstance(made, chain.Conv) and made.second is None and not made.relu
        is_alone = before.index < value.index and self._uses[var] == 1
        if is_bare and is_alone and run.shape(before.index) == run.shape(value.index):
            run.change(value, result, second=before.index)
        else:
            run.add(chain.Sum(one[0].index, other[0].index), result)


def _values(step: Any) -> dict[str, int]:
    """Which values a step reads, by the names of its fields."""
    return {name: index for name in ("source", "second") if (index := getattr(step, name, None)) is not None}


def _is_chained(step: Any) -> bool:
    return isinstance(step, OtherStep) and isinstance(step.equation, Chained)


def _reads(step: Any) -> set[Any]:
    if isinstance(step, ConvStep):
        return {step.images}
    return {var for kind, var in step.operands if kind == "value"}
