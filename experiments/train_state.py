"""What the device side of a run works on."""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        step: int32 scalar, the number of updates done.
        params: the net's parameters.
        batch_stats: BatchNorm's statistics.
        opt_state: the optimizer's state.
        scores: sums of scores for the next selection, float32 by leaf name; empty when a selection takes one update's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    scores: dict[str, jax.Array]


class Images(NamedTuple):
    """A set on the device: uint8 (N, H, W, C), int32 (N,)."""

    images: jax.Array
    labels: jax.Array


class Held(NamedTuple):
    """What an update is given of a selection: `clicktrain_jax.Masks`, and structures by path, empty when dense."""

    masks: Any
    structures: dict[str, Any]


class NonFinite(ArithmeticError):
    """Training met a NaN or an infinite value."""
