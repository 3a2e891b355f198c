"""The choice between dense and by pattern, made on the whole net by measurement.

A layer that is faster alone may be slower in a net: the next one wants another layout, or what was fused no longer is.
So whole nets are timed, side by side: all layers dense, by XLA and by the native kernels where there are any, all by
pattern in each layout that is worth it, and from the best of these each group of like layers changed to each of its
other ways. Changes that gain are taken over, the largest first, each only if the net gets faster with it. What is left
is compared with the faster dense net once more, and must be faster.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from clicktrain_jax.deploy import layers

Choice = dict[str, layers.Run]

DENSE = "all dense"
CHOSEN = "chosen"
_LABELS = {"dense": DENSE, "dense cpu": f"{DENSE}, native"}
_AS_IT_IS = "as it is"
# A change must make the net faster by this share: less is noise. The net as a whole likewise.
_MARGIN = 0.01
_FAR = 1.1
# Each is a program to be compiled.
_MOST_FLIPS = 16
_ROUNDS = 15
_BUDGET_S = 20.0  # of one comparison, once all is compiled


# Name, layer, its `pallas_kernels.Structure` or None where nothing is removed.
Site = tuple[str, layers.Layer, Any]


def tune(
    sites: Sequence[Site],
    compiled: Callable[[Choice], Callable[[], Any]],
    facts: Mapping[str, Any],
    backend: str | None = None,
) -> tuple[Choice, dict[str, float], str]:
    """Find the fastest choice by measurement, or in the cache if it has been measured before.

    Args:
        sites: the convolutions that can be run in more than one way, in the order of the net.
        compiled: makes a choice the function that is timed, of no arguments.
        facts: what tells this net, its images and what it stands within from others: the key of the cache.
        backend: one that is named, or None.

    Returns:
        ``(choice, seconds by what was measured, kind of device)``.
    """
    found, ways, keep = _looked_up(sites, facts, backend)
    return found or keep(*search(ways, _timer(compiled)))


def cached(
    sites: Sequence[Site], facts: Mapping[str, Any], backend: str | None = None
) -> tuple[Choice, dict[str, float], str] | None:
    """What `tune` found before; None where nothing was measured."""
    return _looked_up(sites, facts, backend)[0]


def _looked_up(sites: Sequence[Site], facts: Mapping[str, Any], backend: str | None) -> tuple[Any, Any, Any]:
    """``(what was found before or None, ways of `search`, a function that keeps what it finds)``."""
    from pallas_kernels.tuning import Cache

    groups, cache = _groups(sites, backend), Cache()
    known = key_facts(facts, groups, backend)

    def keep(choice: Choice, seconds: dict[str, float]) -> tuple[Choice, dict[str, float], str]:
        cache.put(known, {"choice": choice, "seconds": seconds})
        return choice, seconds, cache.kind

    entry, found = cache.get(known), None
    if entry is not None and entry.get("choice", {}).keys() == {name for names in groups for name in names}:
        found = dict(entry["choice"]), dict(entry["seconds"]), cache.kind
    return found, {names: runs for names, (_, runs) in groups.items()}, keep


def key_facts(facts: Mapping[str, Any], groups: Mapping[tuple[str, ...], tuple], backend: str | None) -> dict[str, Any]:
    """The key of the cache."""
    from pallas_kernels import native

    ways = [[list(names), str(likeness), list(runs)] for names, (likeness, runs) in groups.items()]
    return {**facts, "ways": ways, "backend": backend, "native": native.state()}


def _groups(sites: Sequence[Site], backend: str | None) -> dict[tuple[str, ...], tuple]:
    """``{names of like layers: (facts, ways to run them)}``, of layers that have more than one; most work first."""
    by_name: dict[str, list] = {}
    for name, layer, structure in sites:
        by_name.setdefault(name, []).append((layer, structure))
    groups: dict[tuple, list[str]] = {}
    work: dict[tuple, float] = {}
    for name, places in by_name.items():
        # One leaf that several convolutions share runs in one way, which all of them can.
        ways = [layers.can_run(layer, structure, backend) for layer, structure in places]
        runs = tuple(run for run in ways[0] if all(run in other for other in ways))
        if len(runs) > 1:
            key = (tuple(layer.facts(structure) for layer, structure in places), runs)
            groups.setdefault(key, []).append(name)
            work[key] = work.get(key, 0.0) + sum(layer.work() for layer, _ in places)
    return {tuple(groups[key]): key for key in sorted(groups, key=work.__getitem__, reverse=True)}


def search(
    ways: Mapping[tuple[str, ...], tuple[layers.Run, ...]], timer: Callable[[Mapping[str, Choice]], dict[str, float]]
) -> tuple[Choice, dict[str, float]]:
    """Find the fastest choice.

    Args:
        ways: ``{names of layers that are run alike: how they can be run}``, "dense" among it; most work first.
        timer: ``{label: choice} -> {label: seconds}``, measured side by side.

    Returns:
        The choice, and seconds of a call: all dense in each way, all by pattern in each layout, and as chosen.
    """

    def uniform(run: layers.Run) -> Choice:
        # A layer that has no such way is dense where all are, else in the last of its own.
        other = 0 if run in layers.DENSE_RUNS else -1
        return {name: run if run in runs else runs[other] for names, runs in ways.items() for name in names}

    starts = {run: uniform(run) for run in layers.RUNS if run == "dense" or any(run in runs for runs in ways.values())}
    labels = {run: _LABELS.get(run, f"all by pattern, {run}") for run in starts}
    timed = timer({labels[run]: choice for run, choice in starts.items()})
    seconds = dict(timed)
    choice = starts[min(starts, key=lambda run: timed[labels[run]])]
    dense, by_pattern = ([run for run in starts if (run in layers.DENSE_RUNS) == each] for each in (True, False))
    best_dense = min(dense, key=lambda run: timed[labels[run]])
    # A way that is far behind its kind for the whole net is not tried for its parts.
    tried = [
        run
        for kind in (dense, by_pattern)
        for run in kind
        if timed[labels[run]] <= _FAR * min(timed[labels[other]] for other in kind)
    ]

    flips: dict[tuple[tuple[str, ...], layers.Run], Choice] = {
        (names, run): {**choice, **dict.fromkeys(names, run)}
        for names, runs in ways.items()
        for run in runs
        if run in tried and choice[names[0]] != run
    }
    flips = dict(list(flips.items())[:_MOST_FLIPS])
    if flips:
        flipped = timer({_AS_IT_IS: choice} | {_label(*flip): changed for flip, changed in flips.items()})
        gaining = [flip for flip in flips if flipped[_label(*flip)] < flipped[_AS_IT_IS]]
        for names, run in sorted(gaining, key=lambda flip: flipped[_label(*flip)]):
            changed: Choice = {**choice, **dict.fromkeys(names, run)}
            pair = timer({_AS_IT_IS: choice, _label(names, run): changed})
            if pair[_label(names, run)] <= pair[_AS_IT_IS] * (1 - _MARGIN):
                choice = changed
    label = labels[best_dense]
    if choice != starts[best_dense]:
        last = timer({label: starts[best_dense], CHOSEN: choice})
        if last[CHOSEN] <= last[label] * (1 - _MARGIN):
            return choice, seconds | last
    return starts[best_dense], seconds | {CHOSEN: seconds[label]}


def _label(names: tuple[str, ...], run: str) -> str:
    return f"{names[0]} {run}"


def _timer(compiled: Callable[[Choice], Callable[[], Any]]) -> Callable[[Mapping[str, Choice]], dict[str, float]]:
    """A function that times nets, each compiled once."""
    from pallas_kernels.tuning import time_together

    programs: dict[tuple, Callable[[], Any]] = {}

    def timer(choices: Mapping[str, Choice]) -> dict[str, float]:
        functions = {}
        for name, choice in choices.items():
            key = tuple(sorted(choice.items()))
            if key not in programs:
                programs[key] = compiled(dict(choice))
            functions[name] = programs[key]
        timings = time_together(functions, rounds=_ROUNDS, budget_s=_BUDGET_S)
        return {name: timing.median_s for name, timing in timings.items()}

    return timer


def digest(function: Callable[[list[Any]], Any], arrays: list[Any]) -> str:
    """A number for what is computed: alike for alike programs in other processes."""
    text = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(arrays)))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
