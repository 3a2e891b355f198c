"""Measures what a net's layers cost by what they retain, for a plan whose target is time.

Each planned layer is timed alone, its weights laid out before as in a net for inference: dense, and by random masks of
the plan's shapes at several shares of its kernels, in every way that it can run. Layers alone cost more than in a net
(a call of their own) or less (their input is at hand): the whole net, dense and with all layers at one share, tells by
how much, and the layers' times at that share are scaled to it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import layers
from clicktrain_jax.deploy.inference import InferenceNet
from clicktrain_jax.deploy.load import ApplyFn, inference_net
from clicktrain_jax.latency import LayerTime, LayerTimes
from clicktrain_jax.masks import Masks, apply_masks
from clicktrain_jax.patterns import fixed_set
from clicktrain_jax.plan import Plan
from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.selection import select_masks
from clicktrain_jax.trees import Tree, named_leaves

SHARES = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.08)
_ROUNDS = 15
_BUDGET_S = 20.0
# Of a layer's time alone that is its own at least, the call around it being measured apart.
_OWN = 0.05

Timer = Callable[[Mapping[Any, Callable[[], Any]]], dict[Any, float]]


def layer_times(
    apply_fn: ApplyFn,
    variables: Tree,
    images: Any,
    plan: Plan,
    *,
    patterns: Any = None,
    shares: Sequence[float] = SHARES,
    timer: Timer | None = None,
) -> LayerTimes:
    """Measure the layers of a plan on this device, or take what was measured here before.

    Args:
        apply_fn: ``apply_fn(variables, images)`` -> logits, in evaluation mode, as for `clicktrain_jax.export`.
        variables: what it takes; their ``params`` (or they themselves) are what the plan was made for. Values are
            irrelevant.
        images: float32 (batch, height, width, channels), or a ``jax.ShapeDtypeStruct``; only the shape counts.
        plan: of the layers to be measured, in the shapes in which they will be pruned; how much it removes is
            irrelevant.
        patterns: the set that masks will be made of, as for `clicktrain_jax.select_masks`; None for the authors' four.
        shares: of a layer's kernels that stay, each in (0, 1]; between them times are interpolated.
        timer: ``{name: function of no arguments} -> {name: seconds}``; None for this device's clock, whose figures
            are kept for other processes (`pallas_kernels.tuning.Cache`).

    Returns:
        `LayerTimes`, for ``make_plan(..., target_of="latency", costs=...)``.

    Raises:
        ValueError: images that are not 4-D; shares outside (0, 1], or none; what `export` refuses; a planned layer
            that is no convolution of the net.
    """
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) != 4:
        raise ValueError(f"images have shape {shape}; expected (batch, height, width, channels)")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares={tuple(shares)}: expected shares of kernels that stay, each in (0, 1]")
    params = variables["params"] if isinstance(variables, Mapping) and "params" in variables else variables
    plan.check_tree(params)
    make = functools.partial(_net, apply_fn, variables, params, shape[1:])
    dense, whole = make(None), None
    if timer is None:
        cached = _Cached(dense, plan, shape[0], shares)
        if (found := cached.get()) is not None:
            return found
        whole, timer = cached, _time
    patterns = fixed_set(4) if patterns is None else patterns
    nets, kept = {}, {}
    for share in sorted(set(shares)):
        masks = _random_masks(params, plan, patterns, share)
        nets[share] = make(masks)
        kept[share] = {name: float(np.asarray(layer.kernel).mean()) for name, layer in masks.layers.items()}
    found = _measure(dense, nets, kept, plan, shape[0], timer)
    if whole is not None:
        whole.put(found)
    return found


def _time(functions: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    from pallas_kernels.tuning import time_together

    # The 20th percentile: other work on the machine only adds.
    timings = time_together(functions, rounds=_ROUNDS, budget_s=_BUDGET_S)
    return {name: timing.low_s for name, timing in timings.items()}


def _random_masks(params: Tree, plan: Plan, patterns: Any, share: float) -> Masks:
    """Masks of the plan's shapes that keep a share of each layer's kernels, or as little as the plan allows."""

    def at(layer: LayerPlan) -> LayerPlan:
        units = math.prod(layer.scope_block)
        least = max(1, layer.num_protected)
        return dataclasses.replace(layer, fraction=max(0, min(round((1 - share) * units), units - least)) / units)

    fixed = dataclasses.replace(plan, layers=tuple(map(at, plan.layers)), target=None)
    rng = np.random.default_rng(0)
    names = {layer.name for layer in plan.layers}
    leaves = dict(named_leaves(params))
    scores = {name: jnp.asarray(rng.random(np.shape(leaves[name])), jnp.float32) for name in names}
    flat = [scores.get(name, leaf) for name, leaf in named_leaves(params)]
    return select_masks(jax.tree.unflatten(jax.tree.structure(params), flat), fixed, patterns)


def _net(apply_fn: ApplyFn, variables: Tree, params: Tree, image_shape: Any, masks: Any) -> InferenceNet:
    if masks is not None:
        masked = apply_masks(params, masks)
        variables = {**variables, "params": masked} if params is not variables else masked
    return inference_net(apply_fn, variables, masks, image_shape=image_shape, normalise=None)


def _measure(
    dense: InferenceNet,
    nets: Mapping[float, InferenceNet],
    kept: Mapping[float, Mapping[str, float]],
    plan: Plan,
    batch: int,
    timer: Timer,
) -> LayerTimes:
    names = _names(dense, plan, batch)
    empty = jax.jit(lambda x: x + 1)
    one = jnp.zeros(())
    calls: dict[tuple, Callable[[], Any]] = {("call",): lambda: empty(one)}
    # Layers of equal facts are measured once.
    place: dict[tuple, tuple] = {}
    for share, net in [(None, dense), *nets.items()]:
        for leaf, step in names.items():
            for run, site in net.ways(batch)[step].items():
                if (run in layers.DENSE_RUNS) != (share is None):
                    continue
                key = (site.layer.facts(site.structure), run)
                if share is not None and site.structure is None:
                    continue
                place[leaf, share, run] = key
                if key not in calls:
                    calls[key] = _alone(net, site)
    seconds = timer(calls)
    call = seconds[("call",)]
    own = {key: max(time - call, _OWN * time) for key, time in seconds.items()}
    best: dict[tuple[str, float | None], tuple[float, str]] = {}
    for (leaf, share, run), key in place.items():
        best[leaf, share] = min(best.get((leaf, share), (math.inf, "")), (own[key], run))
    # Whole nets, each layer in the better of its dense and its pruned way.
    programs, sums = {}, {}
    for share, net in [(None, dense), *nets.items()]:
        chosen = {leaf: min(best[leaf, None], best.get((leaf, share), (math.inf, ""))) for leaf in names}
        sums[share] = sum(time for time, _ in chosen.values())
        choice = {names[leaf]: run for leaf, (_, run) in chosen.items()}
        programs[share] = _whole(net.with_choice(batch, choice), batch)
    whole = timer(programs)
    rest = max(0.0, whole[None] - sums[None])
    scale = {share: max(whole[share] - rest, _OWN * whole[share]) / sums[share] for share in programs}
    measured = []
    for leaf in names:
        points = {}
        for share in nets:
            if (leaf, share) in best:
                points[kept[share][leaf]] = best[leaf, share][0] * scale[share]
        dense_s = best[leaf, None][0] * scale[None]
        found = tuple(sorted(points)) or (1.0,)
        measured.append(LayerTime(leaf, dense_s, found, tuple(points.get(share, dense_s) for share in found)))
    from pallas_kernels.tuning import Cache

    return LayerTimes(whole[None], tuple(measured), Cache().kind, batch)


def _names(net: InferenceNet, plan: Plan, batch: int) -> dict[str, str]:
    """``{leaf: name of its kernel}`` of the planned layers that can run by pattern."""
    steps = {step.leaf: step.name for step in net.folded.steps(batch).convolutions}
    found = {}
    for layer in plan.layers:
        leaf = next((leaf for leaf in steps if leaf == layer.name or leaf.endswith(f"/{layer.name}")), None)
        if leaf is None:
            raise ValueError(f"{layer.name!r} is no convolution that the net calls: {sorted(filter(None, steps))}")
        found[layer.name] = steps[leaf]
    return found


def _alone(net: InferenceNet, site: Any) -> Callable[[], Any]:
    """A call of one convolution."""
    import pallas_kernels

    prepared = net.prepared({site.step.name: site})
    images = jnp.zeros(site.layer.x_shape, site.layer.dtype) + 0.5
    structure = prepared["structures"].get(site.step.name)
    kernel = jax.device_put(prepared["arrays"][site.step.name])
    options = pallas_kernels.compiler_options(np.dtype(site.step.dtype))
    function = jax.jit(lambda x, kernel, structure: site.run(x, kernel, structure), compiler_options=options)
    return lambda: function(images, kernel, structure)


def _whole(net: InferenceNet, batch: int) -> Callable[[], Any]:
    function, prepared = net.program(batch)
    images = jnp.zeros((batch, *net.folded.image_shape), jnp.float32) + 0.5
    return lambda: function(prepared, images)


class _Cached:
    """Where a table is kept: by what the layers are and the shapes in which they are pruned."""

    def __init__(self, net: InferenceNet, plan: Plan, batch: int, shares: Sequence[float]) -> None:
        from pallas_kernels import native
        from pallas_kernels.tuning import Cache

        self._cache = Cache()
        found = [site.layer for site in net.convolutions(batch) if site.layer is not None]
        self._facts: dict[str, Any] = {
            "layer times": [str(layer.facts(None)) for layer in found],
            "plan": [f"{layer.name} {layer.shape} {layer.in_words()}" for layer in plan.layers],
            "batch": batch,
            "shares": [float(share) for share in shares],
            "native": native.state(),
        }

    def get(self) -> LayerTimes | None:
        found = self._cache.get(self._facts)
        if found is None:
            return None
        read = tuple(
            LayerTime(each["name"], each["dense_s"], tuple(each["shares"]), tuple(each["seconds"]))
            for each in found["layers"]
        )
        return LayerTimes(found["net_s"], read, self._cache.kind, self._facts["batch"])

    def put(self, times: LayerTimes) -> None:
        layers = [dataclasses.asdict(each) for each in times.layers]
        self._cache.put(self._facts, {"net_s": times.net_s, "layers": layers})
