"""Runs the jaxpr of a user's function with some of its convolutions replaced.

The parameters go through the jaxpr as `Kernel`s: arrays that remember which leaf they are. Casting, moving and scaling
keep the memory; a convolution that meets a kernel is handed to the replacement; everything else gets the leaf with
zeros where its mask removes, and what it makes of it remembers that it was computed from the leaf. So the whole
computes what the function computes on masked parameters, whatever the parameters hold there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy.kernels import CUSTOM, Form, Moves, Sign, form_of_constant, forms_after, moved
from clicktrain_jax.jaxprs import CALLS, CONVOLUTION, bind, inner_jaxprs, walk

_REMAT = frozenset("checkpoint remat remat2".split())


class Kernel:
    """A parameter, or a cast, moved or scaled form of it, that remembers which leaf it is.

    Attributes:
        name: the leaf's.
        value: the array; where the mask removes it may hold anything, unless ``is_pruned``.
        leaf_mask: bool of the leaf's shape, True where a weight is retained; None where nothing is removed.
        moves: that its entries made since the leaf.
        is_pruned: whether the value is zero where the mask removes.
    """

    def __init__(self, name: str, value: Any, leaf_mask: np.ndarray | None, moves: Moves = (), is_pruned: bool = False):
        self.name, self.value, self.leaf_mask, self.moves, self.is_pruned = name, value, leaf_mask, moves, is_pruned
        self._masked: Any = None

    def like(self, value: Any, moves: Moves | None = None) -> "Kernel":
        """Another form of the same leaf, after other moves."""
        return Kernel(self.name, value, self.leaf_mask, self.moves if moves is None else moves, self.is_pruned)

    @property
    def mask(self) -> Any:
        """The mask, bool, as the value's entries stand; None where nothing is removed."""
        return None if self.leaf_mask is None else moved(self.leaf_mask, self.moves)

    def masked(self) -> Any:
        """The value with zeros where the mask removes."""
        if self.leaf_mask is None or self.is_pruned:
            return self.value
        if self._masked is None:
            self._masked = jnp.where(self.mask, self.value, jnp.zeros((), self.value.dtype))
        return self._masked


class _Constant(NamedTuple):
    """An array of one number: what a kernel may be combined with, by `jax.numpy.where` or a clip, and stay one."""

    value: Any
    sign: Sign


class _Computed(NamedTuple):
    """An array that is computed from masked leaves, whose zeros it need not have.

    Attributes:
        names: of the leaves.
    """

    names: frozenset[str]
    value: Any


class Convolution:
    """One convolution that the run has come to.

    Attributes:
        name: the leaf that is its kernel, or that it is computed from; empty where that is none or several.
        sources: the leaves that its kernel is computed from; empty where it is a leaf, or has nothing of one.
        params: of the primitive ``conv_general_dilated``.
        x_shape: of the images, in the axes' order that ``params`` tells.
        kernel_shape: likewise.
        inside: the operation that it stands in and that it cannot be taken out of, "scan" say; empty for none.
        kernel: the `Kernel`; None where there is no name, or it stands inside.
        sharding: of the result, as its type tells.
    """

    def __init__(self, equation: Any, names: Any = (), inside: str = "", kernel: Kernel | None = None):
        images, weights = (atom.aval for atom in equation.invars)
        self.name = next(iter(names)) if len(names) == 1 else ""
        # What stands inside may be the leaf itself: that is not followed.
        self.sources = frozenset() if kernel is not None or (inside and self.name) else frozenset(names)
        self.inside, self.kernel, self.params = inside, kernel, equation.params
        self.x_shape, self.kernel_shape = tuple(images.shape), tuple(weights.shape)
        self.dtype = images.dtype
        self.sharding = getattr(equation.outvars[0].aval, "sharding", None)
        self.kernel_dtype = weights.dtype

    def take_kernel(self) -> Kernel | None:
        """The kernel, which leaves: what was met tells of a trace and holds none of its values."""
        kernel, self.kernel = self.kernel, None
        return kernel


# Called with each convolution and its images; returns the result, or None to leave the convolution as it is.
Replace = Callable[[Convolution, Any], Any]


def run(closed: Any, arguments: Sequence[Any], replace: Replace) -> tuple[list[Any], dict[str, bool]]:
    """The results of a closed jaxpr, its convolutions replaced.

    Args:
        closed: of `jax.make_jaxpr`.
        arguments: arrays, or a `Kernel` for a parameter; one for each of the jaxpr's.
        replace: called for each convolution; those inside of loops and branches are shown to it with images None.

    Returns:
        ``(arrays, {name: whether a convolution takes it as it is})``: a parameter that is returned as it came is
        masked; the names are those of all kernels that a convolution takes, or takes something that is computed from
        it. (Under differentiation a function with a rule of its own is not called, so that ``replace`` may see fewer.)
    """
    runner = _Runner(replace)
    results = walk(closed, arguments, runner.step, _constant)
    return [_plain(value) for value in results], runner.met


def read_by_convolutions(closed: Any, arguments: Sequence[Any], places: Mapping[int, str]) -> set[str]:
    """Which arguments a convolution's kernel is, or is computed from; nothing is computed.

    Args:
        closed: of `jax.make_jaxpr`.
        arguments: arrays, or `jax.ShapeDtypeStruct`.
        places: names of the arguments in question, by their index.
    """
    found: set[str] = set()

    def call(arrays: list[Any]) -> None:
        kernels = [Kernel(places[i], array, None) if i in places else array for i, array in enumerate(arrays)]
        found.update(run(closed, kernels, lambda convolution, x: None)[1])

    jax.eval_shape(call, list(arguments))
    return found


def _constant(value: Any) -> Any:
    sign = form_of_constant(value)
    return _Constant(value, sign) if isinstance(sign, Sign) else value


def _plain(value: Any) -> Any:
    return value.masked() if isinstance(value, Kernel) else _raw(value)


def _raw(value: Any) -> Any:
    return value.value if isinstance(value, (Kernel, _Constant, _Computed)) else value


def _with_value(value: Any, array: Any) -> Any:
    """What ``value`` remembers, for another array in its place."""
    if isinstance(value, Kernel):
        return value.like(array)
    return value._replace(value=array) if isinstance(value, (_Constant, _Computed)) else array


def _names(value: Any) -> frozenset[str]:
    if isinstance(value, Kernel):
        return frozenset((value.name,))
    return value.names if isinstance(value, _Computed) else frozenset()


def _form(value: Any) -> Form:
    if isinstance(value, Kernel):
        return value.name, value.moves
    return value.sign if isinstance(value, _Constant) else None


class _Runner:
    def __init__(self, replace: Replace):
        self.replace = replace
        self.met: dict[str, bool] = {}

    def step(self, equation: Any, values: list[Any]) -> Sequence[Any] | None:
        """The results, as arrays or as what remembers its leaf."""
        name = equation.primitive.name
        if name == CONVOLUTION:
            return [self._convolution(equation, *values)]
        kept = None if name in CUSTOM else self._keep(equation, values)
        if kept is not None:
            return kept
        if not any(isinstance(value, (Kernel, _Computed)) for value in values):
            return bind(equation, [_plain(value) for value in values])
        if name in CALLS and name not in _REMAT | CUSTOM:
            return None
        names = [_names(value) for value in values]
        found = _inside(equation, names)
        self._meet(found)
        if found and name in _REMAT:
            return self._rematerialise(equation, values)
        if name in CUSTOM and (kept := self._custom(equation, values) if found else self._keep(equation, values)):
            return kept
        for convolution in found:
            self.replace(convolution, None)
        results = bind(equation, [_plain(value) for value in values])
        return [_Computed(frozenset().union(*names), result) for result in results]

    def _keep(self, equation: Any, values: list[Any]) -> list[Any] | None:
        """The results of an operation through which a kernel stays the same leaf; None if it is no such one."""
        forms = [_form(value) for value in values]
        after = forms_after(equation, forms)
        if not any(after):
            return None
        # What a function with a rule of its own does on the way to the result may read what the mask removes.
        is_raw = [(len(values) == 1 or form in after) and equation.primitive.name not in CUSTOM for form in forms]
        arrays = bind(equation, [_raw(value) if raw else _plain(value) for value, raw in zip(values, is_raw)])
        if after == forms:
            return [_with_value(*pair) for pair in zip(values, arrays)]
        kernels = {value.name: value for value in values if isinstance(value, Kernel)}
        names = frozenset().union(*map(_names, values))

        def remembered(form: Form, array: Any) -> Any:
            if isinstance(form, tuple):
                return kernels[form[0]].like(array, form[1])
            return _Computed(names, array) if form is None else _Constant(array, form)

        return [*map(remembered, after, arrays)]

    def _meet(self, convolutions: Sequence[Convolution]) -> None:
        for convolution in convolutions:
            for name in convolution.sources | {convolution.name} - {""}:
                self.met[name] = self.met.get(name, False) or not convolution.sources

    def _convolution(self, equation: Any, x: Any, weights: Any) -> Any:
        kernel = weights if isinstance(weights, Kernel) else None
        x = _plain(x)
        convolution = Convolution(equation, _names(weights), kernel=kernel)
        self._meet([convolution])
        result = self.replace(convolution, x)
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
            return self._inside(closed, values, arrays)

        def original(*arrays: Any) -> list[Any]:
            return bind(equation, [_plain(_with_value(*pair)) for pair in zip(values, arrays)])

        if equation.primitive.name == "custom_jvp_call":
            function = jax.custom_jvp(value)
            function.defjvp(lambda primals, tangents: jax.jvp(original, primals, tangents))
        else:
            function = jax.custom_vjp(value)
            function.defvjp(lambda *arrays: jax.vjp(original, *arrays), lambda pull, cotangents: pull(cotangents))
        return function(*(_raw(value) for value in values))

    def _inside(self, jaxpr: Any, values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
        """Arrays from a jaxpr of arrays in the place of what ``values`` remember."""
        arguments = [_with_value(*pair) for pair in zip(values, arrays)]
        return [_plain(result) for result in walk(jaxpr, arguments, self.step, _constant)]


def _inside(equation: Any, names: Sequence[frozenset[str]]) -> list[Convolution]:
    """The convolutions in the jaxprs of an equation, with the leaves of their kernels as far as they are known.

    Args:
        equation: a loop, a branch, a call.
        names: of the leaves that its operands are, or are computed from.
    """
    inside = equation.primitive.name
    found: list[Convolution] = []

    def handed(equation: Any, operands: Sequence[frozenset[str]]) -> frozenset[str]:
        for jaxpr in inner_jaxprs(equation):
            count = len(jaxpr.invars)
            # Loops and branches hand their last operands on in order; what stands before them is their own.
            known = operands[len(operands) - count :] if count <= len(operands) else [frozenset()] * count
            walk(jaxpr, known, step, lambda value: frozenset())
        return frozenset().union(*operands)

    def step(equation: Any, operands: list[frozenset[str]]) -> list[frozenset[str]]:
        if equation.primitive.name == CONVOLUTION:
            if operands[1]:
                found.append(Convolution(equation, operands[1], inside))
            return [frozenset()]
        return [handed(equation, operands)] * len(equation.outvars)

    handed(equation, names)
    return found
