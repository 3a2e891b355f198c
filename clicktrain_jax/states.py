"""The state of a run: what it holds, how it is found inside an optimizer state, and what it says of itself."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.importance import NO_SCORE
from clicktrain_jax.masks import LayerMask, Masks
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import Tree, is_none, nest, path_keys, spread_like


class ClickTrainState(NamedTuple):
    """The state of `clicktrain`, of `phase_updates` and of the methods of `clicktrain_jax.methods`: arrays only, any
    checkpoint of the optimizer state carries it.

    Attributes:
        count: int32, updates done.
        selected: int32, the update (from 0) that chose the masks, the last one of several; -1 before.
        pruned: int32, the update that pruned; -1 before.
        postponed: int32, updates whose scores were wanted and not finite: each put the selection off by one.
        by_magnitude: bool (layers,), in the order of their sorted names: layers whose scores were all alike at the
            selection, so that the magnitudes of their weights decided.
        masks: tree like the parameters, a `clicktrain_jax.masks.LayerMask` at each planned leaf and None elsewhere.
        gathered: int32, how many updates' scores are in ``scores``; with 0 nothing in them counts.
        scores: float32 arrays by leaf name, the sum of the scores gathered so far for the next selection; empty when
            a selection takes one update's.
        exponents: int32 (layers,), as for ``by_magnitude``: the sums are ``scores * 2.0**exponents``.
        inner_state: the wrapped optimizer's state.
    """

    count: jax.Array
    selected: jax.Array
    pruned: jax.Array
    postponed: jax.Array
    by_magnitude: jax.Array
    masks: Tree
    gathered: Any
    scores: dict[str, jax.Array]
    exponents: Any
    inner_state: Any


_INTEGERS = ("count", "selected", "pruned", "postponed", "gathered", "exponents")
# What a state is known by where its type is lost.
_FACTS = ("count", "selected", "pruned", "postponed", "by_magnitude")


@dataclasses.dataclass(frozen=True)
class Status:
    """What has happened in a run.

    Attributes:
        count: updates done.
        selected: the update (from 0) that chose the masks; None for none yet.
        pruned: the update after which masked weights are zero; None for none yet.
        postponed: updates whose scores were wanted and not finite.
        by_magnitude: names of the layers whose scores were all alike at the selection (frozen, dead): the magnitudes of
            their weights decided.
    """

    count: int
    selected: int | None
    pruned: int | None
    postponed: int
    by_magnitude: tuple[str, ...]

    def __str__(self) -> str:
        done = "nothing is selected yet"
        if self.selected is not None:
            done = f"masks were selected in update {self.selected}"
            if self.pruned is None:
                done += "; not pruned yet"
            else:
                done += f", pruned {'in' if self.pruned >= self.selected else 'from'} update {self.pruned}"
                done += " on" * (self.pruned < self.selected)
        parts = [f"{self.count} updates done", done]
        if self.postponed:
            parts.append(f"put off by {self.postponed} updates whose scores were not finite")
        if self.by_magnitude:
            parts.append(f"by magnitude, for scores that were all alike: {', '.join(self.by_magnitude)}")
        return "; ".join(parts)


def status(opt_state: Any) -> Status:
    """What has happened in a run, in numbers and, as ``str``, in words.

    Args:
        opt_state: as for `masks_of`, concrete.

    Raises:
        ValueError: as `masks_of`.
    """
    state = find(opt_state)
    facts = {name: np.asarray(jax.device_get(getattr(state, name))) for name in _FACTS}
    named = zip(sorted(Masks.of(state.masks).layers), facts["by_magnitude"].tolist(), strict=True)
    when = {name: None if facts[name] < 0 else int(facts[name]) for name in ("selected", "pruned")}
    return Status(
        int(facts["count"]),
        **when,
        postponed=int(facts["postponed"]),
        by_magnitude=tuple(name for name, told in named if told),
    )


def masks_of(opt_state: Any) -> Masks:
    """The masks inside an optimizer state.

    Args:
        opt_state: any state that holds one of `clicktrain`, or of a method of `clicktrain_jax.methods`: chained,
            wrapped, of an ``nnx.Optimizer``, a TrainState, an ``nnx.State`` or a pure dictionary of one, replicated
            over devices by a leading axis, restored from a checkpoint (also without a template, when NamedTuples have
            become dictionaries).

    Returns:
        `Masks` with the parameters' containers (nested dictionaries of the pruned leaves where the state's types are
        lost, or for an ``nnx.State``); all True before the selection, of which `status` tells.

    Raises:
        ValueError: no such state, or several; an abstract one; a leading axis along which states differ.
    """
    state = find(opt_state)
    masks = Masks.of(state.masks)
    masks.layers = {name: _as_chosen(layer) for name, layer in masks.layers.items()}
    if not isinstance(state.pruned, jax.core.Tracer):
        selected, pruned = jax.device_get((state.selected, state.pruned))
        masks.pending = bool(selected >= 0 > pruned)
    return masks


def find(opt_state: Any) -> ClickTrainState:
    """The one `ClickTrainState` in an optimizer state, of plain arrays, without its inner state."""

    def is_state(node: Any) -> bool:
        return isinstance(node, ClickTrainState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    # What lies inside of the wrapped optimizer is another's.
    found = found or _by_path(opt_state)
    if len(found) != 1:
        several = "; pass the part of the state that holds the one you mean" if found else ""
        raise ValueError(
            "expected an optimizer state with one clicktrain(...) or one of ct.methods inside, found "
            f"{len(found)}{several}"
        )
    state = found[0]._replace(inner_state=None, scores={}, exponents=None, gathered=None)
    state = state._replace(**{name: jax.tree.leaves(getattr(state, name))[0] for name in _FACTS})
    if isinstance(state.count, jax.ShapeDtypeStruct):
        raise ValueError("an abstract optimizer state holds no masks: pass one of arrays")
    return _unreplicated(state) if np.ndim(state.count) else state


def _by_path(opt_state: Any) -> list[ClickTrainState]:
    """The states in what is left of one: nested containers whose keys are its fields."""
    with_paths = jax.tree_util.tree_flatten_with_path(opt_state)[0]
    leaves = {tuple("/".join(path_keys(path)).split("/")): leaf for path, leaf in with_paths}
    heads = [keys[:-1] for keys in leaves if keys[-1:] == ("selected",)]
    states = []
    for head in heads:
        masks: dict[str, dict[str, Any]] = {}
        for keys, leaf in leaves.items():
            if keys[: len(head) + 1] == (*head, "masks") and keys[-1] in LayerMask._fields:
                masks.setdefault("/".join(keys[len(head) + 1 : -1]), {})[keys[-1]] = leaf
        if masks and all((*head, name) in leaves for name in _FACTS):
            layers = {name: LayerMask(*map(fields.get, LayerMask._fields)) for name, fields in masks.items()}
            facts = {name: leaves[*head, name] for name in _FACTS}
            states.append(
                ClickTrainState(masks=nest(layers), gathered=None, scores={}, exponents=None, inner_state=None, **facts)
            )
    return states


def _unreplicated(state: ClickTrainState) -> ClickTrainState:
    """One of several equal states along leading axes."""
    axes = np.ndim(state.count)
    if isinstance(state.count, jax.core.Tracer):
        raise ValueError("the state has a leading axis: take one state of it, jax.tree.map(lambda x: x[0], opt_state)")
    first = jax.tree.map(lambda leaf: leaf[(0,) * axes], state)
    for leaf, one in zip(jax.tree.leaves(state), jax.tree.leaves(first)):
        if not (np.asarray(leaf) == np.asarray(one)).all():
            raise ValueError(
                f"there are {np.size(state.count)} states along a leading axis, and they differ: take one of them, "
                "jax.tree.map(lambda x: x[0], opt_state)"
            )
    return first


def fill_masks(like: Tree, layers: dict[str, LayerMask]) -> Tree:
    """The containers of ``like`` (parameters, or masks of a state) with masks by name, and None elsewhere.

    ``nnx.State`` wraps its leaves in variables, which hold arrays only; for it the containers become plain
    nested dictionaries of the same names.
    """
    with_paths, structure = jax.tree_util.tree_flatten_with_path(
        like, is_leaf=lambda node: is_none(node) or isinstance(node, LayerMask)
    )
    filled = {"/".join(path_keys(path)): layers.get("/".join(path_keys(path))) for path, _ in with_paths}
    if all(len(path) == len(path_keys(path)) for path, _ in with_paths):
        return structure.unflatten(filled.values())
    return nest(filled)


def first_state(
    params: Tree,
    layers: dict[str, LayerMask],
    inner_state: Any,
    *,
    selected: int = -1,
    pruned: int = -1,
    scores: dict[str, jax.Array] | None = None,
) -> ClickTrainState:
    """The state before the first update.

    Args:
        params: tree of arrays, whose containers the masks get.
        layers: the masks by leaf name.
        inner_state: the wrapped optimizer's.
        selected: 0 where these masks are a method's choice already; -1 where they keep all.
        pruned: 0 where no weight has to be zero for them; -1 where weights will be.
        scores: zeros, where scores are gathered.
    """
    state = ClickTrainState(
        count=jnp.zeros([], jnp.int32),
        selected=jnp.full([], selected, jnp.int32),
        pruned=jnp.full([], pruned, jnp.int32),
        postponed=jnp.zeros([], jnp.int32),
        by_magnitude=jnp.zeros(len(layers), bool),
        masks=fill_masks(params, layers),
        gathered=jnp.zeros([], jnp.int32),
        scores=scores or {},
        exponents=jnp.full(len(layers), NO_SCORE, jnp.int32),
        inner_state=None,
    )
    return spread_like(state, params)._replace(inner_state=inner_state)


def check_state(state: Any, plan: Plan, num_patterns: int, importance_steps: Any) -> ClickTrainState:
    """The state, of the dtypes that it was made with: `optax.contrib.sam` mixes two by arithmetic.

    Raises:
        ValueError: it was saved with another plan; the layers in which they differ are named.
    """
    if not isinstance(state, ClickTrainState):
        raise ValueError(
            f"state is a {type(state).__name__}: expected the ClickTrainState that init makes. A checkpoint that was "
            "read without a template is restored with one, init(params)"
        )
    held = Masks.of(state.masks).layers
    differing = []
    for name in sorted(set(held) | set(plan.by_name())):
        layer = plan.by_name().get(name)
        if name not in held or layer is None:
            differing.append(f"{name!r} is pruned by the {'state' if layer is None else 'plan'} alone")
        elif tuple(held[name].shape) != layer.leaf_shape:
            differing.append(f"{name!r} has shape {held[name].shape} in the state, {layer.leaf_shape} in the plan")
        # Masks of single weights are arrays of the leaf's own shape, whatever its axes.
        elif held[name].patterns is not None and (np.ndim(held[name].kernel) == 4) != (layer.axes == "OIHW"):
            differing.append(f"{name!r} is {layer.axes} in the plan, and not in the state")
        elif held[name].patterns is not None and len(held[name].patterns) != num_patterns:
            differing.append(f"{name!r} has {len(held[name].patterns)} patterns in the state, {num_patterns} asked for")
    if differing:
        raise ValueError(
            f"the optimizer state was made for another plan: {'; '.join(differing[:4])}. Go on with the plan and the "
            "patterns that it was saved with, or begin anew with init(params)"
        )
    if not isinstance(importance_steps, jax.core.Tracer) and bool(state.scores) != (importance_steps > 1):
        raise ValueError(
            f"importance_steps={importance_steps}, and the optimizer state was made for "
            f"{'more than 1' if state.scores else '1'}: go on with what it was saved with"
        )
    return state._replace(
        **{name: _as(jnp.int32, getattr(state, name)) for name in _INTEGERS},
        by_magnitude=_as(bool, state.by_magnitude),
        masks=jax.tree.map(_as_chosen, state.masks, is_leaf=lambda node: isinstance(node, LayerMask)),
    )


def _as(dtype: Any, array: Any) -> Any:
    # Integers of another width are as good, and a carry of a loop keeps its dtype.
    return array if array is None or array.dtype.kind == jnp.dtype(dtype).kind else array.astype(dtype)


def _as_chosen(layer: LayerMask) -> LayerMask:
    return LayerMask(_as(jnp.uint8, layer.pattern_ids), _as(bool, layer.kernel), _as(bool, layer.patterns))
