"""What the device side of a run works on."""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """What an update changes.

    Attributes:
        step: int32 scalar, the number of updates done.
        params: the net's parameters.
        batch_stats: BatchNorm's statistics.
        opt_state: the optimizer's state; a `clicktrain_jax.ClickTrainState` where ClickTrain prunes.
        average: ``(params, batch_stats)`` averaged over the last epochs, where a run asks for it.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = ()


class Images(NamedTuple):
    """A set on the device: uint8 (N, H, W, C), int32 (N,)."""

    images: jax.Array
    labels: jax.Array


class Begun(NamedTuple):
    """An epoch that was saved within.

    Attributes:
        done: updates of it.
        metrics: float32 (updates an epoch, 2), as `experiments.train.step.Trainer.run_epoch` has them.
        facts: plain data: "line", what the epoch's line has so far; "ran" and "images_by_pattern" of the trainer.
    """

    done: int
    metrics: jax.Array
    facts: dict[str, Any]


class NonFinite(ArithmeticError):
    """Training met a NaN or an infinite value."""
