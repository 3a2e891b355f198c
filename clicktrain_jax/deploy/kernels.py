"""What may be done to a parameter on its way to a convolution so that its mask is still known."""

import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax.core
import numpy as np

from clicktrain_jax.jaxprs import CALLS, walk
from clicktrain_jax.trees import is_key

# Operand i becomes result i, at the same places and zero where it was zero.
_PASSING = frozenset(
    """convert_element_type copy copy_p device_put mesh_cast name optimization_barrier pcast pvary reduce_precision
    reshard sharding_constraint stop_gradient""".split()
)
# Functions of one number that are zero at zero.
_ZERO_AT_ZERO = frozenset(
    """abs asin asinh atan atanh cbrt ceil erf expm1 floor log1p neg round sign sin sinh sqrt square tan tanh""".split()
)
# Entries change their places: the parameter that tells where, and the same done to a mask.
_MOVES: dict[str, tuple[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]]] = {
    "transpose": ("permutation", np.transpose),
    "reshape": ("new_sizes", np.reshape),
    "rev": ("dimensions", np.flip),
    "squeeze": ("dimensions", np.squeeze),
}
# Functions with a derivative of their own: what they compute stands in a jaxpr.
CUSTOM = frozenset("custom_jvp_call custom_vjp_call".split())

# (operation, its parameter) of each move since the leaf.
Moves = tuple[tuple[str, tuple[int, ...]], ...]


class Sign(enum.Enum):
    """Of all numbers of a constant array."""

    NEGATIVE = -1
    ZERO = 0
    POSITIVE = 1


# What an array is: a leaf's name and its moves since, zero where the leaf is; a constant; or None for anything else.
Form = tuple[str, Moves] | Sign | None


def moved(mask: np.ndarray, moves: Moves) -> np.ndarray:
    """The mask of a leaf as its entries stand after the moves."""
    for name, value in moves:
        mask = _MOVES[name][1](mask, value)
    return mask


def form_of_constant(value: Any) -> Form:
    """The form of a literal, or of a constant of a jaxpr."""
    if isinstance(value, jax.core.Tracer) or np.size(value) != 1 or is_key(value):
        return None
    number = np.asarray(value).reshape(())
    return next((sign for sign in Sign if number.dtype.kind in "biuf" and np.sign(+float(number)) == sign.value), None)


def forms_after(equation: Any, forms: Sequence[Form]) -> list[Form]:
    """The forms of an operation's results, of the forms of its operands.

    What is zero stays zero, whatever it is multiplied with; a divisor alone is no factor. Fake quantisation and
    straight-through estimators are made of such steps: ``w + stop_gradient(round(w / s) * s - w)``.
    """
    name, results = equation.primitive.name, equation.outvars
    nothing: list[Form] = [None] * len(results)
    if name in _PASSING and len(forms) == len(results):
        return list(forms)
    if name in CUSTOM:
        return walk(equation.params["call_jaxpr"], list(forms), _step, form_of_constant)
    is_leaf = [form is not None and not isinstance(form, Sign) for form in forms]
    if len(results) != 1 or not any(is_leaf):
        return list(forms) if name == "broadcast_in_dim" and isinstance(forms[0], Sign) else nothing
    first, shape = forms[0], results[0].aval.shape
    if name in _MOVES and isinstance(first, tuple):
        if name == "reshape" and equation.params["dimensions"] is not None:
            return nothing
        return [(first[0], (*first[1], (name, tuple(equation.params[_MOVES[name][0]]))))]
    # Of what is broadcast the mask would be another.
    same = [leaf and atom.aval.shape == shape for leaf, atom in zip(is_leaf, equation.invars)]
    whole = [form if fits else None for form, fits in zip(forms, same)]
    if name in _ZERO_AT_ZERO or name == "div" or (name == "integer_pow" and equation.params["y"] > 0):
        return whole[:1]
    below, above = ({Sign.ZERO, sign} for sign in (Sign.NEGATIVE, Sign.POSITIVE))
    if name == "clamp":
        return whole[1:2] if forms[0] in below and forms[2] in above else nothing
    # A clip about zero keeps it.
    keeps = {"mul": True, "max": not below.isdisjoint(forms), "min": not above.isdisjoint(forms)}
    if keeps.get(name):
        return [next((form for form in whole if form is not None), None)]
    cases = {"add": forms, "sub": forms, "max": forms, "min": forms, "select_n": forms[1:]}.get(name, ())
    kinds = set(cases) - {Sign.ZERO}
    # `where(mask, kernel, 0)`, as in `apply_masks`: zeros more than there were.
    return list(kinds) if len(kinds) == 1 and kinds <= set(whole) else nothing


def _step(equation: Any, forms: list[Form]) -> list[Form] | None:
    return None if equation.primitive.name in CALLS else forms_after(equation, forms)
