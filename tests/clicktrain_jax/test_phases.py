"""The phase schedule, all three ways to read it, against the table in method.md."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clicktrain_jax import Phase, PhaseSchedule
from clicktrain_jax.phases import Due

SCHEDULES = [(0, 1), (0, 3), (2, 3), (2, 4), (2, 7)]
STOP = 10


def expected_phase(step, select_step, prune_step):
    if step < select_step:
        return Phase.DENSE
    if step == select_step:
        return Phase.SELECT
    if step < prune_step:
        return Phase.REGULARIZE
    return Phase.PRUNE if step == prune_step else Phase.PRUNED


@pytest.mark.parametrize("steps", SCHEDULES)
def test_host_and_device_agree(steps):
    schedule = PhaseSchedule(*steps)
    expected = [expected_phase(step, *steps) for step in range(STOP)]
    assert [schedule.phase(step) for step in range(STOP)] == expected
    facts = jnp.asarray([schedule.planned(step) for step in range(STOP)]).T
    marks = jax.jit(schedule.due)(jnp.arange(STOP), *facts)
    assert all(mark.dtype == bool for mark in marks)
    assert [Due(*each).phase for each in zip(*map(np.asarray, marks))] == expected


@pytest.mark.parametrize("steps", SCHEDULES)
def test_segments_cover_every_range(steps):
    schedule = PhaseSchedule(*steps)
    for start in range(STOP):
        for stop in range(start, STOP):
            runs = list(schedule.segments(start, stop))
            flat = [(phase, step) for phase, _, first, end in runs for step in range(first, end)]
            assert flat == [(expected_phase(step, *steps), step) for step in range(start, stop)]
            assert all(first < end for _, _, first, end in runs)
            phases = [phase for phase, _, _, _ in runs]
            assert len(set(phases)) == len(phases)


def test_no_regularized_update_when_the_prune_follows_at_once():
    phases = [PhaseSchedule(3, 4).phase(step) for step in range(6)]
    assert phases == [Phase.DENSE] * 3 + [Phase.SELECT, Phase.PRUNE, Phase.PRUNED]


@pytest.mark.parametrize(
    ("prune_step", "every", "scores", "selected"),
    [(9, 3, 1, [2, 5, 8]), (8, 3, 2, [2, 5]), (4, 3, 1, [2]), (6, 1, 1, [2, 3, 4, 5])],
)
def test_masks_are_chosen_anew_until_the_prune(prune_step, every, scores, selected):
    schedule = PhaseSchedule(2, prune_step, importance_steps=scores, reselect_every=every)
    phases = [schedule.phase(step) for step in range(12)]
    assert [step for step, phase in enumerate(phases) if phase is Phase.SELECT] == selected
    assert [step for step, phase in enumerate(phases) if phase is Phase.PRUNE] == [prune_step]
    assert phases[:2] == [Phase.DENSE] * 2 and set(phases[prune_step + 1 :]) == {Phase.PRUNED}
    gathers = [step for _, gathers, first, end in schedule.segments(0, 12) for step in range(first, end) if gathers]
    assert gathers == [step - 1 for step in selected if scores == 2]
    # On a device, and put off by scores that are not finite: the next one is so many updates after it.
    facts = jnp.asarray([schedule.planned(step) for step in range(12)]).T
    marks = jax.jit(schedule.due)(jnp.arange(12), *facts)
    assert [Due(*each).phase for each in zip(*map(np.asarray, marks))] == phases
    late = schedule.segments(4, 12, (3, -1, 0))
    again = [first for phase, _, first, _ in late if phase is Phase.SELECT]
    assert again[:1] == [step for step in (3 + every,) if step < prune_step]


def test_reselecting_twice_over_is_refused():
    with pytest.raises(ValueError, match="no reselect_step beside it, got 4"):
        PhaseSchedule(2, 8, reselect_step=4, reselect_every=2)
    with pytest.raises(ValueError, match="reselect_every=1: expected at least importance_steps=2"):
        PhaseSchedule(2, 8, importance_steps=2, reselect_every=1)


def test_steps_may_be_numpy_integers():
    assert PhaseSchedule(np.int64(1), np.int32(2)).phase(np.int64(2)) is Phase.PRUNE


@pytest.mark.parametrize(
    ("select_step", "prune_step", "message"),
    [
        (3, 3, "select_step=3 is not before prune_step=3"),
        (4, 3, "select_step=4 is not before prune_step=3"),
        (-1, 3, "select_step=-1: expected 0 to 2"),
        (1.0, 3, "select_step=1.0: expected an integer"),
        (0, True, "prune_step=True: expected an integer"),
        (0, None, "prune_step=None: expected an integer"),
    ],
)
def test_bad_steps(select_step, prune_step, message):
    with pytest.raises(ValueError, match=message):
        PhaseSchedule(select_step, prune_step)


def due(schedule, count, selected, pruned, gathered):
    found = schedule.due(count, selected, pruned, gathered)
    return found.phase.name, bool(found.gathers)


def test_what_is_due_when_a_run_does_not_go_as_planned():
    schedule = PhaseSchedule(2, 5)
    assert due(schedule, 4, -1, -1, 0) == ("SELECT", False)
    assert due(schedule, 7, 6, -1, 0) == ("PRUNE", False)
    assert due(schedule, 1, 0, 1, 0) == ("PRUNED", False)
    schedule = PhaseSchedule(2, 8, reselect_step=5, importance_steps=2)
    # The first window, with an update that was not finite.
    assert [due(schedule, *facts) for facts in ((1, -1, -1, 0), (2, -1, -1, 0), (3, -1, -1, 1))] == [
        ("DENSE", True),
        ("DENSE", True),
        ("SELECT", False),
    ]
    # The second one; the prune waits for it.
    assert [due(schedule, *facts) for facts in ((3, 2, -1, 0), (4, 2, -1, 0), (8, 2, -1, 0), (9, 2, -1, 1))] == [
        ("REGULARIZE", False),
        ("REGULARIZE", True),
        ("REGULARIZE", True),
        ("SELECT", False),
    ]
    assert due(schedule, 10, 9, -1, 0) == ("PRUNE", False)
    # Pruned by another schedule, before this one would select anew.
    assert due(schedule, 6, 2, 5, 0) == ("PRUNED", False)


def test_what_was_gathered_before_a_window_is_forgotten():
    schedule = PhaseSchedule(8, 20, importance_steps=3)
    forgets = [
        facts
        for facts in np.ndindex(10, 4)
        if schedule.due(facts[0], -1, -1, facts[1]).forgets and facts[0] >= facts[1]
    ]
    # The window is 6, 7, 8; updates before it may have left sums, of which it knows only the number.
    assert forgets == [(count, left) for count in range(10) for left in range(1, min(3, count) + 1) if left > count - 6]
    assert list(schedule.segments(5, 9, (-1, -1, 2)))[:2] == [(Phase.DENSE, False, 5, 6), (Phase.DENSE, True, 6, 8)]
    assert list(schedule.segments(7, 10, (-1, -1, 2)))[0] == (Phase.DENSE, True, 7, 9)
    again = PhaseSchedule(2, 20, reselect_step=9, importance_steps=3)
    assert [again.due(count, 2, -1, 2).forgets for count in (5, 7, 8, 9)] == [True, True, True, False]


def test_segments_with_windows():
    assert [(phase.name, *rest) for phase, *rest in PhaseSchedule(3, 8, 7, 3).segments(0, 10)] == [
        ("DENSE", False, 0, 1), ("DENSE", True, 1, 3), ("SELECT", False, 3, 4), ("REGULARIZE", False, 4, 5),
        ("REGULARIZE", True, 5, 7), ("SELECT", False, 7, 8), ("PRUNE", False, 8, 9), ("PRUNED", False, 9, 10),
    ]  # fmt: skip
