"""What configs of methods share: what they may ask of a run, and the checks of their fields."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import clicktrain_jax as ct


class Run(NamedTuple):
    """What a method may ask of the run that it is made for.

    Attributes:
        inner: the plain optimizer.
        params: the net's, as `jax.ShapeDtypeStruct`.
        plan: of all prunable convolutions, for methods that read no fractions of it.
        prune_plan: of the config's `PruneConfig`; None without one.
        nodes: finds the net's groups of channels (`clicktrain_jax.channels`).
        steps_per_epoch: updates.
        epochs: of the dense run.
    """

    inner: Any
    params: Any
    plan: ct.Plan
    prune_plan: ct.Plan | None
    nodes: Callable[[], Any]
    steps_per_epoch: int
    epochs: int


def masks_in_state(params: Any, opt_state: Any) -> ct.Masks:
    """For a `Method` whose state holds its masks."""
    return ct.masks_of(opt_state)


def check(owner: str, value: float, field: str, low: float, high: float = math.inf) -> None:
    """Raise a ValueError that names ``OWNER.FIELD`` unless the value is finite and between the two."""
    if not (low <= value <= high and math.isfinite(value)):
        expected = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{owner}.{field}={value}: expected {expected}")
