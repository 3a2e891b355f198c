"""Training with masks of single weights: what all methods share whose masks are chosen, or change, on the way.

Masks are bool arrays by leaf name in the leaves' own shapes, True where a weight stays, each with exactly as many True
as its density asks for. The state holds them as every other state does, and `clicktrain_jax.masks_of` reads them.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clicktrain_jax.eager import branch, optimizer, transformation
from clicktrain_jax.enforcing import enforce
from clicktrain_jax.masks import Masks, apply_masks, build_masks
from clicktrain_jax.methods.densities import by_plan, counts_of, size_of
from clicktrain_jax.methods.states import (
    MaskDict,
    check_integer,
    check_key,
    check_update,
    is_share,
    masks_tree,
    planned,
    shares_at,
    single_weights,
)
from clicktrain_jax.plan import Plan
from clicktrain_jax.states import ClickTrainState, check_state, first_state
from clicktrain_jax.trees import Tree, replicated, spread_like

Renew = Callable[[jax.Array, MaskDict, MaskDict, MaskDict], MaskDict]


def largest(values: jax.Array, count: int | jax.Array) -> jax.Array:
    """bool, like ``values``: True at exactly ``count`` of the largest, ties to the lowest (row-major) index.

    Args:
        values: float array of any shape, no NaN.
        count: 0 to ``values.size``; may be traced.
    """
    flat = values.reshape(-1)
    # One sort of the values and a running count of the ties: cheaper than sorting indices along.
    threshold = jnp.sort(flat)[jnp.clip(flat.size - count, 0, flat.size - 1)]
    above = flat > threshold
    tied = flat == threshold
    among_tied = count - above.sum(dtype=jnp.int32)
    chosen = above | (tied & (jnp.cumsum(tied, dtype=jnp.int32) <= among_tied))
    return chosen.reshape(values.shape)


def magnitudes(weights: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """float32 magnitudes; -1, which no weight has, outside of a mask."""
    found = jnp.abs(weights).astype(jnp.float32)
    return found if mask is None else jnp.where(mask, found, -1.0)


def key_of(key: jax.Array, name: str) -> jax.Array:
    """A layer's own key."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def all_kept(plan: Plan) -> MaskDict:
    """Masks that keep every weight."""
    return {layer.name: jnp.ones(layer.leaf_shape, bool) for layer in plan.layers}


def random_masks(plan: Plan, kept: Mapping[str, int], key: jax.Array) -> MaskDict:
    """Masks that keep ``kept`` weights of each layer, any of them alike."""
    masks = {}
    for layer in plan.layers:
        order = jax.random.permutation(key_of(key, layer.name), size_of(layer))
        masks[layer.name] = (order < kept[layer.name]).reshape(layer.leaf_shape)
    return masks


def sparse_training(
    name: str,
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    start: Callable[[], MaskDict],
    is_due: Callable[[jax.Array], jax.Array] | None,
    renew: Renew | None,
    chosen: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under masks that change now and then.

    The inner optimizer sees the masked gradient. After its update masked weights, and what it remembers of them, are
    exactly zero. A weight whose mask has just been opened starts at zero, with nothing remembered of it.

    Args:
        name: of the method, for errors.
        inner: the optimizer.
        plan: from `clicktrain_jax.make_plan`: which layers.
        start: makes the first masks.
        is_due: update (int32 scalar, from 0) -> bool scalar, whether masks change in it; None for never.
        renew: ``(update, masks, weights after the update, dense gradients of it) -> masks``, by layer name.
        chosen: whether the first masks are the method's choice; False where they keep all.

    Returns:
        A transformation whose state is a `clicktrain_jax.ClickTrainState`: ``selected`` is the update of the last
        renewal, ``pruned`` the first update after which masked weights are zero.
    """
    inner = optimizer(inner)

    def init(params: Tree) -> ClickTrainState:
        like = plan.tree_of(params)
        return first_state(like, single_weights(start()), inner.init(params), selected=0 if chosen else -1)

    def whole_update(
        grads: Tree, state: ClickTrainState, params: Tree, extra: dict[str, Any]
    ) -> tuple[Tree, ClickTrainState]:
        plan.check_tree(params)
        state = check_state(state, plan, 0, 1)
        # What jit returned may be sharded in any way, and the branches must agree.
        held = Masks.of(state.masks).layers
        old = {layer: replicated(mask.combined()) for layer, mask in held.items()}
        updates, inner_state = inner.update(apply_masks(grads, _masks(params, old)), state.inner_state, params, **extra)
        new, selected = old, state.selected
        if is_due is not None:
            due = is_due(state.count)

            def changed() -> MaskDict:
                assert renew is not None
                after = optax.apply_updates(planned(params, plan), planned(updates, plan))
                return renew(state.count, old, *jax.tree.map(replicated, (after, planned(grads, plan))))

            new = branch(due, [lambda: old, changed])
            selected = jnp.where(due, state.count, selected)
        both = {layer: old[layer] & new[layer] for layer in old}
        updates, inner_state = enforce(updates, inner_state, params, _masks(params, both))
        return updates, state._replace(
            count=optax.safe_increment(state.count),
            selected=selected,
            pruned=jnp.where((state.pruned < 0) & (selected >= 0), state.count, state.pruned),
            masks=spread_like(masks_tree(state.masks, new), params),
            inner_state=inner_state,
        )

    return transformation(init, whole_update, functools.partial(check_update, name, plan))


def one_shot(
    name: str, inner: optax.GradientTransformation, plan: Plan, step: int, choose: Callable[[MaskDict], MaskDict]
) -> optax.GradientTransformationExtraArgs:
    """`sparse_training` whose masks are chosen once, from the weights after update ``step``."""
    return sparse_training(
        name,
        inner,
        plan,
        start=lambda: all_kept(plan),
        is_due=lambda count: count == step,
        renew=lambda count, masks, weights, grads: choose(weights),
    )


def exchanging(
    name: str,
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    densities: Mapping[str, float] | None,
    key: jax.Array,
    every: int,
    end_step: int,
    drop_fraction: float | optax.Schedule,
    falls: Callable[[Any], Any],
    pull: Callable[[jax.Array, str, jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Training with random masks of constant size, in which weights change places: what RigL and SET share.

    Args:
        name, inner, plan: as for `sparse_training`.
        densities: by layer name, or None for those of the plan's rules.
        key: of the first masks.
        every: updates between two exchanges.
        end_step: the first update without any.
        drop_fraction: share of the kept weights that changes places in updates ``every``, ``2 * every``, ... before
            ``end_step``; a number, or a function of the update.
        falls: ``update -> share``, what becomes of a number in the course of the run.
        pull: ``(update, layer name, dense gradient) -> scores``, >= 0: the masked weights of the highest grow.

    Raises:
        ValueError: an argument out of range; as `sparse_training`.
    """
    every, end_step = check_integer("every", every, 1), check_integer("end_step", end_step, 1)
    check_key(key)
    if callable(drop_fraction):
        falls = drop_fraction
    elif not is_share(drop_fraction):
        raise ValueError(f"drop_fraction={drop_fraction!r}: expected a share in [0, 1], or a function of the update")
    shares = shares_at("drop_fraction", falls, range(every, end_step, every))
    kept = counts_of(plan, by_plan(plan, densities))
    # How many change places in each exchange, worked out beforehand in 64 bits; entry 0 is no exchange.
    exchanged = {
        layer.name: np.array(
            [min(round(share * kept[layer.name]), size_of(layer) - kept[layer.name]) for share in (0.0, *shares)],
            np.int32,
        )
        for layer in plan.layers
    }

    def is_due(count: jax.Array) -> jax.Array:
        return (count > 0) & (count % every == 0) & (count < end_step)

    def renew(count: jax.Array, masks: MaskDict, weights: MaskDict, grads: MaskDict) -> MaskDict:
        new = {}
        for layer, mask in masks.items():
            number = jnp.asarray(exchanged[layer])[count // every]
            grows = jnp.where(mask, -1.0, pull(count, layer, grads[layer]))
            new[layer] = largest(magnitudes(weights[layer], mask), kept[layer] - number) | largest(grows, number)
        return new

    return sparse_training(
        name, inner, plan, start=lambda: random_masks(plan, kept, key), is_due=is_due, renew=renew, chosen=True
    )


def _masks(params: Tree, masks: MaskDict) -> Masks:
    """The masks in the parameters' containers: masks of single weights stand where masks of kernels do."""
    return build_masks(params, {name: (None, mask) for name, mask in masks.items()})
