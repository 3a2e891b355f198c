"""What may be done to a parameter on its way to a convolution so that its mask is still known."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Operand i becomes result i, at the same places and zero where it was zero.
PASSING = frozenset(
    """convert_element_type copy copy_p device_put mesh_cast name optimization_barrier pcast pvary reduce_precision
    reshard sharding_constraint""".split()
)
# Entries change their places: the parameter that tells where, and the same done to a mask.
_MOVES: dict[str, tuple[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]]] = {
    "transpose": ("permutation", np.transpose),
    "reshape": ("new_sizes", np.reshape),
    "rev": ("dimensions", np.flip),
    "squeeze": ("dimensions", np.squeeze),
}

# (operation, its parameter) of each move since the leaf.
Moves = tuple[tuple[str, tuple[int, ...]], ...]


def moves_of(equation: Any) -> Moves | None:
    """What an operation that moves entries does; None for any other."""
    name = equation.primitive.name
    if name not in _MOVES or (name == "reshape" and equation.params["dimensions"] is not None):
        return None
    return ((name, tuple(equation.params[_MOVES[name][0]])),)


def moved(mask: np.ndarray, moves: Moves) -> np.ndarray:
    """The mask of a leaf as its entries stand after the moves."""
    for name, value in moves:
        mask = _MOVES[name][1](mask, value)
    return mask


def factor_of(equation: Any, is_kernel: Sequence[bool], shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Which operand of a product the result is a scaled form of; None if of none.

    What is zero stays zero, whatever it is multiplied with; a divisor alone is no factor.
    """
    name = equation.primitive.name
    places = {"mul": (0, 1), "div": (0,), "neg": (0,)}.get(name, ())
    shape = equation.outvars[0].aval.shape
    return next((place for place in places if is_kernel[place] and tuple(shapes[place]) == shape), None)
