"""Jaxprs and the one way through them: an equation at a time, on whatever stands for the values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np

from clicktrain_jax.trees import is_key

CONVOLUTION = "conv_general_dilated"
# The parameters of a convolution that this package knows: each is passed on, or the convolution is left as it is.
PARAMETERS = frozenset(
    """window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count batch_group_count
    precision preferred_element_type""".split()
)
# Operations that call a jaxpr, and the parameter that it is: without a gradient, all of them just run it.
CALLS = dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), "jaxpr")
CALLS |= dict.fromkeys(
    ("closed_call", "core_call", "core_closed_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"
)

# What a walk does with an equation: (equation, what stands for its operands) -> what stands for its results; None where
# it has nothing to say.
Step = Callable[[Any, list[Any]], Sequence[Any] | None]


def walk(
    jaxpr: Any, arguments: Sequence[Any], step: Step | None = None, constant: Callable[[Any], Any] | None = None
) -> list[Any]:
    """What stands for the results of a jaxpr.

    Args:
        jaxpr: closed, or open without constants.
        arguments: what stands for its arguments: arrays, or values of any kind that ``step`` knows.
        step: asked first for each equation. Where it gives None, a call's jaxpr is walked through in the place of the
            call, and any other equation is computed.
        constant: what stands for a literal or a constant of the jaxpr; None: its value.
    """
    jaxpr, consts = opened(jaxpr)
    constant = constant or (lambda value: value)
    values = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return constant(atom.val) if is_literal(atom) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        with equation.ctx.manager:
            results = None if step is None else step(equation, operands)
            if results is None:
                inner = equation.params.get(CALLS.get(equation.primitive.name))
                results = bind(equation, operands) if inner is None else walk(inner, operands, step, constant)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(equation: Any, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """The results of an equation for other operands, and with some of its parameters changed."""
    params = equation.primitive.get_bind_params({**equation.params, **changed})
    results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def unknown_parameters(params: Mapping[str, Any]) -> str:
    """What a convolution says that is not passed on: ``out_sharding``, what later versions of jax add; or empty."""
    return ", ".join(f"{name}={params[name]!r}" for name in sorted(params.keys() - PARAMETERS) if params[name])


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """``(open jaxpr, constants)`` of a jaxpr that may be closed."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def inner_jaxprs(equation: Any) -> list[Any]:
    """The jaxprs in an equation's parameters, opened."""
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            jaxpr, _ = opened(item)
            if hasattr(jaxpr, "eqns") and hasattr(jaxpr, "invars"):
                found.append(jaxpr)
    return found


def as_numpy(array: Any) -> Any:
    """NumPy's form of an array; typed random keys stay as they are."""
    return array if is_key(array) else np.asarray(array)


def is_literal(atom: Any) -> bool:
    """Whether an operand is a value, not a variable."""
    return isinstance(atom, jax.extend.core.Literal)
