"""The fastest of several ways to compute the same: each is checked before it is timed, the winner is remembered."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping

import jax
import numpy as np

from pallas_kernels.tuning.cache import Cache
from pallas_kernels.tuning.timing import Timing, time_together


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Attributes:
        winner: the name of the candidate to use.
        timings: of the candidates that were right, by name; empty if the choice was remembered.
        dropped: why each other candidate is out, by name; empty if the choice was remembered.
        remembered: whether it comes from the cache.
    """

    winner: str
    timings: Mapping[str, Timing]
    dropped: Mapping[str, str]
    remembered: bool


def recall(facts: Mapping[str, object], candidates: Mapping[str, object], cache: Cache) -> Choice | None:
    """The remembered choice for these facts, if it is one of these candidates (their names count); else None."""
    entry = cache.get(facts)
    winner = None if entry is None else entry.get("winner")
    return Choice(winner, {}, {}, remembered=True) if isinstance(winner, str) and winner in candidates else None


def autotune(
    candidates: Mapping[str, Callable[[], object]],
    expected: object,
    facts: Mapping[str, object],
    *,
    tolerance: float,
    cache: Cache | None = None,
    margin: float = 0.02,
    rounds: int = 10,
    budget_s: float | None = None,
    timer: Callable[..., dict[str, Timing]] = time_together,
) -> Choice:
    """Choose by measurement, or recall what was measured before.

    Args:
        candidates: functions of no arguments by name, the one to prefer first; each returns a tree of arrays.
        expected: the tree that all should return.
        facts: what decides the choice beside the kind of device (shape, dtype, layout, what the mask retains ...),
            plain data; the key in the cache.
        tolerance: largest allowed max|difference| / max|expected| of any leaf.
        cache: where the winner is looked up and stored; None for neither.
        margin: a later candidate must be faster by this share; noise alone then does not decide.
        rounds, budget_s: see `time_together`.
        timer: does the timing, called as `time_together` is.

    Returns:
        The `Choice`.

    Raises:
        ValueError: no candidates, or facts that are not plain data.
        RuntimeError: no candidate returns what is expected; the reasons are named.
    """
    if not candidates:
        raise ValueError("autotune wants at least one candidate, got none")
    found = None if cache is None else recall(facts, candidates, cache)
    if found is not None:
        return found
    dropped = {}
    for name, function in candidates.items():
        reason = _fault(function, expected, tolerance)
        if reason is not None:
            dropped[name] = reason
    right = {name: function for name, function in candidates.items() if name not in dropped}
    if not right:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        raise RuntimeError(f"no candidate for {dict(facts)} computes what is expected: {reasons}")
    for name, reason in dropped.items():
        warnings.warn(f"candidate {name!r} for {dict(facts)} is left out: {reason}", stacklevel=2)
    timings = timer(right, rounds=rounds, budget_s=budget_s)
    fastest_s = min(timing.median_s for timing in timings.values())
    winner = next(name for name in right if timings[name].median_s * (1 - margin) <= fastest_s)
    if cache is not None:
        medians = {name: timing.median_s for name, timing in timings.items()}
        cache.put(facts, {"winner": winner, "median_s": medians, "dropped": dropped})
    return Choice(winner, timings, dropped, remembered=False)


def _fault(function: Callable[[], object], expected: object, tolerance: float) -> str | None:
    """Why a candidate cannot be used; None if it returns what is expected."""
    try:
        got = jax.block_until_ready(function())
    except Exception as error:  # A kernel may fail in any way; the others shall be tried.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if jax.tree.structure(got) != jax.tree.structure(expected):
        return f"it returns {jax.tree.structure(got)}, not {jax.tree.structure(expected)}"
    for value, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        if np.shape(value) != np.shape(wanted):
            return f"it returns the shape {np.shape(value)}, not {np.shape(wanted)}"
        value, wanted = np.asarray(value).astype(np.float64), np.asarray(wanted).astype(np.float64)
        if not wanted.size:
            continue
        error, largest = np.abs(value - wanted).max(), np.abs(wanted).max()
        # So written that a NaN does not pass.
        if not error <= tolerance * largest:
            return f"wrong by {error / (largest or 1):.3g} of the largest value, {tolerance:.3g} is allowed"
    return None
