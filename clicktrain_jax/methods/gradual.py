"""Gradual magnitude pruning: weights go a few at a time while the net is trained.

Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax.methods.densities import by_plan, counts_of, size_of
from clicktrain_jax.methods.sparse import all_kept, largest, magnitudes, sparse_training
from clicktrain_jax.methods.states import MaskDict, check_integer, shares_at
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
    begin_step: int,
    end_step: int,
    every: int,
    densities: Mapping[str, float] | None = None,
    schedule: optax.Schedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gradual magnitude pruning of single weights, around any optax optimizer. Put it last in a chain.

    The density of each planned layer falls from 1 to its own as the cubic from ``begin_step`` to ``end_step``. At a
    renewal the weights of largest magnitude *after* the update stay, exactly ``round(density * size)`` of each layer,
    ties to the lowest index. Masked weights and what the optimizer remembers of them are zero from then on; they do
    not come back.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`: which layers.
        begin_step: the update (from 0) from which density falls; its own renewal removes nothing.
        end_step: the update of the last renewal, to the final density; it must lie inside the run.
        every: renewals in every so many updates from ``begin_step``, and one in ``end_step``.
        densities: ``{layer name: share that stays at the end}``, in (0, 1], as of `clicktrain_jax.methods.densities`;
            None for what the plan's rules leave, 1 - fraction.
        schedule: share of the pruning that is done, a function of the update (from 0): what it says in the updates of
            the renewals, in [0, 1], never falling, 1 in ``end_step``. None: the cubic, 1 - (1 - progress)^3. Such a
            function is ``optax.linear_schedule(0.0, 1.0, end_step - begin_step, begin_step)``.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`; all masks are True until density falls.

    Raises:
        ValueError: at once for densities of other layers or out of range, a plan with a target and no densities, steps
            out of order, a schedule that is no share, falls or does not end at 1; in ``init`` for parameters of another
            tree; in ``update`` when ``params`` is missing.

    Example:
        >>> import jax, optax, jax.numpy as jnp, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.arange(1.0, 289.0).reshape(3, 3, 8, 4)}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.75})
        >>> tx = ct.methods.gradual_magnitude(optax.sgd(0.1), plan, begin_step=0, end_step=4, every=2)
        >>> state, kept = tx.init(params), []
        >>> for _ in range(5):
        ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     kept.append(int((params["Conv_0"]["kernel"] != 0).sum()))
        >>> kept
        [288, 288, 99, 99, 72]

    Source: Zhu and Gupta 2017 (arXiv 1710.01878).
    """
    begin_step = check_integer("begin_step", begin_step, 0)
    every = check_integer("every", every, 1)
    if check_integer("end_step", end_step, 0) <= begin_step:
        raise ValueError(f"end_step={end_step}: expected more than begin_step={begin_step}")
    final = by_plan(plan, densities)
    counts_of(plan, final)  # refuses what does not fit
    steps = [*range(begin_step, end_step, every), end_step]
    done = None if schedule is None else shares_at("schedule", schedule, steps)
    if done is not None and (done != sorted(done) or abs(done[-1] - 1.0) > 1e-6):
        raise ValueError(
            f"schedule says {done[0]:g} in update {begin_step} and {done[-1]:g} in end_step={end_step}: expected a "
            "share of the pruning done that never falls and ends at 1"
        )
    # Counts are worked out beforehand in 64 bits, so that they are exact.
    counts = {}
    for layer in plan.layers:
        last = float(final[layer.name])
        if done is None:
            shares = [cubic_density(step, begin_step, end_step, last) for step in steps]
        else:
            shares = [*(1.0 - (1.0 - last) * share for share in done[:-1]), last]
        counts[layer.name] = np.array([max(1, round(share * size_of(layer))) for share in shares], np.int32)

    def is_due(count: jax.Array) -> jax.Array:
        since = count - begin_step
        return (since >= 0) & (((since % every == 0) & (count < end_step)) | (count == end_step))

    def renew(count: jax.Array, masks: MaskDict, weights: MaskDict, _: MaskDict) -> MaskDict:
        index = jnp.where(count == end_step, len(steps) - 1, (count - begin_step) // every)
        return {
            name: largest(magnitudes(weights[name], mask), jnp.asarray(counts[name])[index])
            for name, mask in masks.items()
        }

    return sparse_training("gradual_magnitude", inner, plan, start=lambda: all_kept(plan), is_due=is_due, renew=renew)
