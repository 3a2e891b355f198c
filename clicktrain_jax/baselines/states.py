"""What the baselines' transformations have in common: checks of what they are given, and finding their state."""

import numbers
from typing import Any

import jax

from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import Tree, named_leaves


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


def check_update(name: str, plan: Plan, grads: Tree, params: Tree | None) -> None:
    """Raise a ValueError when an update lacks the parameters, or a planned layer its gradient."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(grads, state, params)")
    present = {leaf for leaf, grad in named_leaves(grads) if grad is not None}
    for layer in plan.layers:
        if layer.name not in present:
            raise ValueError(f"{layer.name!r} is in the plan, but it has no gradient")


def check_axes(name: str, plan: Plan) -> None:
    """Raise a ValueError for a plan of kernels that are not (kh, kw, cin, cout)."""
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
