"""ClickTrain as an optax transformation, and the same pieces one phase at a time.

`clicktrain` wraps any optax optimizer and goes through all phases inside a user's own loop. A loop that
knows its phase uses `phase_updates` instead and carries no conditional; both are made of the same functions, and
both hold one state, a `ClickTrainState`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from clicktrain_jax import importance as importance_lib
from clicktrain_jax.eager import branch, optimizer, transformation
from clicktrain_jax.enforcing import held_update
from clicktrain_jax.importance import NO_SCORE, rescaled, scaled_scores, times_power_of_two
from clicktrain_jax.lasso import add_group_lasso, check_coeff, inverse_norms
from clicktrain_jax.masks import Masks, apply_masks, keep_all
from clicktrain_jax.patterns import fixed_set
from clicktrain_jax.phases import PhaseSchedule
from clicktrain_jax.plan import Plan
from clicktrain_jax.selection import check_patterns, num_patterns_of, select_layers
from clicktrain_jax.states import ClickTrainState, check_state, fill_masks, first_state
from clicktrain_jax.trees import Tree, named_leaves, replicated, spread_like


class PhaseUpdates(NamedTuple):
    """Whole updates for a loop that knows its phase, named like `Phase`. Each is jittable, without a conditional, and
    ``(grads, state, params, **extra) -> (updates, state)`` of a `ClickTrainState`; the inner optimizer gets ``extra``.

    Attributes:
        init: ``params -> state``.
        dense: the inner optimizer's own update.
        gather: an update of the dense or the regularize phase whose scores are added for a selection later on, in the
            ``importance_steps - 1`` updates before it; an update of these phases without it drops them.
        select: an ordinary update whose gradient, with what was gathered, chooses the masks. Where a score is not
            finite, or too few were, nothing is chosen and ``state.selected`` stays as it was: call it again in the
            next update.
        regularize: with the group lasso.
        prune: once, at prune_step.
        pruned: from then on.
        masked: whichever of the last three the state asks for, one program for all that follows a selection; takes
            ``prunes`` too, a bool, perhaps traced: whether this update is the one at prune_step.
    """

    init: Callable[..., Any]
    dense: Callable[..., Any]
    gather: Callable[..., Any]
    select: Callable[..., Any]
    regularize: Callable[..., Any]
    prune: Callable[..., Any]
    pruned: Callable[..., Any]
    masked: Callable[..., Any]


class _Pieces:
    """What all updates are made of."""

    def __init__(
        self, inner: Any, plan: Plan, coeff: Any, patterns: Any, importance: Any, importance_steps: Any
    ) -> None:
        self.inner, self.plan, self.importance_steps = optimizer(inner), plan, importance_steps
        self.patterns = check_patterns(plan, fixed_set(4) if patterns is None else patterns)
        self.criterion = importance_lib.criterion(importance, plan.axes)
        if not callable(coeff):
            check_coeff(coeff)
        self.coeff: Callable[[Any], Any] = coeff if callable(coeff) else lambda count: coeff
        # In the order of their names, which every container and every checkpoint keeps.
        self.names = sorted(layer.name for layer in plan.layers)

    def checked(self, grads: Tree, state: Any, params: Tree) -> ClickTrainState:
        """The state; a ValueError where it, the gradients or the parameters are not those of the plan."""
        self.plan.check_tree(params)
        self.plan.check_tree(grads, "grads")
        return check_state(state, self.plan, num_patterns_of(self.patterns), self.importance_steps)

    def init(self, params: Tree) -> ClickTrainState:
        like = self.plan.tree_of(params)
        if isinstance(self.importance_steps, jax.core.Tracer):
            raise ValueError("importance_steps is traced: name it in static_args of optax.inject_hyperparams")
        num_patterns = num_patterns_of(self.patterns)
        layers = {layer.name: keep_all(layer.shape, num_patterns, layer.axes) for layer in self.plan.layers}
        gathers = self.importance_steps > 1
        scores = {layer.name: jnp.zeros(layer.leaf_shape, jnp.float32) for layer in self.plan.layers if gathers}
        return first_state(like, layers, self.inner.init(params), scores=scores)

    def _add_scores(self, grads: Tree, state: ClickTrainState, params: Tree) -> tuple[ClickTrainState, jax.Array]:
        """The state with this update's scores among the sums, and whether they are finite; if not, they are zero."""
        new = scaled_scores(self.criterion, params, grads, self.names)
        # Whole on every device: what sorts has no sharding of its own.
        new = {name: (replicated(score), exponent) for name, (score, exponent) in new.items()}
        finite = jnp.all(jnp.stack([jnp.isfinite(score).all() for score, _ in new.values()]))
        new = {name: (jnp.where(finite, one, 0.0), jnp.where(finite, at, NO_SCORE)) for name, (one, at) in new.items()}
        if not state.scores:
            return state._replace(scores={name: score for name, (score, _) in new.items()}), finite
        sums, exponents, counts = {}, [], state.gathered > 0
        for index, name in enumerate(self.names):
            before = jnp.where(counts, state.scores[name], 0.0), jnp.where(counts, state.exponents[index], NO_SCORE)
            exponents.append(jnp.maximum(before[1], new[name][1]))
            parts = before, new[name]
            sums[name] = sum(times_power_of_two(score, at - exponents[-1]) for score, at in parts)
        return state._replace(scores=sums, exponents=jnp.stack(exponents)), finite

    def gather(self, grads: Tree, state: ClickTrainState, params: Tree) -> ClickTrainState:
        """The state after a look at a gradient that counts for a selection later on."""
        state, finite = self._add_scores(grads, state, params)
        return state._replace(
            gathered=state.gathered + finite.astype(jnp.int32), postponed=state.postponed + (~finite).astype(jnp.int32)
        )

    def select(self, grads: Tree, old: ClickTrainState, params: Tree) -> ClickTrainState:
        """The state after the choice of the masks; as after `gather` where there are not enough finite scores yet."""
        seen = self.gather(grads, old, params)
        complete = (seen.gathered > old.gathered) & (seen.gathered >= self.importance_steps)
        weights, means, alike = dict(named_leaves(params)), {}, {}
        for name, total in seen.scores.items():
            mean = total / jnp.float32(self.importance_steps)
            # A frozen layer, or a dead one, says nothing of its weights: their magnitudes do.
            alike[name] = mean.max() == mean.min()
            magnitude = jnp.square(rescaled(replicated(weights[name]).astype(jnp.float32), 0)[0])
            means[name] = jnp.where(alike[name], magnitude, mean)
        layers = select_layers(means, self.plan, self.patterns)
        if not old.scores:
            seen = seen._replace(scores={}, gathered=old.gathered)
        new = seen._replace(
            selected=old.count,
            by_magnitude=jnp.stack([alike[name] for name in self.names]),
            masks=fill_masks(old.masks, layers),
            gathered=jnp.zeros_like(old.gathered),
            scores=jax.tree.map(jnp.zeros_like, old.scores),
            exponents=jnp.full_like(old.exponents, NO_SCORE),
        )
        return jax.tree.map(lambda new, old: old if new is old else jnp.where(complete, new, old), new, seen)

    def move(
        self,
        grads: Tree,
        state: ClickTrainState,
        params: Tree,
        extra: dict[str, Any],
        *,
        lasso: Any = False,
        masked: Any = False,
        held: Any = False,
        inverses: dict[str, list[jax.Array]] | None = None,
    ) -> tuple[Tree, ClickTrainState]:
        """The inner optimizer's update, with what a phase does to the gradient before it and to its result.

        Args:
            grads, state, params, extra: as for ``update``.
            lasso, masked: whether the gradient gets the group lasso, or is masked; bools, perhaps traced.
            held: whether masked weights are zero afterwards.
            inverses: of `inverse_norms`, for the lasso.
        """
        # Spelled out once for all that reads them.
        masks = Masks.of(Masks.of(state.masks).view(lambda layer: layer.full()))
        if lasso is not False:
            coeff = self.coeff(state.count)
            grads = add_group_lasso(grads, params, masks, coeff, axes=self.plan.axes, where=lasso, inverses=inverses)
        if masked is not False:
            grads = apply_masks(grads, _where(masks, masked))
        if held is False:
            updates, inner_state = self.inner.update(grads, state.inner_state, params, **extra)
        else:
            keep = _where(masks, held)
            updates, inner_state = held_update(self.inner, grads, state.inner_state, params, extra, keep)
        state = state._replace(masks=spread_like(state.masks, params), inner_state=inner_state)
        return updates, state._replace(count=optax.safe_increment(state.count))


def _where(masks: Masks, flag: Any) -> Masks:
    """The masks where a bool is True; where it is False, ones that keep all."""
    return masks if flag is True else Masks.of(masks.view(lambda layer: layer.where(flag)))


def phase_updates(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    coeff: float | optax.Schedule,
    patterns: Any = None,
    importance: str | importance_lib.Criterion = "taylor",
    importance_steps: int = 1,
) -> PhaseUpdates:
    """The updates of each phase as separate functions, without any conditional.

    Args:
        inner, plan, coeff, patterns, importance, importance_steps: as for `clicktrain`.

    Returns:
        `PhaseUpdates`; `PhaseSchedule` knows which is due.

    Raises:
        ValueError: a negative coefficient, an unknown criterion, patterns that do not fit the plan.

    Example:
        >>> import jax, jax.numpy as jnp, optax, clicktrain_jax as ct
        >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 16))}}
        >>> plan = ct.make_plan(params, {"Conv_0/kernel": 0.5})
        >>> updates_of = ct.phase_updates(optax.sgd(0.1), plan, coeff=1e-4)
        >>> schedule = ct.PhaseSchedule(select_step=1, prune_step=2)
        >>> state = updates_of.init(params)
        >>> for step in range(3):
        ...     grads = jax.tree.map(jnp.ones_like, params)
        ...     update = getattr(updates_of, schedule.phase(step).name.lower())
        ...     updates, state = update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((params["Conv_0"]["kernel"] != 0).sum())
        256
    """
    pieces = _Pieces(inner, plan, coeff, patterns, importance, importance_steps)

    def ungathered(state: ClickTrainState) -> ClickTrainState:
        # Scores from before an update that gathers none are of no window.
        return state._replace(gathered=jnp.zeros_like(state.gathered))

    def dense(grads: Tree, state: ClickTrainState, params: Tree, **extra: Any) -> tuple[Tree, ClickTrainState]:
        return pieces.move(grads, ungathered(state), params, extra)

    def gather(grads: Tree, state: ClickTrainState, params: Tree, **extra: Any) -> tuple[Tree, ClickTrainState]:
        if not state.scores:
            raise ValueError("importance_steps=1: there is nothing to gather, call select")
        seen = pieces.gather(grads, state, params)
        return pieces.move(grads, seen, params, extra, lasso=state.selected >= 0)

    def select(grads: Tree, state: ClickTrainState, params: Tree, **extra: Any) -> tuple[Tree, ClickTrainState]:
        return pieces.move(grads, pieces.select(grads, state, params), params, extra)

    def regularize(grads: Tree, state: ClickTrainState, params: Tree, **extra: Any) -> tuple[Tree, ClickTrainState]:
        return pieces.move(grads, ungathered(state), params, extra, lasso=True)

    def prune(grads: Tree, state: ClickTrainState, params: Tree, **extra: Any) -> tuple[Tree, ClickTrainState]:
        return pieces.move(grads, state._replace(pruned=state.count), params, extra, held=True)

    def pruned(grads: Tree, state: ClickTrainState, params: Tree, **extra: Any) -> tuple[Tree, ClickTrainState]:
        return pieces.move(grads, state, params, extra, masked=True, held=True)

    def masked(
        grads: Tree, state: ClickTrainState, params: Tree, prunes: Any = False, **extra: Any
    ) -> tuple[Tree, ClickTrainState]:
        is_pruned, prunes = state.pruned >= 0, jnp.asarray(prunes)
        regularizes = (state.selected >= 0) & ~is_pruned & ~prunes
        state = state._replace(pruned=jnp.where(prunes, state.count, state.pruned))
        return pieces.move(grads, state, params, extra, lasso=regularizes, masked=is_pruned, held=is_pruned | prunes)

    def checked(update: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(update)
        def call(grads: Tree, state: Any, params: Tree, *rest: Any, **extra: Any) -> tuple[Tree, ClickTrainState]:
            return update(grads, pieces.checked(grads, state, params), params, *rest, **extra)

        return call

    return PhaseUpdates(pieces.init, *map(checked, (dense, gather, select, regularize, prune, pruned, masked)))


def clicktrain(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    select_step: int,
    prune_step: int,
    coeff: float | optax.Schedule,
    patterns: Any = None,
    importance: str | importance_lib.Criterion = "taylor",
    importance_steps: int = 1,
    reselect_step: int | None = None,
    reselect_every: int | None = None,
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
        coeff: weight of the group lasso in the loss between the two, >= 0; or a function of the updates done.
        patterns: bool (P, kh, kw), by default the published set of 4 4-of-9 patterns; or a
            `clicktrain_jax.patterns.Generated`, for sets made from the scores of the selection.
        importance: "taylor", "group_taylor", "magnitude", or a function ``(params, grads) -> scores``.
        importance_steps: scores are the mean over so many updates, each at its own weights, the selecting update
            being the last. More than 1 keeps a float32 number for each planned weight. 1 is the authors';
            what more are worth is what ``experiments importance`` measures.
        reselect_step: an update between the two that chooses the masks anew.
        reselect_every: chooses them anew every so many updates between the two, instead.

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
    schedule = PhaseSchedule(select_step, prune_step, reselect_step, importance_steps, reselect_every)
    pieces = _Pieces(inner, plan, coeff, patterns, importance, importance_steps)

    def whole_update(
        grads: Tree, state: ClickTrainState, params: Tree, extra: dict[str, Any]
    ) -> tuple[Tree, ClickTrainState]:
        state = pieces.checked(grads, state, params)
        due = schedule.due(state.count, state.selected, state.pruned, state.gathered)
        # What jit returned may be sharded in any way, and the branches must agree.
        masks, scores = jax.tree.map(replicated, (state.masks, state.scores))
        state = state._replace(masks=masks, scores=scores, gathered=jnp.where(due.forgets, 0, state.gathered))
        before = state._replace(inner_state=None)  # no business of the selection

        def norms() -> dict[str, list[jax.Array]]:
            return inverse_norms(params, Masks.of(before.masks), axes=plan.axes)

        def look(how: Callable[..., Any] | None, pushes: bool) -> Callable[[], tuple[ClickTrainState, Any]]:
            found = norms if pushes else lambda: jax.tree.map(jnp.zeros_like, norms())
            return lambda: (before if how is None else how(grads, before, params), found())

        ways = [look(None, False), look(pieces.select, False), look(None, True)]
        if state.scores:
            ways += [look(pieces.gather, False), look(pieces.gather, True)]
        # The only conditional, around all that is costly and not due in every update; weights do not go through it.
        pushes, gathers = jnp.int32(due.regularizes), jnp.int32(due.gathers)
        seen, inverses = branch(jnp.int32(due.selects) + 2 * (pushes | gathers) + gathers * (1 + pushes), ways)
        pruned = jnp.where(due.prunes, state.count, state.pruned)
        return pieces.move(
            grads,
            seen._replace(pruned=pruned, inner_state=state.inner_state),
            params,
            extra,
            lasso=due.regularizes,
            masked=due.pruned,
            held=due.prunes | due.pruned,
            inverses=inverses,
        )

    def check(grads: Tree, params: Tree | None, extra: dict[str, Any]) -> None:
        if params is None:
            raise ValueError("clicktrain needs the parameters: call update(grads, state, params)")

    return transformation(pieces.init, whole_update, check)
