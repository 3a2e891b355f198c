"""The selection, from scores per weight to the masks of every planned layer.

For each layer: its pattern set (given or generated), and a pattern for each kernel; then how many kernels each layer
loses, by its fraction or by the plan's target; then which.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.importance import rescaled
from clicktrain_jax.masks import LayerMask, Masks, build_masks
from clicktrain_jax.patterns import Generated, check_set
from clicktrain_jax.patterns.kernels import ordered_sum
from clicktrain_jax.plan import Plan, check_plan
from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.plan.targets import Ranked, in_seconds, ranked, resolve
from clicktrain_jax.selection.kernel_choice import keep, protect, rows_of
from clicktrain_jax.selection.pattern_choice import check_quads, choose_patterns, retained_by
from clicktrain_jax.selection.tiles import tile_sums
from clicktrain_jax.trees import Tree, has_negative, has_non_finite, named_leaves, replicated


def select_masks(scores: Tree, plan: Plan, patterns: Any) -> Masks:
    """Choose patterns and kernels from scores per weight. Jittable; ``plan`` is static.

    Args:
        scores: tree like the parameters, non-negative, computed in float32 (see `clicktrain_jax.importance`).
        plan: from `make_plan`.
        patterns: bool (P, kh, kw), its size that of every pruned kernel above 1x1; or a
            `clicktrain_jax.patterns.Generated`, which makes sets from the scores.

    Returns:
        `Masks`, whose ``pattern`` and ``kernel`` are bool (kh, kw, cin, cout).

    Raises:
        ValueError: scores of another tree; patterns that do not fit the plan; NaN or infinite scores (seen outside
            jit only).

    Source: with the plan's defaults, ClickTrain's reference selection. Every kernel takes the pattern that retains
    the largest sum of scores, ties to the lowest index. Of each layer's kernels the
    ``ceil(round(fraction * n, 6))`` with the smallest sum over all taps go, ties by lowest (cout, cin) index.
    """
    patterns = check_patterns(plan, patterns)
    plan.check_tree(scores, "scores")
    return build_masks(scores, select_layers(dict(named_leaves(scores)), plan, patterns))


def select_layers(leaves: Mapping[str, Any], plan: Plan, patterns: Any) -> dict[str, LayerMask]:
    """`select_masks` by leaf name, with patterns that are checked."""
    for layer in plan.layers:
        if has_non_finite(leaves[layer.name]):
            raise ValueError(
                f"scores of {layer.name!r} hold NaN or infinite values: the loss or its gradient was not finite at "
                "the selection; lower the learning rate or look at the data before selecting"
            )
        if has_negative(leaves[layer.name]):
            raise ValueError(f"scores of {layer.name!r} hold negative values: expected non-negative importance")
    by_name = {layer.name: _scaled(leaves[layer.name], _kind(layer)) for layer in plan.layers}
    sets = _pattern_sets(by_name, plan, patterns)
    drafts = {layer.name: _draft(by_name[layer.name], layer, sets.get(layer.name)) for layer in plan.layers}
    levels: dict[str, Any] = {layer.name: layer.num_removed for layer in plan.layers if layer.fraction is not None}
    if plan.target is not None:
        levels |= _resolve(plan, drafts, levels)
    return {layer.name: _finish(drafts[layer.name], layer, levels[layer.name]) for layer in plan.layers}


def num_patterns_of(patterns: Any) -> int:
    """How many patterns a layer's set will have."""
    return patterns.num_patterns if isinstance(patterns, Generated) else patterns.shape[0]


def check_patterns(plan: Plan, patterns: Any) -> Any:
    """Validate what a selection is given as patterns.

    Args:
        plan: from `make_plan`.
        patterns: bool (P, kh, kw), or a `clicktrain_jax.patterns.Generated`.

    Returns:
        The same, an array as a boolean one.

    Raises:
        ValueError: another kernel size than a planned layer's; with a target, patterns of other than ``entries``
            taps; with quads, patterns of which no four fit beside each other.
    """
    check_plan(plan)
    with_patterns = [layer for layer in plan.layers if layer.chooses_patterns]
    quads = any(layer.quads for layer in with_patterns)
    if isinstance(patterns, Generated):
        if quads and not patterns.complementary:
            raise ValueError(
                "quads need patterns that fit beside each other: Generated(..., complementary=True), which pairs "
                "every pattern with one that it shares no tap with"
            )
        patterns.check(
            {layer.name: layer.shape[:2] for layer in with_patterns},
            {layer.name: layer.entries for layer in with_patterns},
        )
        return patterns
    patterns = check_set(patterns)
    size = tuple(jnp.shape(patterns)[1:])
    for layer in with_patterns:
        if layer.shape[:2] != size:
            raise ValueError(
                f"patterns of {size[0]}x{size[1]} taps on {layer.name!r} with {layer.shape[0]}x{layer.shape[1]} "
                "kernels: leave that layer dense (None), give patterns of its size, or remove whole kernels alone, "
                f"make_plan(entries={{{layer.name!r}: None}})"
            )
    if isinstance(patterns, jax.core.Tracer):
        return patterns
    taps = patterns.sum(axis=(1, 2))
    for layer in with_patterns:
        if plan.target is not None and (taps != layer.entries).any():
            raise ValueError(
                f"a target counts with entries={layer.entries} taps a kernel in {layer.name!r}, and the patterns have "
                f"{sorted(set(taps.tolist()))}: give make_plan the entries of the patterns"
            )
        if layer.superset is not None and taps.min() > layer.superset:
            raise ValueError(
                f"superset={layer.superset} in {layer.name!r}, and the smallest pattern has {taps.min()} taps"
            )
    if quads:
        check_quads(patterns)
    return patterns


class _Draft(NamedTuple):
    """A layer between the choice of its patterns and that of its kernels.

    Attributes:
        taps: float32 (kh * kw, cin, cout), scores.
        patterns: bool (P, kh, kw), or None.
        pattern_ids: uint8 (cin, cout), or None.
        units: float32, scores of the units of removal.
    """

    taps: jax.Array
    patterns: Any
    pattern_ids: jax.Array | None
    units: jax.Array


def _pattern_sets(scores: dict[str, jax.Array], plan: Plan, patterns: Any) -> dict[str, Any]:
    layers = [layer for layer in plan.layers if layer.chooses_patterns]
    if not isinstance(patterns, Generated):
        sets = {layer.name: patterns for layer in layers}
    else:
        sets = (
            patterns.sets(
                {layer.name: scores[layer.name] for layer in layers}, {layer.name: layer.entries for layer in layers}
            )
            if layers
            else {}
        )
    # Where nothing is chosen every pattern keeps all taps, as before a selection.
    whole = [layer for layer in plan.layers if layer.has_patterns and not layer.chooses_patterns]
    return sets | {layer.name: np.ones((num_patterns_of(patterns), *layer.shape[:2]), bool) for layer in whole}


# What follows is a program for each kind of layer where a selection is made outside of jit, rather than one for each of
# its sixty operations, and nothing that shows inside of it.
def _by_kind(*static: str) -> Any:
    return partial(jax.jit, inline=True, static_argnames=("layer", *static))


def _kind(layer: LayerPlan) -> LayerPlan:
    """The layer without its name, and without what says how much goes: layers alike share their programs."""
    return dataclasses.replace(layer, name="", fraction=None)


class _Known(NamedTuple):
    """A pattern set that is known while something is traced, hashable."""

    shape: tuple[int, ...]
    taps: bytes

    @staticmethod
    def of(patterns: Any) -> "tuple[_Known | None, Any]":
        """The set as one that is known, or else as an argument."""
        if isinstance(patterns, np.ndarray):
            return _Known(patterns.shape, patterns.astype(bool).tobytes()), None
        return None, patterns

    def array(self) -> Any:
        return np.frombuffer(self.taps, bool).reshape(self.shape)


@_by_kind()
def _scaled(leaf: jax.Array, layer: LayerPlan) -> jax.Array:
    """float32 (kh, kw, cin, cout), scores that neither underflow nor overflow."""
    # The barrier keeps a compiler from fusing the criterion's products into the sums with multiply-adds, whose
    # other rounding could flip a near-tie.
    return layer.to_hwio(rescaled(jax.lax.optimization_barrier(replicated(leaf).astype(jnp.float32)))[0])


def _draft(scores: jax.Array, layer: LayerPlan, patterns: Any) -> _Draft:
    known, given = _Known.of(patterns)
    taps, ids, units = _drafted(scores, given, known=known, layer=_kind(layer))
    return _Draft(taps, patterns, ids, units)


@_by_kind("known")
def _drafted(
    scores: jax.Array, patterns: Any, known: _Known | None, layer: LayerPlan
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    patterns = patterns if known is None else known.array()
    kh, kw, cin, cout = layer.shape
    taps = scores.reshape(kh * kw, cin, cout)
    if layer.chooses_patterns:
        ids = choose_patterns(taps, layer, patterns)
        kernels = ordered_sum(taps) if layer.removal_score == "whole" else retained_by(taps, ids, patterns)
    else:
        ids = None if patterns is None else jnp.zeros((cin, cout), jnp.uint8)
        kernels = ordered_sum(taps)
    return taps, ids, tile_sums(kernels, layer.removal_tile)


def _resolve(plan: Plan, drafts: dict[str, _Draft], levels: dict[str, int]) -> dict[str, jax.Array]:
    """Levels of the layers that the target decides."""
    current, decided = jnp.float32(0), {}
    for layer in plan.layers:
        units = drafts[layer.name].units
        if layer.fraction is None:
            decided[layer.name] = _ranked(units, _kind(layer))
            kept = float(math.prod(layer.shape[2:]))
        else:
            kept = _kept(units, _kind(layer), levels[layer.name])
        if layer.times is None:
            current += layer.cost * layer.kept_taps * kept
        else:
            current += layer.times.at(kept / math.prod(layer.shape[2:]))
    assert plan.target is not None
    return dict(zip(decided, resolve(plan.target, current, list(decided.values()))))


@_by_kind()
def _ranked(units: jax.Array, layer: LayerPlan) -> Ranked:
    rows = rows_of(units, layer)
    return ranked(rows if layer.times is None else in_seconds(rows, layer))


@_by_kind("level")
def _kept(units: jax.Array, layer: LayerPlan, level: int) -> jax.Array:
    """float32 scalar: how many kernels stay."""
    return keep(protect(units, layer), layer, level).sum(dtype=jnp.float32)


def _finish(draft: _Draft, layer: LayerPlan, level: int | jax.Array) -> LayerMask:
    known, given = _Known.of(draft.patterns)
    fixed, traced = (level, None) if isinstance(level, int) else (None, level)
    kernel, ids = _finished(draft._replace(patterns=given), traced, known=known, layer=_kind(layer), level=fixed)
    # A copy of the set for each layer: a buffer that stands in a state twice cannot be donated.
    return LayerMask(ids, kernel, None if draft.patterns is None else jnp.array(draft.patterns, bool, copy=True))


@_by_kind("known", "level")
def _finished(
    draft: _Draft, traced: Any, known: _Known | None, layer: LayerPlan, level: int | None
) -> tuple[jax.Array, jax.Array | None]:
    kernel = keep(protect(draft.units, layer), layer, traced if level is None else level)
    ids = draft.pattern_ids
    shared = layer.tile != (1, 1) and layer.removal_tile != layer.tile
    if layer.chooses_patterns and shared and layer.removal_score == "retained":
        # A pattern that is shared is chosen once more, over the kernels that stay.
        patterns = draft.patterns if known is None else known.array()
        ids = choose_patterns(jnp.where(kernel, draft.taps, 0.0), layer, patterns)
    # Kept in the leaf's layout, which `LayerMask` knows by the number of axes.
    return kernel if layer.axes == "HWIO" else kernel.T[:, :, None, None], ids
