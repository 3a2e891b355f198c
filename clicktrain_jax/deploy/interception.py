"""Runs the jaxpr of a user's function with some of its convolutions replaced.

The parameters go through the jaxpr as `Kernel`s: arrays that remember which leaf they are. Casting, transposing and
scaling keep the memory; a convolution that meets a kernel is handed to the replacement; everything else gets the leaf
with zeros where its mask removes. So the whole computes what the function computes on masked parameters, whatever
the parameters hold there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy.jaxprs import CONVOLUTION, bind, is_literal

_CALLS = frozenset("jit pjit closed_call core_call".split())
_REMAT = frozenset("checkpoint remat remat2".split())
_CUSTOM = frozenset("custom_jvp_call custom_vjp_call".split())
# Operand i becomes result i, at the same places and zero where it was zero.
_PASSING = frozenset(
    "convert_element_type copy copy_p device_put name optimization_barrier reduce_precision sharding_constraint".split()
)


class Kernel:
    """A parameter, or a cast, transposed or scaled form of it, that remembers which leaf it is.

    Attributes:
        name: the leaf's.
        value: the array; where the mask removes it may hold anything.
        axes: axis i of the value is axis ``axes[i]`` of the leaf.
        mask: bool of the leaf's shape, True where a weight is retained; None where nothing is removed.
    """

    def __init__(self, name: str, value: Any, mask: np.ndarray | None, axes: Sequence[int] | None = None):
        self.name = name
        self.value = value
        self.mask = mask
        self.axes = tuple(range(np.ndim(value))) if axes is None else tuple(axes)
        self._masked: Any = None

    def like(self, value: Any, axes: Sequence[int] | None = None) -> "Kernel":
        """Another form of the same leaf."""
        return Kernel(self.name, value, self.mask, self.axes if axes is None else axes)

    def masked(self) -> Any:
        """The value with zeros where the mask removes."""
        if self.mask is None:
            return self.value
        if self._masked is None:
            self._masked = jnp.where(self.mask.transpose(self.axes), self.value, jnp.zeros((), self.value.dtype))
        return self._masked


@dataclasses.dataclass(frozen=True)
class _Zeros:
    """An array of zeros: what a kernel may be combined with by `jax.numpy.where` and stay one."""

    value: Any


class Convolution:
    """One convolution that the run has come to.

    Attributes:
        name: the leaf that is its kernel; empty when the kernel is computed from something else.
        params: of the primitive ``conv_general_dilated``.
        x_shape: of the images, in the axes' order that ``params`` tells.
        kernel_shape: likewise.
        inside: the operation that it stands in and that it cannot be taken out of, "scan" say; empty for none.
        kernel: the `Kernel`; None where there is no name, or it stands inside.
    """

    def __init__(self, equation: Any, name: str, inside: str = "", kernel: Kernel | None = None):
        images, weights = (atom.aval for atom in equation.invars)
        self.name, self.inside, self.kernel, self.params = name, inside, kernel, equation.params
        self.x_shape, self.kernel_shape = tuple(images.shape), tuple(weights.shape)
        self.dtype = images.dtype
        self.kernel_dtype = weights.dtype


# Called with each convolution and its images; returns the result, or None to leave the convolution as it is.
Replace = Callable[[Convolution, Any], Any]


def run(closed: Any, arguments: Sequence[Any], replace: Replace) -> tuple[list[Any], set[str]]:
    """The results of a closed jaxpr, its convolutions replaced.

    Args:
        closed: of `jax.make_jaxpr`.
        arguments: arrays, or a `Kernel` for a parameter; one for each of the jaxpr's.
        replace: called for each convolution; those inside of loops and branches are shown to it with images None.

    Returns:
        ``(arrays, names)``: a parameter that is returned as it came is masked; the names are those of all kernels
        that a convolution takes. (Under differentiation a function with a rule of its own is not called, so that
        ``replace`` may see fewer.)
    """
    runner = _Runner(replace)
    results = runner.run(closed.jaxpr, closed.consts, arguments)
    return [_plain(value) for value in results], runner.names


def _plain(value: Any) -> Any:
    return value.masked() if isinstance(value, Kernel) else _raw(value)


def _raw(value: Any) -> Any:
    return value.value if isinstance(value, (Kernel, _Zeros)) else value


def _with_value(value: Any, array: Any) -> Any:
    """What ``value`` remembers, for another array in its place."""
    if isinstance(value, Kernel):
        return value.like(array)
    return _Zeros(array) if isinstance(value, _Zeros) else array


def _is_zero(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer) and np.size(array) == 1 and bool(np.all(np.asarray(array) == 0))


class _Runner:
    def __init__(self, replace: Replace):
        self.replace = replace
        self.names: set[str] = set()

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The results, as arrays or as what remembers its leaf."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            if not is_literal(atom):
                return env[atom]
            return _Zeros(atom.val) if _is_zero(atom.val) else atom.val

        for equation in jaxpr.eqns:
            with equation.ctx.manager:
                results = self._apply(equation, [read(atom) for atom in equation.invars])
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, values: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name == CONVOLUTION:
            return [self._convolution(equation, *values)]
        if name in ("broadcast_in_dim", "convert_element_type") and isinstance(values[0], _Zeros):
            return [_Zeros(*bind(equation, [_raw(value) for value in values]))]
        kernels = [value for value in values if isinstance(value, Kernel)]
        if kernels:
            kept = self._keep(equation, values)
            if kept is not None:
                return kept
            if name in _CALLS:
                return self.run(params["jaxpr"].jaxpr, params["jaxpr"].consts, values)
            inner = [(jaxpr, _names(values, jaxpr)) for jaxpr in _inner_jaxprs(params)]
            found = [one for jaxpr, names in inner for one in _convolutions(jaxpr, names, name) if one.name]
            self.names.update(convolution.name for convolution in found)
            if found and name in _REMAT:
                return self._rematerialise(equation, values)
            if found and name in _CUSTOM:
                return self._custom(equation, values)
            for convolution in found:
                self.replace(convolution, None)
        return bind(equation, [_plain(value) for value in values])

    def _keep(self, equation: Any, values: list[Any]) -> list[Any] | None:
        """The results of an operation through which a kernel stays the same leaf; None if it is no such one."""
        name = equation.primitive.name
        first = values[0]
        if name in _PASSING and len(values) == len(equation.outvars):
            arrays = bind(equation, [_raw(value) for value in values])
            return [_with_value(value, array) for value, array in zip(values, arrays)]
        if name == "transpose":
            axes = tuple(first.axes[axis] for axis in equation.params["permutation"])
            return [first.like(bind(equation, [first.value])[0], axes)]
        if name in ("mul", "div", "neg"):
            # What is zero stays zero, whatever it is multiplied with; a divisor alone is no factor.
            factor = first if isinstance(first, Kernel) else None if name == "div" else values[1]
            if factor is not None and np.shape(factor.value) == equation.outvars[0].aval.shape:
                arrays = [value.value if value is factor else _plain(value) for value in values]
                return [factor.like(bind(equation, arrays)[0])]
        if name == "select_n":
            # `where(mask, kernel, 0)`, as in `apply_masks`: zeros more than there were.
            cases = values[1:]
            forms = {(case.name, case.axes) for case in cases if isinstance(case, Kernel)}
            if len(forms) == 1 and all(isinstance(case, (Kernel, _Zeros)) for case in cases):
                kernel = next(case for case in cases if isinstance(case, Kernel))
                return [kernel.like(bind(equation, [_raw(value) for value in values])[0])]
        return None

    def _convolution(self, equation: Any, x: Any, weights: Any) -> Any:
        kernel = weights if isinstance(weights, Kernel) else None
        x = _plain(x)
        self.names.update({kernel.name} if kernel else ())
        result = self.replace(Convolution(equation, kernel.name if kernel else "", kernel=kernel), x)
        return bind(equation, [x, _plain(weights)])[0] if result is None else result

    def _rematerialise(self, equation: Any, values: list[Any]) -> list[Any]:
        """The same inside of `jax.checkpoint`, which forgets and computes again."""
        params = equation.params
        function = jax.checkpoint(
            lambda *arrays: self._inside(params["jaxpr"], values, arrays),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        return function(*(_raw(value) for value in values))

    def _custom(self, equation: Any, values: list[Any]) -> list[Any]:
        """The value with convolutions replaced; the derivative is the function's own rule, as it stands."""
        closed = equation.params["call_jaxpr"]

        def value(*arrays: Any) -> list[Any]:
            return self._inside(closed.jaxpr, values, arrays, closed.consts)

        def original(*arrays: Any) -> list[Any]:
            return bind(equation, [_plain(_with_value(*pair)) for pair in zip(values, arrays)])

        if equation.primitive.name == "custom_jvp_call":
            function = jax.custom_jvp(value)
            function.defjvp(lambda primals, tangents: jax.jvp(original, primals, tangents))
        else:
            function = jax.custom_vjp(value)
            function.defvjp(lambda *arrays: jax.vjp(original, *arrays), lambda pull, cotangents: pull(cotangents))
        return function(*(_raw(value) for value in values))

    def _inside(
        self, jaxpr: Any, values: Sequence[Any], arrays: Sequence[Any], consts: Sequence[Any] = ()
    ) -> list[Any]:
        """Arrays from a jaxpr of arrays in the place of what ``values`` remember."""
        arguments = [_with_value(*pair) for pair in zip(values, arrays)]
        return [_plain(result) for result in self.run(jaxpr, consts, arguments)]


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs in an equation's parameters, opened."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars"):
                found.append(jaxpr)
    return found


def _names(values: Sequence[Any], jaxpr: Any) -> list[str]:
    """The names of the leaves that a jaxpr inside of an operation gets, as far as its last operands tell.

    Loops and branches hand their last operands on in order; what stands before them is their own.
    """
    names = [value.name if isinstance(value, Kernel) else "" for value in values]
    count = len(jaxpr.invars)
    return names[len(names) - count :] if count <= len(names) else [""] * count


def _convolutions(jaxpr: Any, names: Sequence[str], inside: str) -> list[Convolution]:
    """The convolutions in a jaxpr and in what it calls, with the names of their kernels as far as they are known."""
    known = dict(zip(jaxpr.invars, names))
    found = []
    for equation in jaxpr.eqns:
        variables = (None if is_literal(atom) else atom for atom in equation.invars)
        operands = [known.get(variable, "") for variable in variables]
        primitive = equation.primitive.name
        if primitive == CONVOLUTION:
            found.append(Convolution(equation, operands[1], inside))
        elif primitive in _PASSING | {"transpose", "mul"} and len(equation.outvars) == 1:
            known[equation.outvars[0]] = next(filter(None, operands), "")
        for inner in _inner_jaxprs(equation.params):
            count = len(inner.invars)
            handed = operands[len(operands) - count :] if count <= len(operands) else [""] * count
            found += _convolutions(inner, handed, inside)
    return found
