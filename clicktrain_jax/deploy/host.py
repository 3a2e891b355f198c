"""A few small sums on the host: what is computed once with a net's variables is not worth an XLA program."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from clicktrain_jax.jaxprs import as_numpy, walk
from clicktrain_jax.trees import is_key


class _Unknown(Exception):
    """A step that is not written for NumPy here."""


def evaluate(function: Callable[[Any], dict[str, Any]], variables: Any) -> dict[str, Any]:
    """``jax.jit(function)(variables)``, by NumPy where all of it is float32 and of a few kinds of steps.

    To compile such a program, a line or two for each of a net's kernels, takes far longer than to run it.

    Args:
        function: returns arrays by name.
        variables: a tree of arrays.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(variables)
    try:
        results = walk(closed, [as_numpy(leaf) for leaf in jax.tree.leaves(variables)], _step)
    except _Unknown:
        return jax.jit(function)(variables)
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(shapes), list(map(as_numpy, results))))


def _step(equation: Any, operands: list[Any]) -> list[np.ndarray] | None:
    name = equation.primitive.name
    if name in ("jit", "pjit"):
        return None
    if any(map(is_key, operands)):
        raise _Unknown
    # A literal may be a number without a dtype.
    arrays = [np.asarray(value, atom.aval.dtype) for value, atom in zip(operands, equation.invars)]
    # In 16 bits XLA keeps more digits between two steps than NumPy does.
    if name not in _STEPS or any(array.dtype != np.float32 for array in arrays):
        raise _Unknown
    result = np.asarray(_STEPS[name](equation.params, *arrays))
    aval = equation.outvars[0].aval
    if (result.shape, result.dtype) != (aval.shape, aval.dtype):
        raise _Unknown
    return [result]


def _broadcast(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape, axes = params["shape"], params["broadcast_dimensions"]
    sizes = dict(zip(axes, x.shape))
    return np.broadcast_to(x.reshape([sizes.get(axis, 1) for axis in range(len(shape))]), shape)


def _reshape(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    if params.get("dimensions") is not None:
        raise _Unknown
    return x.reshape(params["new_sizes"])


_STEPS: dict[str, Callable[..., Any]] = {
    "add": lambda params, x, y: x + y,
    "sub": lambda params, x, y: x - y,
    "mul": lambda params, x, y: x * y,
    "div": lambda params, x, y: x / y,
    "neg": lambda params, x: -x,
    "sqrt": lambda params, x: np.sqrt(x),
    "rsqrt": lambda params, x: 1 / np.sqrt(x),
    "copy": lambda params, x: x,
    "convert_element_type": lambda params, x: x.astype(params["new_dtype"]),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": lambda params, x: x.reshape([n for i, n in enumerate(x.shape) if i not in params["dimensions"]]),
    "transpose": lambda params, x: x.transpose(params["permutation"]),
}
