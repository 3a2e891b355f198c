"""What the methods' transformations have in common: checks of what they are given, and the forms of it."""

import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax.masks import LayerMask
from clicktrain_jax.plan import Plan, check_plan
from clicktrain_jax.states import fill_masks
from clicktrain_jax.trees import Tree, named_leaves

MaskDict = dict[str, jax.Array]


def single_weights(masks: MaskDict) -> dict[str, LayerMask]:
    """Masks of single weights by leaf name, bool in the leaves' own shapes, in the form of a state's."""
    return {name: LayerMask(None, mask, None) for name, mask in masks.items()}


def masks_tree(like: Tree, masks: MaskDict) -> Tree:
    """The same, as a state holds them."""
    return fill_masks(like, single_weights(masks))


def find_state(opt_state: Any, kind: type, what: str) -> Any:
    """The one state of a kind inside an optimizer state.

    Args:
        opt_state: chained, wrapped, of an ``nnx.Optimizer``, or restored from a checkpoint without a template, when
            NamedTuples have become dictionaries.
        kind: the NamedTuple looked for.
        what: what makes such a state, for the error.

    Returns:
        A ``kind``.

    Raises:
        ValueError: no such state, or several.
    """
    fields = set(kind._fields)

    def is_state(node: Any) -> bool:
        return isinstance(node, kind) or (isinstance(node, dict) and set(node) == fields)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(f"expected an optimizer state with one of {what} inside, found {len(found)}")
    return kind(**found[0]) if isinstance(found[0], dict) else found[0]


def check_update(name: str, plan: Plan, grads: Tree, params: Tree | None, extra: dict[str, Any]) -> None:
    """Raise a ValueError when an update lacks the parameters, or a planned layer its gradient."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(grads, state, params)")
    present = {leaf for leaf, grad in named_leaves(grads) if grad is not None}
    for layer in plan.layers:
        if layer.name not in present:
            raise ValueError(f"{layer.name!r} is in the plan, but it has no gradient")


def check_axes(name: str, plan: Plan) -> None:
    """Raise a ValueError for a plan of kernels that are not (kh, kw, cin, cout)."""
    check_plan(plan)
    if plan.axes != "HWIO":
        raise ValueError(
            f"{name} takes kernels (kh, kw, cin, cout); the plan's are {plan.axes}: transpose them, "
            "kernel.transpose(2, 3, 1, 0)"
        )


def planned(tree: Tree, plan: Plan) -> dict[str, Any]:
    """The planned layers' leaves of a tree, by name."""
    leaves = dict(named_leaves(tree))
    return {layer.name: leaves[layer.name] for layer in plan.layers}


def check_integer(field: str, value: Any, least: int) -> int:
    """The value as an int.

    Raises:
        ValueError: no integer, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{field}={value!r}: expected an integer >= {least}")
    return int(value)


def check_key(key: Any) -> None:
    """Raise a ValueError for what is no key of jax's."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"key={key!r}: expected a key of jax's, such as jax.random.key(0)")


def is_share(value: Any) -> bool:
    """True for a real number in [0, 1]."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def shares_at(field: str, schedule: optax.Schedule, steps: Iterable[int]) -> list[float]:
    """What a schedule says at some updates, worked out now.

    Raises:
        ValueError: a value outside [0, 1], or no number.
    """
    found = []
    with jax.ensure_compile_time_eval():
        for step in steps:
            value = schedule(step)
            if jnp.ndim(value) or not is_share(float(np.asarray(value))):
                raise ValueError(f"{field} is {value!r} in update {step}: expected a share in [0, 1]")
            found.append(float(np.asarray(value)))
    return found
