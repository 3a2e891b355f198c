"""How many weights of each layer stay: by the plan's rules, a share for all, or Erdos-Renyi-Kernel."""

import numbers
from collections.abc import Mapping
from typing import Literal

from clicktrain_jax.plan import Plan, check_plan
from clicktrain_jax.plan.layer_plan import LayerPlan

_DISTRIBUTIONS = ("uniform", "erk")


def densities(
    plan: Plan, retained: int | float, distribution: Literal["uniform", "erk"] = "uniform"
) -> dict[str, float]:
    """How many of each planned layer's weights stay, as shares.

    Args:
        plan: from `clicktrain_jax.make_plan`; its fractions are not read.
        retained: weights that stay in all planned layers together: their number, or as a float in (0, 1) the share of
            them, 0.1 for ten times fewer.
        distribution: "uniform": the same share everywhere. "erk", Erdos-Renyi-Kernel: a share in proportion to
            (kh + kw + cin + cout) / (kh * kw * cin * cout), at most 1; what full layers leave over goes to the others.

    Returns:
        ``{layer name: density}``, each a whole number of weights (at least 1) over the layer's size, so that the sum of
        ``round(density * size)`` is ``retained`` exactly; what rounding leaves goes by largest remainder, ties to the
        plan's order.

    Raises:
        ValueError: an unknown distribution; fewer retained weights than layers, or more than there are.

    Example:
        >>> import jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"a": jnp.zeros((3, 3, 16, 16)), "b": jnp.zeros((3, 3, 64, 64))}
        >>> plan = ct.make_plan(params, {".*": 0.0})
        >>> found = ct.methods.densities(plan, 0.1, "erk")
        >>> {name: round(density, 3) for name, density in found.items()}
        {'a': 0.375, 'b': 0.083}

    Source: Evci et al., "Rigging the Lottery" (arXiv 1911.11134), section 3.
    """
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r}: expected one of {_DISTRIBUTIONS}")
    sizes = {layer.name: size_of(layer) for layer in plan.layers}
    total = sum(sizes.values())
    if isinstance(retained, float) and 0 < retained < 1:
        retained = round(retained * total)
    if isinstance(retained, bool) or not isinstance(retained, numbers.Integral):
        raise ValueError(
            f"retained={retained!r}: expected an integer, the number of weights that stay, or the share of them as a "
            "float between 0 and 1"
        )
    if not len(sizes) <= retained <= total:
        raise ValueError(
            f"retained={retained}: expected {len(sizes)} (a weight in every planned layer) to {total} (all of them)"
        )
    if distribution == "uniform":
        raw = {name: 1.0 for name in sizes}
    else:
        raw = {layer.name: sum(layer.shape) / size_of(layer) for layer in plan.layers}
    ideal = _capped_shares(raw, sizes, int(retained))
    counts = {name: min(max(int(ideal[name]), 1), size) for name, size in sizes.items()}
    while (missing := retained - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        free = [name for name in sizes if 1 <= counts[name] + step <= sizes[name]]
        chosen = max(free, key=lambda name: step * (ideal[name] - counts[name]))
        counts[chosen] += step
    return {name: counts[name] / sizes[name] for name in sizes}


def _capped_shares(raw: Mapping[str, float], sizes: Mapping[str, int], retained: int) -> dict[str, float]:
    """Weights of each layer, not yet whole: in proportion to raw * size, no layer above its size."""
    full: set[str] = set()
    while True:
        left = retained - sum(sizes[name] for name in full)
        others = [name for name in sizes if name not in full]
        whole = sum(raw[name] * sizes[name] for name in others)
        scale = left / whole if others else 0.0
        # A little above 1 is rounding: all of a layer's weights are its size then too.
        over = {name for name in others if scale * raw[name] > 1.0}
        if not over:
            return {name: float(sizes[name]) if name in full else scale * raw[name] * sizes[name] for name in sizes}
        full |= over


def size_of(layer: LayerPlan) -> int:
    """How many weights a layer has."""
    kh, kw, cin, cout = layer.shape
    return kh * kw * cin * cout


def by_plan(plan: Plan, layer_densities: Mapping[str, float] | None) -> Mapping[str, float]:
    """The densities that are given, or those of the plan's rules: 1 - fraction of each layer's weights.

    Raises:
        ValueError: none are given and the plan has a target in place of fractions.
    """
    check_plan(plan)
    if layer_densities is not None:
        return layer_densities
    found = {}
    for layer in plan.layers:
        if layer.fraction is None:
            raise ValueError(
                f"densities=None, and {layer.name!r} is 'auto' in the plan, whose target counts patterns: give "
                "densities=clicktrain_jax.methods.densities(plan, 0.1), or a fraction in the rule"
            )
        found[layer.name] = 1.0 - layer.fraction
    return found


def counts_of(plan: Plan, layer_densities: Mapping[str, float]) -> dict[str, int]:
    """``round(density * size)`` of every planned layer.

    Raises:
        ValueError: other names than the plan's; a density outside (0, 1], or one that leaves no weight.
    """
    names = {layer.name for layer in plan.layers}
    for name in sorted(names ^ set(layer_densities)):
        problem = "has no density" if name in names else "is no layer of the plan"
        raise ValueError(f"densities: {name!r} {problem}; expected one for each of {sorted(names)}")
    counts = {}
    for layer in plan.layers:
        density = layer_densities[layer.name]
        if isinstance(density, bool) or not isinstance(density, numbers.Real) or not 0 < density <= 1:
            raise ValueError(f"densities[{layer.name!r}]={density!r}: expected the share that stays, in (0, 1]")
        counts[layer.name] = round(float(density) * size_of(layer))
        if counts[layer.name] < 1:
            raise ValueError(
                f"densities[{layer.name!r}]={density!r} leaves none of {size_of(layer)} weights: raise it to "
                f"{1 / size_of(layer):.2g} or more"
            )
    return counts
