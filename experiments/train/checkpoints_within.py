"""Checkpoints within epochs, for epochs that take hours.

One holds the state, what the epoch's updates said so far, and the beginnings of the epoch's line. Of the data it holds
nothing: order of images, crops and all else that chance decides follow from the seed and the number of updates done, on
any number of devices and processes.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.train.checkpoints import Checkpoints
from experiments.train.state import TrainState


class Within:
    """A run's checkpoints within epochs; their numbers count updates.

    Args:
        path: their folder.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoints = Checkpoints(path)

    def save(self, state: TrainState, metrics: jax.Array, facts: dict[str, Any]) -> None:
        """Write one, after the update that the state counts; the one before goes."""
        self._checkpoints.save(int(state.step), (state, metrics), facts)

    def newest(self, after: int, template: Callable[[dict[str, Any]], Any]) -> tuple[int, Any, dict[str, Any]] | None:
        """``(updates done, (state, metrics), facts)`` of the newest one; None where there is none.

        Args:
            after: updates; whoever has saved more of them since has no use for one.
            template: as `Checkpoints.restore_newest` wants it, of (state, metrics), from the facts.

        Warns:
            UserWarning: it cannot be read.
        """
        if max(self._checkpoints.numbers(), default=0) <= after:
            return None
        try:
            number, tree = self._checkpoints.restore_newest(lambda number: template(self._checkpoints.facts(number)))
        except ValueError as error:
            self.clear()  # a later number than those to come would keep orbax from saving them
            warnings.warn(f"{error}: the run goes on from the epoch's begin", stacklevel=2)
            return None
        return number, tree, self._checkpoints.facts(number)

    def clear(self) -> None:
        """Take them away: the epoch is saved as a whole."""
        self._checkpoints.clear()

    def close(self) -> None:
        """Release what orbax holds."""
        self._checkpoints.close()
