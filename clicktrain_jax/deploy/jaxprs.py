"""Reading jaxprs: one equation bound again, and functions without calls."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core

CONVOLUTION = "conv_general_dilated"
# Operations that call a jaxpr, and the parameter that it is: without a gradient, all of them just run it.
_CALLS = dict.fromkeys(("jit", "pjit", "checkpoint", "remat", "remat2"), "jaxpr")
_CALLS |= dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr")


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation for other operands."""
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return list(results) if equation.primitive.multiple_results else [results]


def traced(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """`jax.make_jaxpr` with the shapes of the results; convolutions that are left open stand in it as XLA's.

    A net may use `pallas_kernels.dense_conv` and `pattern_conv` itself: what they run natively here would be no
    convolution for whoever reads the jaxpr, and nothing that another machine runs.
    """
    from pallas_kernels import native

    with native.portable():
        return jax.make_jaxpr(function, return_shape=True)(*arguments)


def flattened(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """``(closed jaxpr, shapes of the results)`` of a function, with the jaxprs that it calls in the place of the calls.

    Rules for derivatives are lost with the calls. Loops and branches stay.
    """
    closed, out = traced(function, *arguments)
    flat = jax.make_jaxpr(lambda *leaves: _inlined(closed.jaxpr, closed.consts, leaves))
    return flat(*jax.tree.leaves(arguments)), out


def _inlined(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for equation in jaxpr.eqns:
        operands = [atom.val if is_literal(atom) else values[atom] for atom in equation.invars]
        inner = equation.params.get(_CALLS.get(equation.primitive.name))
        if inner is None:
            results = bind(equation, operands)
        else:
            results = _inlined(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
        values.update(zip(equation.outvars, results, strict=True))
    return [atom.val if is_literal(atom) else values[atom] for atom in jaxpr.outvars]


def is_literal(atom: Any) -> bool:
    """Whether an operand is a value, not a variable."""
    return isinstance(atom, jax.extend.core.Literal)
