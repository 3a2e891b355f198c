"""The four phases of one training run, in optimizer updates t = 0, 1, ... (method of the reference code).

    dense        t < select_step              ordinary training
    select       t = select_step              masks are chosen from this update's gradient; an ordinary update
    regularize   select_step < t < prune_step group lasso pushes what is marked; nothing is zero yet
    prune        t = prune_step               gradient at the unpruned weights; afterwards masked weights are 0
    pruned       t > prune_step               gradient, optimizer state and weights are masked
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp


class Phase(enum.IntEnum):
    """In the order of time. ``SELECT`` and ``PRUNE`` last one update."""

    DENSE = 0
    SELECT = 1
    REGULARIZE = 2
    PRUNE = 3
    PRUNED = 4


@dataclasses.dataclass(frozen=True)
class PhaseSchedule:
    """When each phase begins, in updates.

    Attributes:
        select_step: the update whose gradient decides the masks, >= 0.
        prune_step: the update after which the masked weights are zero, > select_step.

    Raises:
        ValueError: not integers, negative, or select_step >= prune_step.
    """

    select_step: int
    prune_step: int

    def __post_init__(self) -> None:
        for field in ("select_step", "prune_step"):
            value = getattr(self, field)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ValueError(f"{field}={value!r}: expected an integer number of updates")
            # Updates are counted in int32.
            if not 0 <= value < 2**31 - 1:
                raise ValueError(f"{field}={value}: expected 0 to 2**31 - 2 updates")
        if self.select_step >= self.prune_step:
            raise ValueError(
                f"select_step={self.select_step} is not before prune_step={self.prune_step}: "
                "masks are chosen first, pushed towards zero, then pruned"
            )

    @property
    def _starts(self) -> tuple[int, int, int, int]:
        """First updates of SELECT, REGULARIZE, PRUNE and PRUNED; two are equal when no update is regularised."""
        return self.select_step, self.select_step + 1, self.prune_step, self.prune_step + 1

    def phase(self, step: int) -> Phase:
        """The phase of update ``step``, for a loop that knows where it is."""
        return Phase(sum(step >= start for start in self._starts))

    def phase_index(self, step: Any) -> Any:
        """The same as an int32 scalar; ``step`` may be traced."""
        return sum((jnp.asarray(step >= start, jnp.int32) for start in self._starts), start=jnp.int32(0))

    def segments(self, start: int, stop: int) -> Iterator[tuple[Phase, int, int]]:
        """Split updates [start, stop) into runs ``(phase, first, end)`` of one phase each."""
        bounds = [start, *sorted({cut for cut in self._starts if start < cut < stop}), stop]
        for first, end in zip(bounds, bounds[1:]):
            if first < end:
                yield self.phase(first), first, end
