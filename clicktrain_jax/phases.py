"""The four phases of one training run, in optimizer updates t = 0, 1, ... (method of the reference code).

    dense        t < select_step              ordinary training
    select       t = select_step              masks are chosen from this update's gradient; an ordinary update
    regularize   select_step < t < prune_step group lasso pushes what is marked; nothing is zero yet
    prune        t = prune_step               gradient at the unpruned weights; afterwards masked weights are 0
    pruned       t > prune_step               gradient, optimizer state and weights are masked

Two additions of this project: scores may be gathered over the ``importance_steps`` updates that end with a
selection, and masks may be selected a second time, at ``reselect_step``, while the lasso is on.
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp


class Phase(enum.IntEnum):
    """In the order of time. ``SELECT`` and ``PRUNE`` last one update; ``REGULARIZE`` goes on after a reselection."""

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
        reselect_step: the update that chooses the masks anew, between the two; None for never.
        importance_steps: scores are the mean over so many updates, a selecting one being the last.

    Raises:
        ValueError: not integers, negative, out of order, or fewer updates than the scores need.
    """

    select_step: int
    prune_step: int
    reselect_step: int | None = None
    importance_steps: int = 1

    def __post_init__(self) -> None:
        for field in ("select_step", "prune_step", "reselect_step", "importance_steps"):
            value = getattr(self, field)
            if value is None and field == "reselect_step":
                continue
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
        if not 1 <= self.importance_steps <= self.select_step + 1:
            raise ValueError(
                f"importance_steps={self.importance_steps}: expected 1 to {self.select_step + 1}, the updates up to "
                f"select_step={self.select_step}; select later or take fewer"
            )
        if self.reselect_step is not None and not (
            self.select_step + self.importance_steps <= self.reselect_step < self.prune_step
        ):
            raise ValueError(
                f"reselect_step={self.reselect_step}: expected it before prune_step={self.prune_step} and at least "
                f"importance_steps={self.importance_steps} after select_step={self.select_step}"
            )

    @property
    def selections(self) -> tuple[int, ...]:
        """The updates that choose masks."""
        return (self.select_step,) if self.reselect_step is None else (self.select_step, self.reselect_step)

    @property
    def _starts(self) -> tuple[tuple[Phase, int], ...]:
        """First updates of the phases after DENSE; two are equal when no update is regularised."""
        chosen = [pair for step in self.selections for pair in ((Phase.SELECT, step), (Phase.REGULARIZE, step + 1))]
        return (*chosen, (Phase.PRUNE, self.prune_step), (Phase.PRUNED, self.prune_step + 1))

    def phase(self, step: int) -> Phase:
        """The phase of update ``step``, for a loop that knows where it is."""
        return next((phase for phase, start in reversed(self._starts) if step >= start), Phase.DENSE)

    def phase_index(self, step: Any) -> Any:
        """The same as an int32 scalar; ``step`` may be traced."""
        index = jnp.int32(Phase.DENSE)
        for phase, start in self._starts:
            index = jnp.where(jnp.asarray(step) >= start, jnp.int32(phase), index)
        return index

    def gathers(self, step: Any) -> Any:
        """Whether update ``step`` adds its scores to a sum for a later one; ``step`` may be traced."""
        found = False
        for selection in self.selections:
            found = found | (selection - self.importance_steps < step) & (step < selection)
        return found

    def segments(self, start: int, stop: int) -> Iterator[tuple[Phase, bool, int, int]]:
        """Split updates [start, stop) into runs ``(phase, gathers, first, end)`` that are alike."""
        gathering = [cut for step in self.selections for cut in (step - self.importance_steps + 1, step)]
        cuts = {first for _, first in self._starts} | set(gathering)
        bounds = [start, *sorted(cut for cut in cuts if start < cut < stop), stop]
        for first, end in zip(bounds, bounds[1:]):
            if first < end:
                yield self.phase(first), bool(self.gathers(first)), first, end
