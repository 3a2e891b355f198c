"""The four phases of one training run, in optimizer updates t = 0, 1, ... (method of the reference code).

    dense        t < select_step              ordinary training
    select       t = select_step              masks are chosen from this update's gradient; an ordinary update
    regularize   select_step < t < prune_step group lasso pushes what is marked; nothing is zero yet
    prune        t = prune_step               gradient at the unpruned weights; afterwards masked weights are 0
    pruned       t > prune_step               gradient, optimizer state and weights are masked

Additions of this project: scores may be gathered over the ``importance_steps`` updates that end with a selection, and
masks may be selected anew while the lasso is on: at ``reselect_step``, or every ``reselect_every`` updates, so that
what was marked and has grown since is kept after all.

That is how a run goes as planned. Whether masks stand is a fact of the run, not arithmetic on its step: a selection is
due from its step on until it is done. An update whose scores are not finite adds none and selects nothing, so it
postpones the selection by one; the mean is over ``importance_steps`` finite updates all the same. Scores that were
gathered before a window begins (a run resumed with a later selection) do not count in it. The prune comes at its step
at the earliest, and at least one update after the last selection.
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.core import Tracer


class Phase(enum.IntEnum):
    """In the order of time. ``SELECT`` and ``PRUNE`` last one update; ``REGULARIZE`` goes on after a reselection."""

    DENSE = 0
    SELECT = 1
    REGULARIZE = 2
    PRUNE = 3
    PRUNED = 4


class Due(NamedTuple):
    """What an update is to do: bools, traced where the facts or the schedule are. At most one of all but ``gathers``
    and ``forgets``.

    Attributes:
        gathers: its scores count for a selection later on.
        selects: it chooses the masks.
        regularizes: its gradient gets the group lasso.
        prunes: masked weights are zero after it.
        pruned: its gradient is masked too.
        forgets: the scores gathered so far are from before this selection's window; they are dropped.
    """

    gathers: Any
    selects: Any
    regularizes: Any
    prunes: Any
    pruned: Any
    forgets: Any

    @property
    def phase(self) -> Phase:
        """Of concrete ones."""
        marks = (self.selects, self.regularizes, self.prunes, self.pruned)
        return Phase(sum(mark * phase for phase, mark in enumerate(marks, start=1)))


@dataclasses.dataclass(frozen=True)
class PhaseSchedule:
    """When each phase begins, in updates.

    Attributes:
        select_step: the update whose gradient decides the masks, >= 0.
        prune_step: the update after which the masked weights are zero, > select_step.
        reselect_step: the update that chooses the masks anew, between the two; None for never.
        importance_steps: scores are the mean over so many updates, a selecting one being the last.
        reselect_every: masks are chosen anew so many updates after each selection, as long as the prune is later;
            None for never. Instead of ``reselect_step``.

    Raises:
        ValueError: not integers, negative, out of order, or fewer updates than the scores need.
    """

    select_step: int
    prune_step: int
    reselect_step: int | None = None
    importance_steps: int = 1
    reselect_every: int | None = None

    def __post_init__(self) -> None:
        steps = ("select_step", "prune_step", "reselect_step", "importance_steps", "reselect_every")
        if any(isinstance(getattr(self, field), Tracer) for field in steps):
            return  # hyperparameters that optax has injected: nothing can be said of them
        for field in steps:
            value = getattr(self, field)
            if value is None and field.startswith("reselect"):
                continue
            if value is None or isinstance(value, bool) or not hasattr(value, "__index__"):
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
        if self.reselect_every is not None and (
            self.reselect_step is not None or self.reselect_every < self.importance_steps
        ):
            raise ValueError(
                f"reselect_every={self.reselect_every}: expected at least importance_steps={self.importance_steps}, "
                f"and no reselect_step beside it, got {self.reselect_step}"
            )
        if self.reselect_step is not None and not (
            self.select_step + self.importance_steps <= self.reselect_step < self.prune_step
        ):
            raise ValueError(
                f"reselect_step={self.reselect_step}: expected it before prune_step={self.prune_step} and at least "
                f"importance_steps={self.importance_steps} after select_step={self.select_step}"
            )

    def due(self, count: Any, selected: Any, pruned: Any, gathered: Any) -> Due:
        """What the next update is to do, from facts of a `clicktrain_jax.ClickTrainState`; ints, or traced ones.

        Args:
            count: updates done.
            selected: the update that chose the masks; -1 for none yet.
            pruned: the update that pruned; -1 for none yet.
            gathered: how many updates' scores are in the sums.
        """
        chosen, is_pruned = selected >= 0, pruned >= 0
        begin = self.select_step - self.importance_steps + 1
        first = (selected < 0) & (count >= begin)
        forgets = (selected < 0) & (gathered > count - begin)
        again, waits, coming = False, False, 0
        if self.reselect_step is not None:
            coming = self.reselect_step
            waits = chosen & (selected < coming) & (pruned < 0)
        elif self.reselect_every is not None:
            coming = selected + self.reselect_every
            waits = chosen & (coming < self.prune_step) & (pruned < 0)
        if waits is not False:
            begin = coming - self.importance_steps + 1
            again = waits & (count >= begin)
            forgets |= waits & (gathered > count - begin)
        forgets &= gathered > 0
        full = (gathered + 1 >= self.importance_steps) & (forgets ^ True)
        selects = full & (first & (count >= self.select_step) | again & (count >= coming))
        prunes = chosen & (pruned < 0) & (count >= self.prune_step) & (waits ^ True)
        ordinary = selects | prunes | is_pruned
        # Not ~, which makes -2 of Python's True.
        return Due((first | again) & (selects ^ True), selects, chosen & (ordinary ^ True), prunes, is_pruned, forgets)

    def planned(self, step: int) -> tuple[int, int, int]:
        """``(selected, pruned, gathered)`` before update ``step`` of a run that goes as planned."""
        selections = [at for at in (self.select_step, self.reselect_step) if at is not None]
        if self.reselect_every is not None:
            selections = list(range(self.select_step, self.prune_step, self.reselect_every))
        selected = max((at for at in selections if at < step), default=-1)
        coming = min((at for at in selections if at >= step), default=step + self.importance_steps)
        return (
            selected,
            self.prune_step if self.prune_step < step else -1,
            max(0, step - (coming - self.importance_steps + 1)),
        )

    def phase(self, step: int) -> Phase:
        """The phase of update ``step`` of a run that goes as planned."""
        return self.due(step, *self.planned(step)).phase

    def segments(
        self, start: int, stop: int, facts: tuple[int, int, int] | None = None
    ) -> Iterator[tuple[Phase, bool, int, int]]:
        """Split updates [start, stop) into runs ``(phase, gathers, first, end)`` that are alike.

        Args:
            start: updates done.
            stop: the first update that is not asked for.
            facts: ``(selected, pruned, gathered)`` before ``start``; by default as planned. All scores from there on
                are taken to be finite.
        """
        selected, pruned, gathered = self.planned(start) if facts is None else facts
        first, current = start, None
        for count in range(start, stop):
            due = self.due(count, selected, pruned, gathered)
            gathered = (0 if due.forgets or due.selects else gathered) + due.gathers
            selected, pruned = count if due.selects else selected, count if due.prunes else pruned
            kind = due.phase, bool(due.gathers)
            if current is not None and current != kind:
                yield current[0], current[1], first, count
                first = count
            current = kind
        if current is not None:
            yield current[0], current[1], first, stop
