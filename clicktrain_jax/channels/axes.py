"""Which axes of which parameters must be reordered together, read off the jaxpr of a forward pass.

Every axis of a parameter, of the input and of every intermediate value is a product of `Part`s, outermost first: an
axis of channels is one part, an image flattened to (rows * columns * channels) is three. A part stands for one
unknown order. Each primitive says which parts must have the same order for its result to be reordered and otherwise
unchanged: an addition joins the parts of its operands axis by axis, a convolution joins the channels that it sums
over with the kernel's input axis, and so on. Where a primitive depends on the order (padding along the axis, a
position in an image), or is not known here, the part is fixed: its order must stay. Joining, splitting and fixing
only ever take freedom away, so an order that is still free at the end changes nothing. No value is computed.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from clicktrain_jax.deploy.tracing import traced
from clicktrain_jax.jaxprs import CALLS, walk
from clicktrain_jax.trees import Tree, named_leaves

Role = Literal["writer", "reader"]

_POSITION = "it runs over positions, not channels"
# Each output element depends on the elements at the same place alone (operands of length 1 or rank 0 are repeated).
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul name ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh
    xor""".split()
)
# The result does not depend on the order along the axes that are reduced.
_REDUCTIONS = frozenset("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split())
_WINDOWS = frozenset("reduce_window_max reduce_window_min reduce_window_sum".split())


@dataclasses.dataclass(eq=False)
class Part:
    """One factor of an axis.

    Attributes:
        length: number of places, 2 or more.
        fixed: why the order of the places must stay; empty while it is free.
        from_input: the places are places of the network's input.
        uniform: the value is the same at all places, so that any order fits it.
        became: the parts that took this one's place when it was joined with another or split.
    """

    length: int
    fixed: str = ""
    from_input: bool = False
    uniform: bool = False
    became: "tuple[Part, ...]" = ()


Axis = tuple[Part, ...]


class Value(NamedTuple):
    """What is known of an array: its axes, and the parameters it is made from (None if the input has a share)."""

    axes: tuple[Axis, ...]
    leaves: frozenset[str] | None


class TracedAxes(NamedTuple):
    """The axes of the parameters after a trace.

    Attributes:
        axes: ``{(leaf name, axis): parts}``, outermost first; parts that are one object are reordered together.
        roles: ``{(leaf name, axis): role}`` in the order of the forward pass, for the axes that make channels in a
            convolution or matrix product ("writer") and those that are summed over ("reader").
    """

    axes: dict[tuple[str, int], Axis]
    roles: dict[tuple[str, int], Role]


def trace_axes(apply_fn: Callable[..., Any], variables: Tree, example: Any) -> TracedAxes:
    """Trace ``apply_fn(variables, example)`` on abstract values. Arguments are those of `channels.channel_nodes`."""
    names = [name for name, leaf in named_leaves(variables) if leaf is not None]
    closed, _ = traced(apply_fn, variables, example)
    tracer = _Tracer()
    arguments = []
    for index, variable in enumerate(closed.jaxpr.invars):
        if index < len(names):
            axes = tuple(_new_axis(length) for length in variable.aval.shape)
            tracer.leaves[names[index]] = axes
            arguments.append(Value(axes, frozenset({names[index]})))
        else:
            axes = _fixed_axes(variable.aval.shape, "it is an axis of the network's input", from_input=True)
            arguments.append(Value(axes, None))
    for result in walk(closed, arguments, tracer.step, tracer.constant):
        tracer.fix(result.axes, "it is an axis of the network's output")
    axes = {(name, index): expand(axis) for name, axes in tracer.leaves.items() for index, axis in enumerate(axes)}
    return TracedAxes(axes, tracer.roles)


def expand(axis: Iterable[Part]) -> Axis:
    """The parts that an axis consists of by now."""
    parts: list[Part] = []
    for part in axis:
        while len(part.became) == 1:
            successor = part.became[0]
            part.became = successor.became if len(successor.became) == 1 else part.became
            part = successor
        parts.extend(expand(part.became) if part.became else (part,))
    return tuple(parts)


def _length(axis: Axis) -> int:
    return math.prod(part.length for part in axis)


def _new_axis(length: int, **options: Any) -> Axis:
    # An axis of one place has one order: nothing to know of it.
    return () if length == 1 else (Part(int(length), **options),)


def _fixed_axes(shape: Sequence[int], why: str, **options: Any) -> tuple[Axis, ...]:
    return tuple(_new_axis(length, fixed=why, **options) for length in shape)


def _split(part: Part, outer: int) -> Axis:
    """Replace a part by two, of ``outer`` and ``length / outer`` places, each with an order of its own."""
    parts = tuple(dataclasses.replace(part, length=length) for length in (outer, part.length // outer))
    if not part.uniform:
        part.became = parts
    return parts


def _join(first: Part, second: Part) -> Part:
    """One part for two of equal length, reordered alike from now on."""
    if first is second or second.uniform:
        return first
    if first.uniform:
        return second
    second.fixed = second.fixed or first.fixed
    second.from_input = second.from_input or first.from_input
    first.became = (second,)
    return second


class _Tracer:
    """What a walk through a jaxpr does with `Value`s in place of arrays; a rule is ``(params, values, shape) -> axes``.

    A rule gives None where it cannot say: the order must stay then.
    """

    def __init__(self):
        self.leaves: dict[str, tuple[Axis, ...]] = {}
        self.roles: dict[tuple[str, int], Role] = {}

    def fix(self, axes: Iterable[Axis], why: str) -> None:
        """Forbid to reorder these axes."""
        for axis in axes:
            for part in expand(axis):
                if not part.uniform:
                    part.fixed = part.fixed or why

    def unify(self, first: Axis, second: Axis) -> Axis:
        """Give two axes of equal length one order, splitting parts where one axis has finer ones."""
        left, right, joined = list(expand(first))[::-1], list(expand(second))[::-1], []
        while left and right:
            # The same part may stand on both sides, or twice on one: it may have been replaced a moment ago.
            if left[-1].became or right[-1].became:
                left, right = list(expand(left[::-1]))[::-1], list(expand(right[::-1]))[::-1]
            one, other = left.pop(), right.pop()
            if one.length != other.length:
                longer, rest = (one, left) if one.length > other.length else (other, right)
                shorter = min(one.length, other.length)
                if longer.length % shorter:
                    why = f"two axes of {_length(expand(first))} places are divided differently"
                    self.fix((first, second), why)
                    return _new_axis(_length(expand(first)), fixed=why)
                outer, inner = _split(longer, shorter)
                rest.append(inner)
                one, other = (outer, other) if longer is one else (one, outer)
            joined.append(_join(one, other))
        return expand(joined)

    def constant(self, value: Any) -> Value:
        """A constant, whose values are not looked at: reordering an axis might change them."""
        return Value(_fixed_axes(np.shape(value), "it meets an array of constants"), frozenset())

    def step(self, equation: Any, values: list[Value]) -> list[Value] | None:
        """The values of an equation's results; None for a call, which is walked through."""
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return None
        if name == "optimization_barrier":
            return values
        shapes = [getattr(variable.aval, "shape", ()) for variable in equation.outvars]
        rule = _RULES.get(name)
        axes = None if rule is None else rule(self, params, values, shapes[0])
        known = [value.leaves for value in values]
        leaves = frozenset[str]()
        for each in known:
            leaves = None if leaves is None or each is None else leaves | each
        if axes is not None:
            return [Value(axes, leaves)]
        why = f"{name!r} may depend on its order"
        for value in values:
            self.fix(value.axes, why)
        return [Value(_fixed_axes(shape, why), leaves) for shape in shapes]

    def _mark(self, value: Value, axis: Axis, role: Role) -> None:
        """Note the role of the parameters' axes that an axis of a value comes from; the first role stays."""
        parts = {id(part) for part in expand(axis)}
        for name in sorted(value.leaves or ()):
            axes = self.leaves[name]
            # A vector that scales a kernel's filters makes no channels of its own.
            if role == "writer" and len(axes) < 2:
                continue
            for index, own in enumerate(axes):
                if parts & {id(part) for part in expand(own)}:
                    self.roles.setdefault((name, index), role)

    def _resized(self, axis: Axis, length: int, why: str) -> Axis:
        """An axis after an operation that picks or adds places."""
        self.fix((axis,), why)
        return _new_axis(length, fixed=why)

    def _elementwise(self, params, values, shape):
        axes = [_new_axis(length, uniform=True) for length in shape]
        for value in values:  # a scalar has no axes
            for index, axis in enumerate(value.axes):
                if axis:
                    axes[index] = self.unify(axes[index], axis)
        return tuple(axes)

    def _reduction(self, params, values, shape):
        return tuple(axis for index, axis in enumerate(values[0].axes) if index not in params["axes"])

    def _window(self, params, values, shape):
        keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
        settings = zip(*(params[key] for key in keys))
        return tuple(
            axis
            if (size, stride, tuple(pad), *dilations) == (1, 1, (0, 0), 1, 1)
            else self._resized(axis, length, _POSITION)
            for axis, length, (size, stride, pad, *dilations) in zip(values[0].axes, shape, settings)
        )

    def _broadcast_in_dim(self, params, values, shape):
        axes = [_new_axis(length, uniform=True) for length in shape]
        for index, axis in zip(params["broadcast_dimensions"], values[0].axes):
            axes[index] = axis or axes[index]
        return tuple(axes)

    def _iota(self, params, values, shape):
        return tuple(
            _new_axis(n, fixed="it meets an iota") if index == params["dimension"] else _new_axis(n, uniform=True)
            for index, n in enumerate(shape)
        )

    def _transpose(self, params, values, shape):
        return tuple(values[0].axes[index] for index in params["permutation"])

    def _squeeze(self, params, values, shape):
        return tuple(axis for index, axis in enumerate(values[0].axes) if index not in params["dimensions"])

    def _rev(self, params, values, shape):
        self.fix((values[0].axes[index] for index in params["dimensions"]), "it is reversed")
        return values[0].axes

    def _cut(self, params, values, shape):
        # A slice as long as the axis is the whole of it.
        return tuple(
            axis if _length(expand(axis)) == length else self._resized(axis, length, "a slice picks places of it")
            for axis, length in zip(values[0].axes, shape)
        )

    def _pad(self, params, values, shape):
        return tuple(
            axis if tuple(pad) == (0, 0, 0) else self._resized(axis, length, "it is padded")
            for axis, length, pad in zip(values[0].axes, shape, params["padding_config"])
        )

    def _concatenate(self, params, values, shape):
        joined = params["dimension"]
        axes = list(values[0].axes)
        for value in values[1:]:
            for index, axis in enumerate(value.axes):
                if index != joined:
                    axes[index] = self.unify(axes[index], axis)
        pieces = [expand(value.axes[joined]) for value in values]
        if pieces[0] and all(piece == pieces[0] for piece in pieces):
            # Copies (the shifted images of a convolution by patches): channels repeat inside each.
            axes[joined] = _new_axis(len(pieces), fixed=_POSITION) + pieces[0]
        else:
            why = "it is concatenated with other channels"
            self.fix(pieces, why)
            axes[joined] = _new_axis(shape[joined], fixed=why)
        return tuple(axes)

    def _stack(self, params, values, shape):
        axes = list(values[0].axes)
        for value in values[1:]:
            axes = [self.unify(*pair) for pair in zip(axes, value.axes)]
        axes.insert(params["axis"], _new_axis(len(values), fixed=_POSITION))
        return tuple(axes)

    def _reshape(self, params, values, shape):
        if params.get("dimensions") is not None or 0 in shape:
            return None
        rest = [part for axis in values[0].axes for part in expand(axis)][::-1]
        axes = []
        for length in shape:
            axis: list[Part] = []
            while length > 1:
                # A part that stands here twice may have been split a moment ago.
                rest.extend(expand((rest.pop(),))[::-1])
                part = rest.pop()
                if part.length > length and part.length % length == 0:
                    self.fix(((part,),), "a reshape divides it")
                    part, inner = _split(part, length)
                    rest.append(inner)
                elif length % part.length:
                    return None
                axis.append(part)
                length //= part.length
            axes.append(tuple(axis))
        return tuple(axes)

    def _dot_general(self, params, values, shape):
        (summed, batch) = params["dimension_numbers"]
        left, right = values
        for one, other in zip(*summed):
            self.unify(left.axes[one], right.axes[other])
        shared = [self.unify(left.axes[one], right.axes[other]) for one, other in zip(*batch)]
        weights_only = left.leaves is not None and right.leaves is not None
        free = []
        for side, value in enumerate(values):
            # In a product of two weights (a kernel of low rank) the first one makes the channels between them.
            for index in summed[side]:
                self._mark(value, value.axes[index], "writer" if weights_only and side == 0 else "reader")
            others = [axis for index, axis in enumerate(value.axes) if index not in (*summed[side], *batch[side])]
            if not weights_only:
                for axis in others:
                    self._mark(value, axis, "writer")
            free += others
        return (*shared, *free)

    def _conv_general_dilated(self, params, values, shape):
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        if params["batch_group_count"] != 1:
            return None
        images, kernel = values
        channels, inputs, filters = (
            images.axes[numbers.lhs_spec[1]],
            kernel.axes[numbers.rhs_spec[1]],
            kernel.axes[numbers.rhs_spec[0]],
        )
        if 1 < groups == _length(expand(channels)) == _length(expand(filters)):
            # Depthwise: channel c comes from channel c alone, so the kernel follows and makes no channels of its own.
            filters = self.unify(channels, filters)
        else:
            if groups == 1:
                self.unify(channels, inputs)
            else:
                self.fix((channels, inputs, filters), f"a convolution of {groups} groups divides it")
            self._mark(kernel, inputs, "reader")
            self._mark(kernel, filters, "writer")
        for value, spec in ((images, numbers.lhs_spec), (kernel, numbers.rhs_spec)):
            self.fix((value.axes[index] for index in spec[2:]), _POSITION)
        axes = list(_fixed_axes(shape, _POSITION))
        axes[numbers.out_spec[0]] = images.axes[numbers.lhs_spec[0]]
        axes[numbers.out_spec[1]] = filters
        return tuple(axes)


# What each primitive says; one that has no rule fixes all that it meets.
_RULES: dict[str, Callable[..., tuple[Axis, ...] | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _Tracer._elementwise),
    **dict.fromkeys(_REDUCTIONS, _Tracer._reduction),
    **dict.fromkeys(_WINDOWS, _Tracer._window),
    "broadcast_in_dim": _Tracer._broadcast_in_dim,
    "concatenate": _Tracer._concatenate,
    "conv_general_dilated": _Tracer._conv_general_dilated,
    "dot_general": _Tracer._dot_general,
    "dynamic_slice": _Tracer._cut,
    "iota": _Tracer._iota,
    "pad": _Tracer._pad,
    "reshape": _Tracer._reshape,
    "rev": _Tracer._rev,
    "slice": _Tracer._cut,
    "squeeze": _Tracer._squeeze,
    "stack": _Tracer._stack,
    "transpose": _Tracer._transpose,
}
