"""Updates called without jit: compiled once for the shapes they are given, rather than run operation by operation."""

import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
import optax

# What an inner optimizer may branch on in Python.
_CONSTANTS = (bool, str, bytes, enum.Enum)


def transformation(
    init: Callable[..., Any], update: Callable[..., Any], check: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation of ``update(grads, state, params, extra)``, compiled where that does the same.

    Inside another transformation, under ``jax.disable_jit``, and when something other than arrays, numbers and
    constants is passed (a function for a line search), it is called as it is. So is the first update of one whose
    ``init`` was never called: `optax.inject_hyperparams` makes a new one in every update, around its values, and a
    program of that one would serve no other.

    ``check(grads, params, extra)`` raises for what cannot be updated.
    """

    def with_constants(grads: Any, state: Any, params: Any, extra: dict[str, Any], constants: tuple) -> Any:
        return update(grads, state, params, extra | dict(constants))

    program, lasts = jax.jit(with_constants, static_argnums=4), False

    def first(params: Any) -> Any:
        nonlocal lasts
        lasts = True
        return init(params)

    def call(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        nonlocal lasts
        check(updates, params, extra)
        constants = tuple(sorted(item for item in extra.items() if isinstance(item[1], _CONSTANTS)))
        arrays = {name: value for name, value in extra.items() if not isinstance(value, _CONSTANTS)}
        leaves = jax.tree.leaves((updates, state, params, arrays))
        if not lasts or jax.config.jax_disable_jit or not all(map(_is_concrete, leaves)):
            lasts = True
            return update(updates, state, params, extra)
        return program(updates, state, params, arrays, constants)

    return optax.GradientTransformationExtraArgs(first, call)


def optimizer(inner: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer that a method stands around; its ``update`` takes any keyword.

    Raises:
        ValueError: no optax transformation.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise ValueError(f"inner is a {type(inner).__name__}: expected an optax transformation, such as optax.sgd(0.1)")
    return optax.with_extra_args_support(inner)


def branch(index: Any, ways: list[Callable[[], Any]]) -> Any:
    """`jax.lax.switch`, or ``jax.lax.cond`` for a bool; by Python where the index is there, which compiles nothing."""
    if not isinstance(index, jax.core.Tracer):
        return ways[int(index)]()
    if index.dtype == bool:
        return jax.lax.cond(index, ways[1], ways[0])
    return jax.lax.switch(index, ways)


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)) and not isinstance(
        leaf, jax.core.Tracer
    )
