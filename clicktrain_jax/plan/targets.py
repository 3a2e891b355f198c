"""One target for the whole net: how much each layer loses, from scores that are made comparable.

Within a layer, removal goes from the least score upwards in *rows* (a unit of removal, or the next unit of every
block when the same share goes in each). A row's rank among all layers is

    score of the row / score of what the layer would still hold before it goes / weights saved,

the relative damage to the layer per weight saved. The first quotient is LAMP's normalisation (Lee et al.,
"Layer-adaptive sparsity for the magnitude-based pruning", arXiv 2010.07611), applied to kernels: it does not
depend on a layer's scale, and grows to 1 for the last row, so that no layer collapses. Where time is the target,
seconds stand in for weights.
"""

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.latency import LayerTimes
from clicktrain_jax.plan.layer_plan import LayerPlan

SCOPES = ("convolutions", "model", "multiply_adds", "latency")


@dataclasses.dataclass(frozen=True)
class Target:
    """What to reach.

    Attributes:
        ratio: total / retained.
        of: what is counted: "convolutions", "model", "multiply_adds", or seconds, "latency".
        retained: what may be retained in all, dense leaves included.
        dense: what the leaves that the plan does not prune hold.
    """

    ratio: float
    of: str
    retained: float
    dense: float


class Rows(NamedTuple):
    """A layer's removal, row by row from the first to go.

    Attributes:
        values: float32 (rows,), the score that each row removes; infinite where the floor holds it.
        costs: float32 (rows,), what it saves.
        held: float32 scalar, the score of what is never removed.
        worth: float32 (rows,), what the rows' scores are weighed against; None for ``costs``.
    """

    values: jax.Array
    costs: jax.Array
    held: jax.Array
    worth: jax.Array | None = None


def in_seconds(rows: Rows, layer: LayerPlan) -> Rows:
    """Rows that save weights (kernels of `LayerPlan.kept_taps` each) as rows that save the layer's seconds."""
    kernels = jnp.cumsum(rows.costs) / (layer.kept_taps * math.prod(layer.shape[2:]))
    shares = jnp.concatenate([jnp.ones(1), 1 - kernels])
    assert layer.times is not None
    costs, worth = (-jnp.diff(layer.times.at(shares, hull=hull)) for hull in (False, True))
    return rows._replace(costs=costs, worth=worth)


def make_target(
    ratio: Any,
    of: str,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Sequence[LayerPlan],
    output_sizes: Mapping[str, tuple[int, int]] | None,
    convolutions: Collection[str],
    times: LayerTimes | None = None,
) -> Target:
    """Count what the target speaks of, and refuse one that cannot be reached.

    ``convolutions`` names the leaves that count as such; ``times`` are for "latency".

    Raises:
        ValueError: no number of 1 or more, an unknown scope, or out of reach; the reachable maximum is named.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 1 <= float(ratio) < math.inf:
        raise ValueError(f"target={ratio!r}: expected a compression of 1 or more, such as 8.0")
    if of not in SCOPES:
        raise ValueError(f"target_of={of!r}: expected one of {SCOPES}")
    if all(layer.fraction is not None for layer in layers):
        raise ValueError(
            f"target={ratio}: every rule gives a fraction, so nothing is left to the target; say 'auto' in the rules "
            "of the layers that it should decide, or rules=None for all"
        )
    unknown = sorted(set(output_sizes or {}) - set(shapes))
    if of == "multiply_adds" and unknown:
        raise ValueError(f"output_sizes names {unknown[0]!r}, which is no leaf of params")
    if of == "latency":
        assert times is not None  # `make_plan` refuses it
        total, dense = times.net_s, times.rest([layer.name for layer in layers])
        least = dense + sum(_seconds(layer) for layer in layers)
        most = dense + sum(_seconds(layer, removed=False) for layer in layers)
        return _checked(float(ratio), of, total, dense, least, most)
    counted = {name: math.prod(shape) * _count(name, of, output_sizes, convolutions) for name, shape in shapes.items()}
    total = sum(counted.values())
    dense = total - sum(counted[layer.name] for layer in layers)
    least = dense + sum(_least(layer) for layer in layers)
    most = dense + sum(_least(layer, removed=False) for layer in layers)
    return _checked(float(ratio), of, total, dense, least, most)


def _checked(ratio: float, of: str, total: float, dense: float, least: float, most: float) -> Target:
    """The target, if what the layers can hold, from the least to the most, allows it."""
    if total / ratio < least:
        raise ValueError(
            f"target={ratio:g} over {of} is out of reach: the reachable maximum is {_down(total / least)} with these "
            f"rules ({dense / total:.1%} of it stays dense). Prune more layers (shortcuts by an explicit rule), use "
            "fewer entries, smaller tiles or floor=False, or lower the target; what no rule matches stays dense too"
        )
    if total / ratio > most:
        raise ValueError(
            f"target={ratio:g} over {of} is below what patterns of these entries and the given fractions already "
            f"reach, {_down(total / most)}: raise it, leave layers dense, or use more entries"
        )
    return Target(ratio, of, total / ratio, dense)


def _down(ratio: float) -> str:
    """Rounded down to two places, so that what a message names can be asked for."""
    return f"{math.floor(100 * ratio) / 100:.2f}"


def _count(
    name: str, of: str, output_sizes: Mapping[str, tuple[int, int]] | None, convolutions: Collection[str]
) -> int:
    if of == "model":
        return 1
    if of == "convolutions":
        return int(name in convolutions)
    return math.prod((output_sizes or {}).get(name, (0, 0)))


def _least(layer: LayerPlan, removed: bool = True) -> int:
    """The least that a layer can be brought to; with ``removed`` false, what patterns and a fraction leave."""
    return least_kernels(layer, removed) * layer.kept_taps * layer.cost


def _seconds(layer: LayerPlan, removed: bool = True) -> float:
    """As `_least`, in seconds."""
    assert layer.times is not None
    return float(np.interp(least_kernels(layer, removed) / math.prod(layer.shape[2:]), *layer.times.curve()))


def least_kernels(layer: LayerPlan, removed: bool = True) -> int:
    """The least kernels that a layer can be brought to; with ``removed`` false, those that a fraction leaves."""
    kernels = layer.shape[2] * layer.shape[3]
    filters, channels = layer.removal_tile
    if layer.fraction is not None:
        kernels -= _removed_at_least(layer)
    elif removed:
        blocks = math.prod(math.ceil(size / block) for size, block in zip(layer.unit_grid, layer.scope_block))
        # Without a floor one unit stays all the same: the last row of a layer is never removed.
        kernels = min(kernels, max(layer.num_protected, blocks) * filters * channels)
    return kernels


def _removed_at_least(layer: LayerPlan) -> int:
    """Kernels that a fraction removes, when the short last tiles are the ones to go."""
    sizes, blocks = [], []
    for axis, (size, unit) in enumerate(zip(layer.shape[2:], layer.removal_tile[::-1])):
        sizes.append([min(unit, size - start) for start in range(0, size, unit)])
        step = layer.scope_block[axis]
        blocks.append([slice(start, start + step) for start in range(0, len(sizes[axis]), step)])
    removed = 0
    for rows in blocks[0]:
        for columns in blocks[1]:
            units = sorted(row * column for row in sizes[0][rows] for column in sizes[1][columns])
            removed += sum(units[: layer.num_removed * len(units) // math.prod(layer.scope_block)])
    return removed


class Ranked(NamedTuple):
    """A layer's rows as they compete with those of others.

    Attributes:
        rank: float32 (rows,), never falling; infinite for what must stay.
        saved: float32 (rows + 1,), what has been saved before each row goes, and in the end.
    """

    rank: jax.Array
    saved: jax.Array


def ranked(rows: Rows) -> Ranked:
    """Relative damage per weight (or second) saved, and what is saved."""
    return Ranked(_rank(rows), jnp.cumsum(jnp.concatenate([jnp.zeros(1), rows.costs])))


@partial(jax.jit, inline=True, static_argnames="target")  # one program outside of jit, nothing that shows inside
def resolve(target: Target, current: jax.Array, layers: Sequence[Ranked]) -> list[jax.Array]:
    """How many rows each layer loses.

    Args:
        target: what to reach.
        current: float32 scalar, what all planned layers hold before these rows go (patterns and explicit fractions
            already counted).
        layers: those that the target decides, in the order in which ties go.

    Returns:
        int32 scalars. What is retained is as near to the target as the last row allows.
    """
    need = current + target.dense - target.retained

    def count_below(threshold: jax.Array, side: str) -> list[jax.Array]:
        return [jnp.searchsorted(layer.rank, threshold, side=side) for layer in layers]

    def saved_by(counts: Sequence[jax.Array]) -> jax.Array:
        return sum((layer.saved[count] for layer, count in zip(layers, counts)), start=jnp.float32(0))

    # Non-negative floats are ordered as their bits are: the least rank that suffices, by bisection.
    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = saved_by(count_below(jax.lax.bitcast_convert_type(middle, jnp.float32), "right")) >= need
        return jnp.where(enough, low, jnp.minimum(middle + 1, high)), jnp.where(enough, middle, high)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    bits, _ = jax.lax.fori_loop(0, 31, halve, (jnp.int32(0), infinity - 1))
    threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # What must stay has an infinite rank, above any threshold: the largest one is a finite float.
    below, tied = count_below(threshold, "left"), count_below(threshold, "right")
    missing = need - saved_by(below)
    counts = []
    # Ties go layer by layer until the need is met; the last row only when that brings it nearer.
    for (_, saved), first, end in zip(layers, below, tied):
        start = saved[first]
        enough = jnp.searchsorted(saved, start + jnp.maximum(missing, 0.0), side="left")
        last = jnp.clip(enough, first, end)
        over = saved[last] - start - missing
        under = missing - (saved[jnp.maximum(last - 1, 0)] - start)
        last = jnp.where((last > first) & (over > under), last - 1, last)
        # What saves nothing stays: a layer may have to lose much before it gets faster.
        counts.append(jnp.where(saved[last] > 0, last, 0).astype(jnp.int32))
        # Once the need is met, or nearly, the next layers' tied rows stay.
        met = (over >= 0) | (missing <= 0)
        missing = jnp.where(met, 0.0, missing - (saved[last] - start))
    return counts


def _rank(rows: Rows) -> jax.Array:
    """Relative damage per weight (or second) saved, never falling from row to row; infinite for what must stay."""
    free = jnp.isfinite(rows.values)
    values = jnp.where(free, rows.values, 0.0)
    remaining = jnp.cumsum(values[::-1])[::-1] + rows.held
    damage = jnp.where(values > 0, values / jnp.maximum(remaining, values), 0.0)
    worth = rows.costs if rows.worth is None else rows.worth
    rank = jnp.where(worth > 0, damage / jnp.where(worth > 0, worth, 1.0), jnp.inf)
    # A layer keeps its last row whatever comes.
    last = jnp.arange(rank.size) == rank.size - 1
    rank = jnp.where(free & ~last, rank, jnp.inf)
    return jax.lax.cummax(rank)
