"""Gradual magnitude pruning: weights go a few at a time while the net is trained.

Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax.baselines.sparse import MaskDict, counts_of, largest, size_of, sparse_training
from clicktrain_jax.baselines.states import check_integer
from clicktrain_jax.plan import Plan


def cubic_density(step: int, begin_step: int, end_step: int, final: float) -> float:
    """Share of weights that stay after a renewal in update ``step``: final + (1 - final) (1 - progress)^3.

    Source: Zhu and Gupta 2017, equation 1, from a dense net.
    """
    progress = min(max((step - begin_step) / (end_step - begin_step), 0.0), 1.0)
    return final + (1.0 - final) * (1.0 - progress) ** 3


def gradual_magnitude(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    densities: Mapping[str, float],
    begin_step: int,
    end_step: int,
    every: int,
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning of single weights, around any optax optimizer. Put it last in a chain.

    The density of each planned layer falls from 1 to its own as the cubic from ``begin_step`` to ``end_step``. At a
    renewal the weights of largest magnitude *after* the update stay, exactly ``round(density * size)`` of each layer,
    ties to the lowest index. Masked weights and what the optimizer remembers of them are zero from then on; they do
    not come back.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`; its fractions are not read.
        densities: ``{layer name: share that stays at the end}``, in (0, 1], as of `clicktrain_jax.baselines.densities`.
        begin_step: the update (from 0) from which density falls; its own renewal removes nothing.
        end_step: the update of the last renewal, to the final density; it must lie inside the run.
        every: renewals in every so many updates from ``begin_step``, and one in ``end_step``.

    Returns:
        A transformation whose state is a `SparseState`; all masks are True until density falls.

    Raises:
        ValueError: at once for densities of other layers or out of range, steps out of order; in ``init`` for
            parameters of another tree; in ``update`` when ``params`` is missing.

    Source: Zhu and Gupta 2017 (arXiv 1710.01878).
    """
    begin_step = check_integer("begin_step", begin_step, 0)
    every = check_integer("every", every, 1)
    if check_integer("end_step", end_step, 0) <= begin_step:
        raise ValueError(f"end_step={end_step}: expected more than begin_step={begin_step}")
    counts_of(plan, densities)  # refuses what does not fit
    # Counts are worked out beforehand in 64 bits, so that they are exact.
    steps = [*range(begin_step, end_step, every), end_step]
    counts = {}
    for layer in plan.layers:
        shares = [cubic_density(step, begin_step, end_step, float(densities[layer.name])) for step in steps]
        counts[layer.name] = np.array([round(share * size_of(layer)) for share in shares], np.int32)

    def start() -> MaskDict:
        return {layer.name: jnp.ones(layer.leaf_shape, bool) for layer in plan.layers}

    def is_due(count: jax.Array) -> jax.Array:
        since = count - begin_step
        return (since >= 0) & (((since % every == 0) & (count < end_step)) | (count == end_step))

    def renew(count: jax.Array, masks: MaskDict, weights: MaskDict, _: MaskDict) -> MaskDict:
        index = jnp.where(count == end_step, len(steps) - 1, (count - begin_step) // every)
        new = {}
        for name, mask in masks.items():
            magnitude = jnp.abs(weights[name]).astype(jnp.float32)
            new[name] = largest(jnp.where(mask, magnitude, -1.0), jnp.asarray(counts[name])[index])
        return new

    return sparse_training("gradual_magnitude", inner, plan, start=start, is_due=is_due, renew=renew)
