"""Updates called without jit: compiled once for the shapes they are given, rather than run operation by operation."""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np

# What an inner optimizer may branch on in Python.
_CONSTANTS = (bool, str, bytes, enum.Enum)


def compiled(update: Callable[..., Any]) -> Callable[..., Any]:
    """``update(grads, state, params, extra)``, compiled where that can be seen to do the same.

    Inside another transformation, under ``jax.disable_jit``, and when something other than arrays, numbers and
    constants is passed (a function for a line search), it is called as it is.
    """

    def with_constants(grads: Any, state: Any, params: Any, extra: dict[str, Any], constants: tuple) -> Any:
        return update(grads, state, params, extra | dict(constants))

    program = jax.jit(with_constants, static_argnums=4)

    def call(grads: Any, state: Any, params: Any, extra: dict[str, Any]) -> Any:
        constants = tuple(sorted(item for item in extra.items() if isinstance(item[1], _CONSTANTS)))
        arrays = {name: value for name, value in extra.items() if not isinstance(value, _CONSTANTS)}
        leaves = jax.tree.leaves((grads, state, params, arrays))
        if jax.config.jax_disable_jit or not all(map(_is_concrete, leaves)):
            return update(grads, state, params, extra)
        return program(grads, state, params, arrays, constants)

    return call


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)) and not isinstance(
        leaf, jax.core.Tracer
    )
