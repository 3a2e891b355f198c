"""ClickTrain as an optax transformation, and the same pieces one phase at a time.

`clicktrain` wraps any optax optimizer and goes through all phases inside a user's own loop. A loop that
knows its phase uses `phase_updates` instead and carries no conditional; both are made of the same functions.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax import importance as importance_lib
from clicktrain_jax.encoding import EncodedLayer, decode_masks, empty_masks, encode, fill_masks
from clicktrain_jax.masks import Masks, apply_masks, combine
from clicktrain_jax.patterns import fixed_set
from clicktrain_jax.phases import Phase, PhaseSchedule
from clicktrain_jax.plan import Plan
from clicktrain_jax.regularization import add_group_lasso
from clicktrain_jax.selection import check_patterns, num_patterns_of, select_layers
from clicktrain_jax.trees import Tree, map_named, named_leaves, path_keys, placed_like, replicated


class ClickTrainState(NamedTuple):
    """The state of `clicktrain`: arrays only, any checkpoint of the optimizer state carries it.

    Attributes:
        count: int32, updates done.
        masks: tree like the parameters, an `EncodedLayer` at each planned leaf (a byte and a bit a kernel).
        scores_finite: bool, False once a selection met a score that was not finite.
        scores: float32 arrays by leaf name, the sum of the scores gathered so far for the next selection; empty when
            a selection takes one update's.
        inner_state: the wrapped optimizer's state.
    """

    count: jax.Array
    masks: Tree
    scores_finite: jax.Array
    scores: dict[str, jax.Array]
    inner_state: Any


class PhaseUpdates(NamedTuple):
    """Updates for a loop that knows its phase. Each is jittable.

    Attributes:
        dense: ``(grads, inner_state, params) -> (updates, inner_state)``: the inner optimizer's own update. It
            serves the selecting update too.
        gather: ``(scores, grads, params) -> scores``: adds an update's scores to the sums in ``scores``, float32 arrays
            by leaf name; `empty_scores` starts them.
        select: ``(grads, params, scores=None) -> (encoded layers by name, scores_finite)``, from the selecting update's
            gradient and the sums of the ``importance_steps - 1`` updates before it.
        regularize: ``(grads, inner_state, params, masks) -> (updates, inner_state)`` with the group lasso.
        prune: the same signature; once, at prune_step.
        pruned: the same signature, from then on.
    """

    dense: Callable[..., Any]
    gather: Callable[..., Any]
    select: Callable[..., Any]
    regularize: Callable[..., Any]
    prune: Callable[..., Any]
    pruned: Callable[..., Any]


def phase_updates(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    coeff: float,
    patterns: Any = None,
    importance: str | importance_lib.Criterion = "taylor",
    importance_steps: int = 1,
) -> PhaseUpdates:
    """The updates of each phase as separate functions, without any conditional.

    Args:
        inner: any optax optimizer.
        plan: from `clicktrain_jax.make_plan`.
        coeff: weight of the group lasso in the loss, >= 0.
        patterns: bool (P, kh, kw), by default the published set of 4; or a `clicktrain_jax.patterns.Generated`.
        importance: "taylor", "group_taylor", "magnitude", or a function ``(params, grads) -> scores``.
        importance_steps: scores are the mean over so many updates.

    Returns:
        `PhaseUpdates`. ``masks`` of its functions are `clicktrain_jax.masks.Masks` of booleans;
        `clicktrain_jax.encoding` turns what ``select`` returns into them.

    Raises:
        ValueError: a negative coefficient, an unknown criterion, patterns that do not fit the plan.
    """
    patterns = check_patterns(plan, fixed_set(4) if patterns is None else patterns)
    supported = optax.with_extra_args_support(inner)
    criterion = importance_lib.criterion(importance, plan.axes)
    if not isinstance(coeff, jax.Array) and not (isinstance(coeff, numbers.Real) and 0 <= coeff < math.inf):
        raise ValueError(f"coeff={coeff!r}: expected a finite number >= 0, the weight of the group lasso in the loss")

    def planned_scores(grads: Tree, params: Tree) -> dict[str, jax.Array]:
        by_name = dict(named_leaves(criterion(params, grads)))
        return {layer.name: replicated(by_name[layer.name]).astype(jnp.float32) for layer in plan.layers}

    def gather(scores: dict[str, jax.Array], grads: Tree, params: Tree) -> dict[str, jax.Array]:
        new = planned_scores(grads, params)
        return {name: scores[name] + new[name] for name in scores}

    def select(
        grads: Tree, params: Tree, scores: dict[str, jax.Array] | None = None
    ) -> tuple[dict[str, EncodedLayer], jax.Array]:
        if importance_steps > 1:
            if not scores:
                raise ValueError(f"importance_steps={importance_steps}: pass the scores gathered by the updates before")
            by_name = {name: total / importance_steps for name, total in gather(scores, grads, params).items()}
        else:
            by_name = planned_scores(grads, params)
        finite = jnp.all(jnp.stack([jnp.isfinite(score).all() for score in by_name.values()]))
        choices = select_layers(map_named(lambda name, _: by_name.get(name), params), plan, patterns)
        # A copy of the set for each layer: a buffer that stands in a state twice cannot be donated.
        return {
            name: encode(choice._replace(patterns=None if choice.patterns is None else jnp.copy(choice.patterns)))
            for name, choice in choices.items()
        }, finite

    def regularize(grads: Tree, state: Any, params: Tree, masks: Masks, **extra: Any) -> tuple[Tree, Any]:
        return supported.update(add_group_lasso(grads, params, masks, coeff, axes=plan.axes), state, params, **extra)

    def prune(grads: Tree, state: Any, params: Tree, masks: Masks, **extra: Any) -> tuple[Tree, Any]:
        updates, state = supported.update(grads, state, params, **extra)
        return enforce(updates, state, params, masks)

    def pruned(grads: Tree, state: Any, params: Tree, masks: Masks, **extra: Any) -> tuple[Tree, Any]:
        return prune(apply_masks(grads, masks), state, params, masks, **extra)

    return PhaseUpdates(inner.update, gather, select, regularize, prune, pruned)


def empty_scores(plan: Plan, importance_steps: int) -> dict[str, jax.Array]:
    """Where scores are gathered: zeros for each planned layer, nothing when a selection takes one update's."""
    if importance_steps == 1:
        return {}
    return {layer.name: jnp.zeros(layer.leaf_shape, jnp.float32) for layer in plan.layers}


def clicktrain(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    select_step: int,
    prune_step: int,
    coeff: float,
    patterns: Any = None,
    importance: str | importance_lib.Criterion = "taylor",
    importance_steps: int = 1,
    reselect_step: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Pruning during training, around any optax optimizer.

    Put it last in a chain: whatever comes after it could move weights that it holds at zero. The loop around
    it changes in no line; ``params`` must be passed to ``update`` (optax's own loops and ``nnx.Optimizer`` do).
    On several devices the gradients must be the global ones, as ``jit`` over sharded arrays makes them; under
    ``shard_map`` reduce them first, or the devices would choose different masks.

    Args:
        inner: the optimizer, weight decay and schedules included.
        plan: from `clicktrain_jax.make_plan`.
        select_step: the update (from 0) whose gradient decides the masks.
        prune_step: the update after which every masked weight is exactly zero, to the end.
        coeff: weight of the group lasso in the loss between the two.
        patterns: bool (P, kh, kw), by default the published set of 4 4-of-9 patterns; or a
            `clicktrain_jax.patterns.Generated`, for sets made from the scores of the selection.
        importance: "taylor", "group_taylor", "magnitude", or a function ``(params, grads) -> scores``.
        importance_steps: scores are the mean over so many updates, each at its own weights, the selecting update
            being the last. More than 1 keeps a float32 number for each planned weight. 1 is the authors'; 16
            is what the importance experiment in RESULTS.md comes to.
        reselect_step: an update between the two that chooses the masks anew.

    Returns:
        A transformation whose state is a `ClickTrainState`; `masks_of` reads the masks from it.

    Raises:
        ValueError: at once for select_step >= prune_step, a negative coefficient, patterns that do not fit;
            in ``init`` for parameters of another tree; in ``update`` when ``params`` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, optax, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 16))}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.5})
        >>> tx = ct.clicktrain(optax.sgd(0.1), plan, select_step=1, prune_step=2, coeff=1e-4)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     grads = jax.tree.map(jnp.ones_like, params)
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((params["Conv_0"]["kernel"] != 0).sum())  # half of 128 kernels, 4 taps each
        256

    Source: ClickTrain, arXiv 2011.10170; step semantics of the authors' code, see `clicktrain_jax.phases`.
    """
    schedule = PhaseSchedule(select_step, prune_step, reselect_step, importance_steps)
    inner = optax.with_extra_args_support(inner)
    patterns = check_patterns(plan, fixed_set(4) if patterns is None else patterns)
    updates_of = phase_updates(
        inner, plan, coeff=coeff, patterns=patterns, importance=importance, importance_steps=importance_steps
    )

    def init(params: Tree) -> ClickTrainState:
        plan.check_tree(params)
        masks = empty_masks(params, plan, num_patterns_of(patterns))
        scores = empty_scores(plan, importance_steps)
        return ClickTrainState(jnp.zeros([], jnp.int32), masks, jnp.ones([], bool), scores, inner.init(params))

    def update(
        grads: Tree, state: ClickTrainState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ClickTrainState]:
        if params is None:
            raise ValueError("clicktrain needs the parameters: call update(grads, state, params)")
        present = {name for name, grad in named_leaves(grads) if grad is not None}
        for layer in plan.layers:
            if layer.name not in present:
                raise ValueError(f"{layer.name!r} is pruned, but it has no gradient")
        phase = schedule.phase_index(state.count)
        # What jit returned may be sharded in any way; see `replicated`.
        whole_masks, whole_scores = jax.tree.map(replicated, (state.masks, state.scores))
        state = state._replace(masks=whole_masks, scores=whole_scores)

        def choose() -> tuple[Tree, jax.Array]:
            layers, finite = updates_of.select(grads, params, state.scores)
            chosen = fill_masks(state.masks, layers)
            # Scores that are not finite choose nothing: what was kept is kept, and `masks_of` says why.
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), chosen, state.masks), finite

        masks, finite = jax.lax.cond(phase == Phase.SELECT, choose, lambda: (state.masks, state.scores_finite))
        scores = state.scores
        if scores:
            scores = jax.lax.switch(
                jnp.int32(schedule.gathers(state.count)) + 2 * jnp.int32(phase == Phase.SELECT),
                [
                    lambda: scores,
                    lambda: updates_of.gather(scores, grads, params),
                    lambda: jax.tree.map(jnp.zeros_like, scores),
                ],
            )
        # Masks are decoded inside the branches, so that phases without them pay nothing.
        grads = jax.lax.switch(
            jnp.int32(phase == Phase.REGULARIZE) + 2 * jnp.int32(phase == Phase.PRUNED),
            [
                lambda: grads,
                lambda: add_group_lasso(grads, params, decode_masks(masks), coeff, axes=plan.axes),
                lambda: apply_masks(grads, decode_masks(masks)),
            ],
        )
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        updates = _at_least_param_precision(updates, params, plan)
        updates, inner_state = jax.lax.cond(
            phase >= Phase.PRUNE,
            lambda: enforce(updates, inner_state, params, decode_masks(masks)),
            lambda: (updates, inner_state),
        )
        return updates, ClickTrainState(optax.safe_increment(state.count), masks, finite, scores, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: Any) -> Masks:
    """The masks inside an optimizer state.

    Args:
        opt_state: any state that holds one of `clicktrain`: chained, wrapped, of an ``nnx.Optimizer``, restored
            from a checkpoint (also without a template, when NamedTuples have become dictionaries).

    Returns:
        `Masks` with the parameters' containers (nested dictionaries for an ``nnx.State``); all True before the
        selection.

    Raises:
        ValueError: no such state, or several; or the scores at the selection were not finite.
    """
    fields = set(ClickTrainState._fields)

    def is_state(node: Any) -> bool:
        return isinstance(node, ClickTrainState) or (isinstance(node, dict) and set(node) == fields)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(f"expected an optimizer state with one clicktrain(...) inside, found {len(found)}")
    state = found[0] if isinstance(found[0], dict) else found[0]._asdict()
    finite = jax.tree.leaves(state["scores_finite"])[0]
    if isinstance(finite, jax.ShapeDtypeStruct):
        raise ValueError("an abstract optimizer state holds no masks: pass one of arrays")
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(
            "the scores at the selection were not finite (NaN or infinite loss or gradient), so nothing was selected "
            "then (a first selection's masks stand when it was the second): go back to an earlier checkpoint and lower "
            "the learning rate or check the data"
        )
    return decode_masks(state["masks"])


def enforce(updates: Tree, inner_state: Any, params: Tree, masks: Masks) -> tuple[Tree, Any]:
    """Make an update leave every masked weight, and all the optimizer remembers of it, at exactly zero.

    Args:
        updates: tree like ``params``, as an optax update returns it.
        inner_state: an optax state; arrays in it that mirror a parameter (the same path at its end, the same
            shape: momentum, second moments, averages) are masked.
        params: the parameters the updates will be added to.
        masks: `Masks` of that tree.

    Returns:
        ``(updates, inner_state)``.
    """
    keep = combine(masks)

    def hold(_: str, update: Any, weight: Any, mask: Any) -> Any:
        # w + (-w) is exactly zero.
        return update if mask is None or update is None else jnp.where(placed_like(mask, weight), update, -weight)

    updates = map_named(hold, updates, params, keep, what="masks")
    return updates, _mask_mirrors(inner_state, dict(named_leaves(keep)))


def _mask_mirrors(inner_state: Any, keep: dict[str, Any]) -> Any:
    paths = {path_keys(path) for path, _ in jax.tree_util.tree_flatten_with_path(inner_state)[0]}
    names = {tuple(name.split("/")) if name else () for name in keep}

    def name_of(keys: tuple[str, ...]) -> str | None:
        """The parameter whose path ends these keys. A module may be called like a field of the state: of several
        candidates the one below which most parameters are found is a copy of the parameter tree."""
        splits = [(keys[:start], keys[start:]) for start in range(len(keys) + 1) if keys[start:] in names]
        if not splits:
            return None
        return "/".join(max(splits, key=lambda split: sum((*split[0], *name) in paths for name in names))[1])

    def mask(path: tuple, leaf: Any) -> Any:
        held = keep.get(name_of(path_keys(path)))
        if held is None or jnp.shape(leaf) != held.shape or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return jnp.where(placed_like(held, leaf), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(mask, inner_state)


def _at_least_param_precision(updates: Tree, params: Tree, plan: Plan) -> Tree:
    """Cast the planned leaves' updates up to their weight's dtype, so that -w is exact in them."""
    planned = plan.by_name()

    def cast(name: str, update: Any, weight: Any) -> Any:
        if name not in planned:
            return update
        return update.astype(jnp.promote_types(update.dtype, weight.dtype))

    return map_named(cast, updates, params, what="updates")
