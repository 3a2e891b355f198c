"""Several functions timed side by side, so that what disturbs the machine disturbs them alike."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

# In one sample, whatever the clock says.
_MOST_CALLS = 1000


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        median_s, low_s, high_s: median, 20th and 80th percentile over the samples, in seconds a call.
        samples: how many there are.
        calls: how many calls one sample is the mean of.
    """

    median_s: float
    low_s: float
    high_s: float
    samples: int
    calls: int


def time_together(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    sample_s: float = 0.002,
    warm_s: float = 0.0,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions of no arguments, in rounds in which each has one sample.

    A sample is a run of calls whose results are waited for once, after the last: so short ones fill a device's
    queue as they do in a net, and the clock's steps do not matter. Each round begins with another function.

    Args:
        functions: by name; each returns what it computed, a tree of arrays. One that runs elsewhere has a method
            ``sample(calls)``, which returns the seconds of so many calls.
        rounds: samples of each function.
        warmup: calls of each before all others, at least 1: the first one compiles. A call and a sample that are not
            counted follow, and say how many calls make one.
        sample_s: a sample has as many calls as take this long, from 1 to 1000.
        warm_s: before each sample come calls that are not counted, for about so long: caches and threads are then as
            this function leaves them, not as the one before did. Those that run elsewhere see to that themselves.
        budget_s: no round is begun after this time, but three are always made; None for no limit.
        clock: seconds, rising.

    Returns:
        A `Timing` for each name.

    Raises:
        ValueError: no functions, or less than one round or call of warm-up.
        Whatever a function raises.
    """
    if not functions or rounds < 1 or warmup < 1:
        raise ValueError(
            f"timing wants at least one function, round and call of warm-up, got {len(functions)}, {rounds}, {warmup}"
        )
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            _sample(functions[name], 1, clock)
    # Only now, and by a whole sample: the first calls of a process, and single calls, whose weights are in no cache,
    # would give some functions shorter samples than others, and make those look slower.
    calls = {}
    for name in names:
        calls[name] = _calls(_sample(functions[name], 1, clock), sample_s)
        calls[name] = _calls(_sample(functions[name], calls[name], clock) / calls[name], sample_s)
    begin = clock()
    seconds = {name: [] for name in names}
    for index in range(rounds):
        if budget_s is not None and index >= 3 and clock() - begin > budget_s:
            break
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            _warm(functions[name], warm_s, clock)
            seconds[name].append(_sample(functions[name], calls[name], clock) / calls[name])
    return {name: _summary(seconds[name], calls[name]) for name in names}


def _calls(once_s: float, sample_s: float) -> int:
    """How many calls take a sample's time."""
    return min(max(1, math.ceil(sample_s / once_s)), _MOST_CALLS) if once_s > 0 else _MOST_CALLS


def _warm(function: Callable[[], object], seconds: float, clock: Callable[[], float]) -> None:
    begin = clock()
    while seconds and not hasattr(function, "sample") and clock() - begin < seconds:
        jax.block_until_ready(function())


def _sample(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    if hasattr(function, "sample"):
        return function.sample(calls)
    begin = clock()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return clock() - begin


def _summary(seconds: list[float], calls: int) -> Timing:
    low, median, high = np.percentile(seconds, (20, 50, 80)).tolist()
    return Timing(median, low, high, len(seconds), calls)
