"""A net made ready to be run: what its variables alone decide is computed once, and BatchNorm goes into the kernels.

The function is traced, whatever library it is written with. Steps that no image reaches are computed at once. Where a
convolution's result is only ever multiplied by or added to such a value, one for each filter, the factor goes into the
kernel and the sum into one bias: BatchNorm by running statistics is four such steps. A ReLU behind it is the last such
step, for backends that do both on the way. All other steps stay as they are.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import host
from clicktrain_jax.deploy.kernels import Form, Moves, form_of_constant, forms_after
from clicktrain_jax.deploy.steps import Convolve, ConvStep, OtherStep, Steps
from clicktrain_jax.deploy.tracing import flattened
from clicktrain_jax.jaxprs import CONVOLUTION, bind, is_literal, walk
from clicktrain_jax.trees import named_leaves

# How many images a net is first traced for.
_FEW_IMAGES = 2
_AFFINE = frozenset(("add", "sub", "mul", "div"))

Arrays = dict[str, jax.Array]


class Folded:
    """A net with its variables folded; made by `fold`.

    Attributes:
        arrays: what `function` takes, by name: kernels (as their leaf), biases, and values that no image reaches.
        image_shape: (height, width, channels).
    """

    def __init__(self, trace: Callable[[Any], Any], variables: Any, image_shape: tuple[int, int, int]) -> None:
        self._trace, self.image_shape = trace, image_shape
        self._steps: dict[Any, Steps] = {}
        self._variables = _abstract(variables)
        # Of one image nothing would tell an array that is as large as the batch from any other.
        traced = trace(_FEW_IMAGES)
        self._equations = [(eqn.primitive.name, _is_computable(eqn)) for eqn in traced[0].jaxpr.eqns]
        prepare, found = self._prepare(traced)
        self.arrays: Arrays = host.evaluate(prepare, variables)
        self._shapes = {name: array.shape for name, array in self.arrays.items()}
        self._steps[_FEW_IMAGES] = found[0]

    def steps(self, batch: Any) -> Steps:
        """The steps for a number of images, which may be symbolic (`jax.export.symbolic_shape`)."""
        if batch not in self._steps:
            prepare, found = self._prepare(self._trace(batch))
            arrays = jax.eval_shape(prepare, self._variables)
            if {name: array.shape for name, array in arrays.items()} != self._shapes:
                raise ValueError(
                    f"the function does other things with its variables for a batch of {batch} than for "
                    f"{_FEW_IMAGES}: it cannot be folded"
                )
            self._steps[batch] = found[0]
        return self._steps[batch]

    def _prepare(self, traced: tuple[Any, list[str]]) -> tuple[Callable[[Any], Arrays], list[Steps]]:
        """A function that computes the arrays, and where it puts the steps when it is traced."""
        equations = traced[0].jaxpr.eqns
        # A symbolic batch may add equations of its own; what they compute is compared with the arrays that are known.
        alike = [equation.primitive.name for equation in equations] == [name for name, _ in self._equations]
        known = [is_computable for _, is_computable in self._equations]
        computable = known if alike else [_is_computable(equation) for equation in equations]
        found: list[Steps] = []

        def prepare(variables: Any) -> Arrays:
            arrays, steps = _take_apart(traced, variables, computable)
            found.append(steps)
            return arrays

        return prepare, found

    def function(self, arrays: Mapping[str, Any], images: Any, convolve: Convolve | None = None) -> Any:
        """The net as a pure function of its arrays and of images, (batch, height, width, channels)."""
        return self.steps(images.shape[0]).run(arrays, images, convolve or plain)


def sizes_of(image_shape: Any) -> tuple[int, int, int]:
    """Height, width and channels; a ValueError for anything else."""
    sizes = tuple(image_shape) if np.iterable(image_shape) else ()
    if len(sizes) != 3 or not all(hasattr(size, "__index__") and size > 0 for size in sizes):
        raise ValueError(f"image_shape={image_shape!r}: expected (height, width, channels)")
    height, width, channels = map(int, sizes)
    return height, width, channels


def fold(
    apply_fn: Callable[[Any, Any], Any], variables: Any, image_shape: Sequence[int], dtype: Any = jnp.float32
) -> Folded:
    """Fold a net's variables for inference.

    Args:
        apply_fn: ``(variables, images) -> logits``, a pure function that jax can trace, BatchNorm by its running
            statistics and without dropout.
        variables: its tree of arrays.
        image_shape: (height, width, channels) of one image.
        dtype: of the images.

    Returns:
        A `Folded`: ``folded.function(folded.arrays, images)`` is what ``apply_fn(variables, images)`` is, but for
        rounding.

    Raises:
        ValueError: the function does not return one array, or changes with what it returned before.
    """
    height, width, channels = sizes_of(image_shape)
    shape = height, width, channels
    names = [name for name, leaf in named_leaves(variables) if leaf is not None]
    abstract = _abstract(variables)

    def trace(batch: Any) -> tuple[Any, list[str]]:
        images = jax.ShapeDtypeStruct((batch, *shape), dtype)
        closed, out = flattened(apply_fn, abstract, images)
        if not hasattr(out, "shape"):
            raise ValueError(
                f"the function returns {type(out).__name__}; expected one array of logits: return one of its outputs, "
                "or several that are concatenated, lambda variables, images: apply_fn(variables, images)[...]"
            )
        return closed, names

    return Folded(trace, variables, shape)


def _abstract(tree: Any) -> Any:
    shapes = jax.eval_shape(lambda tree: tree, tree)  # puts nothing on a device
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def plain(step: ConvStep, images: Any, kernel: Any, bias: Any) -> Any:
    """The convolution as it was traced, with what follows it."""
    return step.finished(bind(step.equation, [images, kernel])[0], bias)


class _Known(NamedTuple):
    """A value that no image reaches; ``leaf`` is the variable that it is a form of, its entries after ``moves``."""

    value: Any
    form: Form = None

    @property
    def leaf(self) -> str:
        return self.form[0] if isinstance(self.form, tuple) else ""

    @property
    def moves(self) -> Moves:
        return self.form[1] if isinstance(self.form, tuple) else ()


@dataclasses.dataclass(frozen=True)
class _Pending:
    """``convolution(images, kernel * scale) + shift``, as long as it is not known what else will be done to it."""

    equation: Any
    images: Any
    kernel: _Known
    scale: Any
    shift: Any
    dtype: Any

    @property
    def out_channels(self) -> tuple[int, int]:
        """(rank, the axis that counts filters) of the result."""
        out_spec = self.equation.params["dimension_numbers"].out_spec
        return len(out_spec), out_spec[1]

    def after(self, name: str, factor: Any, first: bool, dtype: Any) -> "_Pending":
        """The same after one affine step with a value (filters,); ``first``: the convolution is the first operand."""
        scale = jnp.ones((), factor.dtype) if self.scale is None else self.scale
        shift = jnp.zeros((), factor.dtype) if self.shift is None else self.shift
        if name == "add":
            shift = shift + factor
        elif name == "sub" and first:
            shift = shift - factor
        elif name == "sub":
            scale, shift = -scale, factor - shift
        elif name == "mul":
            scale, shift = scale * factor, shift * factor
        else:
            scale, shift = scale / factor, shift / factor
        return dataclasses.replace(self, scale=scale, shift=shift, dtype=dtype)


class _Folding:
    """One walk through a jaxpr without calls: what is known is computed, the rest becomes steps.

    In the walk a `_Known` stands for what is known, and a variable for itself.
    """

    def __init__(self, closed: Any, computable: Sequence[bool]) -> None:
        self.arrays: Arrays = {}
        self.steps: list[Any] = []
        self._closed, self._computable = closed, iter(computable)
        self._pending: dict[Any, _Pending] = {}
        self._stored: dict[Any, str] = {}
        atoms = [atom for equation in closed.jaxpr.eqns for atom in equation.invars] + list(closed.jaxpr.outvars)
        self._uses = collections.Counter(atom for atom in atoms if not is_literal(atom))

    def run(self, arguments: Sequence[Any]) -> tuple[str, Any]:
        """Walk; returns the operand that is the result."""
        result = walk(self._closed, arguments, self._step, lambda value: _Known(value, form_of_constant(value)))[0]
        return self._operand(self._closed.jaxpr.outvars[0], result)

    def _step(self, equation: Any, values: list[Any]) -> list[Any]:
        knowns = [value if isinstance(value, _Known) else None for value in values]
        is_computable = next(self._computable)
        whole = [known for known in knowns if known is not None]
        if len(whole) == len(knowns) and is_computable:
            return self._compute(equation, whole)
        if equation.primitive.name == CONVOLUTION and knowns[0] is None and knowns[1] is not None:
            images, result = self._value(values[0]), equation.outvars[0]
            self._pending[result] = _Pending(equation, images, knowns[1], None, None, result.aval.dtype)
        elif not self._absorb(equation, knowns):
            self.steps.append(OtherStep(equation, tuple(map(self._operand, equation.invars, values))))
        return equation.outvars

    def _operand(self, atom: Any, value: Any) -> tuple[str, Any]:
        if is_literal(atom):
            return "literal", atom.val
        if not isinstance(value, _Known):
            return "value", self._value(value)
        if atom not in self._stored:
            name = value.leaf if value.leaf and not value.moves else f"value {len(self._stored)}"
            self._stored[atom] = self._store(name, value.value)
        return "array", self._stored[atom]

    def _value(self, var: Any) -> Any:
        """The variable itself, with a step that computes it."""
        pending = self._pending.pop(var, None)
        if pending is not None:
            self._emit(pending, var)
        return var

    def _store(self, name: str, value: Any) -> str:
        # A leaf may be used by several convolutions, each folded in its own way.
        count = 1
        free = name
        while free in self.arrays:
            count += 1
            free = f"{name} ({count})"
        self.arrays[free] = value
        return free

    def _compute(self, equation: Any, knowns: list[_Known]) -> list[_Known]:
        values = bind(equation, [known.value for known in knowns])
        return [*map(_Known, values, forms_after(equation, [known.form for known in knowns]))]

    def _absorb(self, equation: Any, knowns: list[_Known | None]) -> bool:
        """Take a step into the convolution before it, if it is one that can be."""
        waiting = [atom for atom in equation.invars if not is_literal(atom) and atom in self._pending]
        if len(waiting) != 1 or self._uses[waiting[0]] != 1 or len(equation.outvars) != 1:
            return False
        pending, name, result = self._pending[waiting[0]], equation.primitive.name, equation.outvars[0]
        if not jnp.issubdtype(result.aval.dtype, jnp.floating):
            return False
        if name == "max" and _is_zero(knowns[0] or knowns[1]):
            self._emit(self._pending.pop(waiting[0]), result, relu=True)
            return True
        if name == "convert_element_type":
            changed = dataclasses.replace(pending, dtype=result.aval.dtype)
        elif name == "neg":
            changed = pending.after("sub", jnp.zeros((), pending.dtype), False, result.aval.dtype)
        elif name in _AFFINE:
            first = equation.invars[0] is waiting[0]
            other = knowns[1 if first else 0]
            factor = None if other is None else _per_filter(other.value, *pending.out_channels)
            if factor is None or (name == "div" and not first):
                return False
            changed = pending.after(name, factor, first, result.aval.dtype)
        else:
            return False
        del self._pending[waiting[0]]
        self._pending[result] = changed
        return True

    def _emit(self, pending: _Pending, result: Any, relu: bool = False) -> None:
        kernel, equation = pending.kernel, pending.equation
        value = kernel.value
        if pending.scale is not None:
            filters = equation.params["dimension_numbers"].rhs_spec[0]
            shape = [-1 if axis == filters else 1 for axis in range(value.ndim)]
            value = (value * pending.scale.reshape(shape)).astype(value.dtype)
        name = self._store(kernel.leaf or f"kernel {len(self.arrays)}", value)
        bias = None
        if pending.shift is not None:
            filters = result.aval.shape[pending.out_channels[1]]
            bias = self._store(f"{name} bias", jnp.broadcast_to(pending.shift, (filters,)).astype(pending.dtype))
        place = (name, kernel.leaf, kernel.moves, equation, pending.images)
        self.steps.append(ConvStep(*place, bias, pending.dtype, relu, result))


def _is_computable(equation: Any) -> bool:
    """Whether an equation of known values may be computed at once: not if its size may be that of the batch."""
    shapes = [atom.aval.shape for atom in equation.invars if not is_literal(atom)]
    results = [var.aval.shape for var in equation.outvars]
    if not shapes or equation.effects:
        return False
    if not all(isinstance(size, int) for shape in (*shapes, *results) for size in shape):
        return False  # a symbolic batch
    return max(map(math.prod, results), default=0) <= max(map(math.prod, shapes))


def _is_zero(known: _Known | None) -> bool:
    """Whether a value is zero whatever the variables hold."""
    return known is not None and not isinstance(known.value, jax.core.Tracer) and not np.any(known.value)


def _per_filter(value: Any, rank: int, axis: int) -> Any:
    """A value as (filters,) or (1,), if that is all it is: of size 1 along every other axis."""
    shape = np.shape(value)
    if shape and (len(shape) != rank or any(size != 1 for place, size in enumerate(shape) if place != axis)):
        return None
    return jnp.asarray(value).reshape(-1)


def _take_apart(traced: tuple[Any, list[str]], variables: Any, computable: Sequence[bool]) -> tuple[Arrays, Steps]:
    """The arrays, computed, and the steps that are left; ``computable`` tells which equations may be computed."""
    closed, names = traced
    images = closed.jaxpr.invars[-1]
    folding = _Folding(closed, computable)
    output = folding.run([*map(_Known, jax.tree.leaves(variables), [(name, ()) for name in names]), images])
    return folding.arrays, Steps(images, tuple(folding.steps), output)
