"""The choice between dense and by pattern, made on the whole net by measurement.

A layer that is faster alone may be slower in a net: the next one wants another layout, or what was fused no longer is.
So whole nets are timed, side by side: all layers dense, all by pattern in either layout, and from the best of these
each group of like layers changed to each of its other ways. Changes that gain are taken over, the largest first, each
only if the net gets faster with it. What is left is compared with the dense net once more, and must be faster.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from clicktrain_jax.deploy import layers
from clicktrain_jax.deploy.arguments import take_apart

if TYPE_CHECKING:
    from clicktrain_jax.deploy.accelerate import Accelerated

Choice = dict[str, layers.Run]
Within = Callable[[Callable[..., Any]], Callable[..., Any]] | None

DENSE = "all dense"
CHOSEN = "chosen"
_AS_IT_IS = "as it is"
# A change must make the net faster by this share: less is noise. The net as a whole likewise.
_MARGIN = 0.01
_FAR = 1.1
# Each is a program to be compiled.
_MOST_FLIPS = 16
_ROUNDS = 15
_BUDGET_S = 20.0  # of one comparison, once all is compiled


def tune(
    accelerated: "Accelerated", within: Within, args: tuple, kwargs: dict[str, Any]
) -> tuple[Choice, dict[str, float], str]:
    """``(choice, seconds, device)`` of `Accelerated.tuned`; from the cache if it has been measured before."""
    from pallas_kernels.tuning import Cache

    open_ended = accelerated.with_choice({})
    groups = _groups(open_ended, args, kwargs)
    ways = {names: runs for names, (_, runs) in groups.items()}
    cache = Cache()
    # What is timed, as text: it tells the net, the shapes and what it stands within.
    all_dense = open_ended.with_choice({name: "dense" for names in ways for name in names})
    facts = {
        "whole net": _digest(*_timed(all_dense, within, args, kwargs)),
        "ways": [[list(names), str(facts), list(runs)] for names, (facts, runs) in groups.items()],
        "backend": open_ended.backend,
    }
    entry = cache.get(facts)
    if entry is not None and entry.get("choice", {}).keys() == {name for names in ways for name in names}:
        return dict(entry["choice"]), dict(entry["seconds"]), cache.kind
    choice, seconds = search(ways, _timer(open_ended, within, args, kwargs))
    cache.put(facts, {"choice": choice, "seconds": seconds})
    return choice, seconds, cache.kind


def _groups(accelerated: "Accelerated", args: tuple, kwargs: dict[str, Any]) -> dict[tuple[str, ...], tuple]:
    """``{names of like layers: (facts, ways to run them)}``, of layers that have more than one; most work first."""
    by_name: dict[str, list] = {}
    for conv, layer, _ in accelerated.met(*args, **kwargs):
        if layer is not None:
            structure = accelerated.structure(conv.name, layer.mask)
            by_name.setdefault(conv.name, []).append((layer, structure))
    groups: dict[tuple, list[str]] = {}
    work: dict[tuple, float] = {}
    for name, sites in by_name.items():
        # One leaf that several convolutions share runs in one way, which all of them can.
        ways = [layers.can_run(*site, accelerated.backend) for site in sites]
        runs = tuple(run for run in ways[0] if all(run in other for other in ways))
        if len(runs) > 1:
            key = (tuple(layer.facts(structure) for layer, structure in sites), runs)
            groups.setdefault(key, []).append(name)
            work[key] = work.get(key, 0.0) + sum(layer.work() for layer, _ in sites)
    return {tuple(groups[key]): key for key in sorted(groups, key=work.__getitem__, reverse=True)}


def search(
    ways: Mapping[tuple[str, ...], tuple[layers.Run, ...]], timer: Callable[[Mapping[str, Choice]], dict[str, float]]
) -> tuple[Choice, dict[str, float]]:
    """Find the fastest choice.

    Args:
        ways: ``{names of layers that are run alike: how they can be run}``, "dense" among it; most work first.
        timer: ``{label: choice} -> {label: seconds}``, measured side by side.

    Returns:
        The choice, and seconds of a call: all dense, all by pattern in each layout, and as chosen.
    """

    def uniform(run: layers.Run) -> Choice:
        return {name: run if run in runs else runs[-1] for names, runs in ways.items() for name in names}

    starts = {"dense": uniform("dense")}
    starts |= {run: uniform(run) for run in ("NHWC", "HWNC") if any(run in runs for runs in ways.values())}
    labels = {run: DENSE if run == "dense" else f"all by pattern, {run}" for run in starts}
    timed = timer({labels[run]: choice for run, choice in starts.items()})
    seconds = dict(timed)
    choice = starts[min(starts, key=lambda run: timed[labels[run]])]
    by_pattern = [timed[labels[run]] for run in starts if run != "dense"]
    # A layout that is far behind for the whole net is not tried for its parts.
    tried = [run for run in starts if run == "dense" or timed[labels[run]] <= _FAR * min(by_pattern)]

    flips = {
        (names, run): choice | dict.fromkeys(names, run)
        for names, runs in ways.items()
        for run in runs
        if run in tried and choice[names[0]] != run
    }
    flips = dict(list(flips.items())[:_MOST_FLIPS])
    if flips:
        flipped = timer({_AS_IT_IS: choice} | {_label(*flip): changed for flip, changed in flips.items()})
        gaining = [flip for flip in flips if flipped[_label(*flip)] < flipped[_AS_IT_IS]]
        for names, run in sorted(gaining, key=lambda flip: flipped[_label(*flip)]):
            changed = choice | dict.fromkeys(names, run)
            pair = timer({_AS_IT_IS: choice, _label(names, run): changed})
            if pair[_label(names, run)] <= pair[_AS_IT_IS] * (1 - _MARGIN):
                choice = changed
    if choice != starts["dense"]:
        last = timer({DENSE: starts["dense"], CHOSEN: choice})
        if last[CHOSEN] <= last[DENSE] * (1 - _MARGIN):
            return choice, seconds | last
    return starts["dense"], seconds | {CHOSEN: seconds[DENSE]}


def _label(names: tuple[str, ...], run: str) -> str:
    return f"{names[0]} {run}"


def _timer(
    accelerated: "Accelerated", within: Within, args: tuple, kwargs: dict[str, Any]
) -> Callable[[Mapping[str, Choice]], dict[str, float]]:
    """A function that times nets, each compiled once."""
    from pallas_kernels.tuning import time_together

    compiled: dict[tuple, Callable[[], Any]] = {}

    def timer(choices: Mapping[str, Choice]) -> dict[str, float]:
        functions = {}
        for name, choice in choices.items():
            key = tuple(sorted(choice.items()))
            if key not in compiled:
                function, arrays = _timed(accelerated.with_choice(choice), within, args, kwargs)
                program = jax.jit(function)
                compiled[key] = lambda program=program, arrays=arrays: program(arrays)
            functions[name] = compiled[key]
        timings = time_together(functions, rounds=_ROUNDS, budget_s=_BUDGET_S)
        return {name: timing.median_s for name, timing in timings.items()}

    return timer


def _timed(
    accelerated: "Accelerated", within: Within, args: tuple, kwargs: dict[str, Any]
) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """``(function of arrays, arrays)``: what is timed, without its static arguments and modules."""
    function = accelerated if within is None else within(accelerated)
    frame, arrays, _ = take_apart(args, kwargs)

    def call(arrays: list[Any]) -> list[Any]:
        args, kwargs, _ = frame.join(arrays)
        # What is no array (a gradient in the form of a module's state is one of arrays) cannot leave a jit.
        return [leaf for leaf in jax.tree.leaves(function(*args, **kwargs)) if hasattr(leaf, "dtype")]

    return call, arrays


def _digest(function: Callable[[list[Any]], Any], arrays: list[Any]) -> str:
    """A number for what is computed: alike for alike programs in other processes."""
    text = re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(arrays)))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
