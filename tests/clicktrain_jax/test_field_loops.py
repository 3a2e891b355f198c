"""Loops and optimizers as others combine them: masked weights are zero from the prune on, or it is told that not."""

import functools
import pathlib
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

import clicktrain_jax as ct
from clicktrain_jax.trees import named_leaves

LABELS = {"Conv_0": "one", "Conv_1": "one", "Conv_2": "two", "Dense_0": "one"}
IN_CONV_1 = {name: name == "Conv_1" for name in LABELS}
# name: (what the wrapper stands around, moments kept for each weight of Conv_1 and of Conv_2).
INNER = {
    "a frozen part": (
        lambda: optax.multi_transform({"one": optax.adam(0.01), "two": optax.set_to_zero()}, LABELS),
        2,
        0,
    ),
    "a part masked": (lambda: optax.masked(optax.adamw(0.01), IN_CONV_1), 2, 0),
    "accumulated within": (lambda: optax.MultiSteps(optax.adam(0.01), 2), 3, 3),
    "schedule-free": (lambda: optax.contrib.schedule_free_sgd(0.01), 1, 1),
    "averaged updates": (lambda: optax.chain(optax.sgd(0.01, momentum=0.9), optax.ema(0.9)), 2, 2),
    "clipped afterwards": (lambda: optax.chain(optax.sgd(0.1), optax.clip(1e-3)), 0, 0),
    "mechanized": (lambda: optax.contrib.mechanize(optax.sgd(0.01)), 1, 1),
}


def step_of(tx, loss, jit=jax.jit):
    @jit
    def step(params, state, number):
        updates, state = tx.update(jax.grad(loss)(params, number), state, params)
        return optax.apply_updates(params, updates), state

    return step


def zeros_of(params, state):
    """By leaf: (how many weights are zero, how many the masks remove)."""
    leaves = dict(named_leaves(params))
    masks = {
        name: np.asarray(keep) for name, keep in named_leaves(ct.masks.combine(ct.masks_of(state))) if keep is not None
    }
    assert masks
    return {name: (int((np.asarray(leaves[name]) == 0).sum()), int((~keep).sum())) for name, keep in masks.items()}


def assert_pruned(params, state, toy):
    assert (ct.status(state).selected, ct.status(state).pruned) == (toy.SELECT, toy.PRUNE)
    for zeros, removed in zeros_of(params, state).values():
        assert zeros == removed > 0
    applied = ct.apply_masks(params, ct.masks_of(state))
    jax.tree.map(np.testing.assert_array_equal, applied, params)


@pytest.mark.parametrize("name", INNER)
def test_optimizers_within(name, toy):
    inner, *moments = INNER[name]
    history = toy.run(ct.clicktrain(inner(), toy.plan(), **toy.SCHEDULE))
    assert history.traces == 1
    for at in range(toy.PRUNE + 1, toy.STOP + 1):
        for layer, zeros in zip(toy.PRUNED, zeros_of(history.params[at], history.states[at]).values()):
            assert zeros[0] == zeros[1] > 0, (at, layer)
    assert_pruned(history.params[-1], history.states[-1], toy)
    for layer, count in zip(toy.PRUNED, moments):
        keep = toy.keep_of(history.states[-1])[layer]
        mirrors = [each for each in toy.mirrors(history.states[-1], layer) if each.dtype != bool]
        assert len(mirrors) == count
        assert not any(mirror[~keep].any() for mirror in mirrors)


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: optax.chain(tx, optax.scale(0.5)),
        lambda tx: optax.chain(tx, optax.clip(1e-3)),
        lambda tx: optax.contrib.schedule_free(tx, 0.1),
    ],
)
def test_what_moves_weights_again_is_told(outer, toy):
    """Behind the wrapper, or around it with weights of its own: nothing claims zeros that are not there."""
    history = toy.run(outer(ct.clicktrain(optax.sgd(0.1), toy.plan(), **toy.SCHEDULE)))
    params, masks = history.params[-1], ct.masks_of(history.states[-1])
    zeros = zeros_of(params, history.states[-1])
    missing = sum(removed - zero for zero, removed in zeros.values())
    assert missing > 0
    assert f"marked, not yet zero: {missing} weights" in ct.report(params, masks).to_text()


def test_averaged_weights_are_told_and_masked_when_asked(toy):
    tx = ct.clicktrain(optax.adam(0.01), toy.plan(), **toy.SCHEDULE)
    history = toy.run(tx)
    average = functools.reduce(lambda mean, new: optax.incremental_update(new, mean, 0.1), history.params)
    masks = ct.masks_of(history.states[-1])
    assert "marked, not yet zero: 242 weights" in ct.report(average, masks).to_text()
    applied = ct.apply_masks(average, masks)
    assert "marked" not in ct.report(applied, masks).to_text()
    for zeros, removed in zeros_of(applied, history.states[-1]).values():
        assert zeros == removed


def test_schedule_free_weights_for_evaluation(toy):
    history = toy.run(ct.clicktrain(optax.contrib.schedule_free_sgd(0.01), toy.plan(), **toy.SCHEDULE))
    state = history.states[-1]
    assert_pruned(optax.contrib.schedule_free_eval_params(state.inner_state, history.params[-1]), state, toy)


@pytest.mark.parametrize("way", ["scan", "donated", "scaled loss"])
def test_loops(way, toy):
    """The same masks as in a plain loop, and zeros that hold."""
    tx = ct.clicktrain(optax.adam(0.01), toy.plan(), **toy.SCHEDULE)
    plain = toy.run(tx)
    params, state = toy.params(), tx.init(toy.params())
    numbers = jnp.arange(float(toy.STOP))
    if way == "scan":
        step = step_of(tx, toy.loss, lambda step: step)
        run = toy.quick_jit(lambda carry: jax.lax.scan(lambda carry, at: (step(*carry, at), None), carry, numbers)[0])
        params, state = run((params, state))
    elif way == "donated":
        step = step_of(tx, toy.loss, functools.partial(toy.quick_jit, donate_argnums=(0, 1)))
        for number in numbers:
            params, state = step(params, state, number)
    else:
        # As in mixed precision: every third update overflows, and neither weights nor state take it.
        step = step_of(
            tx, lambda tree, at: toy.loss(tree, at // 1) * jnp.where(at % 1 > 0, jnp.inf, 1.0), toy.quick_jit
        )
        for number in numbers:
            for at in (number + 0.5, number) if number % 3 == 2 else (number,):
                new = step(params, state, at)
                is_finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new[0]))
                params, state = new if is_finite else (params, state)
    assert_pruned(params, state, toy)
    jax.tree.map(np.testing.assert_array_equal, ct.masks_of(state), ct.masks_of(plain.states[-1]))


def test_seeds_side_by_side(toy):
    """Several runs under vmap choose what each would alone; masks are read of one of them."""
    tx = ct.clicktrain(optax.adam(0.01), toy.plan(), **toy.SCHEDULE)
    runs = [toy.params(seed=seed) for seed in (1, 2)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    state = jax.vmap(tx.init)(params)
    step = toy.quick_jit(jax.vmap(step_of(tx, toy.loss, lambda step: step), (0, 0, None)))
    for number in range(toy.STOP):
        params, state = step(params, state, jnp.float32(number))
    with pytest.raises(ValueError, match="2 states along a leading axis, and they differ"):
        ct.masks_of(state)
    for index, alone in enumerate(runs):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], (params, state))
        assert_pruned(*own, toy)
        wanted = ct.masks_of(toy.run(tx, alone).states[-1])
        jax.tree.map(np.testing.assert_array_equal, ct.masks_of(own[1]), wanted)


@pytest.mark.parametrize("together", [False, True], ids=["two wrappers", "one tree"])
def test_two_nets_with_an_optimizer_each(together, toy):
    """A generator and its critic: two wrappers, whose masks are read one by one, or one around both."""
    nets = {"generator": toy.params(seed=1), "critic": toy.params(seed=2)}
    inner = {"generator": optax.adam(0.01), "critic": optax.sgd(0.1)}
    rules = {".*Conv_1/kernel": 0.5}
    if together:
        plan = ct.make_plan(nets, rules)
        tx = ct.clicktrain(optax.multi_transform(inner, {name: name for name in nets}), plan, **toy.SCHEDULE)
    else:
        wrapped = {
            name: ct.clicktrain(one, ct.make_plan({name: nets[name]}, rules), **toy.SCHEDULE)
            for name, one in inner.items()
        }
        tx = optax.multi_transform(wrapped, {name: name for name in nets})

    def loss(nets, number):
        return toy.loss(nets["generator"], number) + toy.loss(nets["critic"], -number)

    state, step = tx.init(nets), step_of(tx, loss, toy.quick_jit)
    for number in range(toy.STOP):
        nets, state = step(nets, state, jnp.float32(number))
    if together:
        assert set(zeros_of(nets, state)) == {"critic/Conv_1/kernel", "generator/Conv_1/kernel"}
        assert_pruned(nets, state, toy)
        return
    with pytest.raises(ValueError, match="found 2; pass the part of the state that holds the one you mean"):
        ct.masks_of(state)
    for name in nets:
        assert_pruned(nets, state.inner_states[name], toy)
        assert set(zeros_of(nets, state.inner_states[name])) == {f"{name}/Conv_1/kernel"}


class Backbone(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.backbone, self.head = Backbone(rngs), nnx.Conv(8, 4, (3, 3), rngs=rngs)


@pytest.mark.parametrize(
    ("wrt", "pruned"),
    [
        (nnx.All(nnx.Param, nnx.PathContains("backbone")), {"backbone/conv/kernel"}),
        (nnx.All(nnx.Param, lambda path, _: path[0] == "head" and path[-1] == "kernel"), {"head/kernel"}),
    ],
)
def test_an_nnx_optimizer_of_a_part(wrt, pruned, toy):
    """Frozen is what the filter leaves out; masks of the rest fit the whole model."""
    model = Model(nnx.Rngs(0))
    frozen = {name: leaf for name, leaf in named_leaves(nnx.state(model, nnx.Param)) if name not in pruned}
    plan = ct.make_plan(nnx.state(model, wrt), {".*kernel": 0.5})
    optimizer = nnx.Optimizer(model, ct.clicktrain(optax.adam(0.01), plan, **toy.SCHEDULE), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return sum(jnp.cos(weight).sum() for weight in jax.tree.leaves(nnx.state(model)))

        slopes = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))
        optimizer.update(model, slopes(model))

    for _ in range(toy.STOP):
        step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    zeros = zeros_of(params, optimizer.opt_state)
    assert set(zeros) == pruned and all(zero == removed > 0 for zero, removed in zeros.values())
    report = ct.report(params, ct.masks_of(optimizer.opt_state))
    assert {layer.name for layer in report.layers if layer.pruned} == pruned
    unchanged = {name for name, leaf in named_leaves(params) if name in frozen and np.array_equal(leaf, frozen[name])}
    assert unchanged >= {name for name in frozen if not name.startswith(next(iter(pruned)).partition("/")[0])}


@pytest.mark.parametrize("form", ["pickle", "msgpack"])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_state_that_an_older_jax_wrote(form, step, toy):
    """Saved by Python 3.11 and jax 0.10.2, between the phases: the run goes on to the same end."""
    saved = np.load(pathlib.Path(__file__).with_name("states_of_an_old_jax.npz"))
    tx = ct.clicktrain(optax.adam(0.01), toy.plan(), **toy.SCHEDULE, importance_steps=2)
    data = saved[f"{form} {step}"].tobytes()
    if form == "pickle":
        params, state = pickle.loads(data)
    else:
        params, state = flax.serialization.from_bytes((toy.params(), tx.init(toy.params())), data)
    assert ct.status(state).count == step
    update = step_of(tx, toy.loss, toy.quick_jit)
    for number in range(step, toy.STOP):
        params, state = update(params, state, jnp.float32(number))
    assert_pruned(params, state, toy)
    for name, leaf in named_leaves(params):
        np.testing.assert_allclose(leaf, saved[f"end {name}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(leaf) == 0, saved[f"end {name}"] == 0)


def test_typed_random_keys_among_parameters_and_in_states(toy):
    """They are no numbers: nothing is scored, masked or counted in their place, and nothing fails."""

    def noisy(updates, key, params=None):
        del params
        own, following = jax.random.split(key)
        noise = 1e-3 * jax.random.uniform(own)
        return jax.tree.map(lambda leaf: noise - 0.1 * leaf, updates), following

    inner = optax.GradientTransformation(lambda params: jax.random.key(0), noisy)
    tx = ct.clicktrain(inner, toy.plan(), **toy.SCHEDULE)
    history = toy.run(tx)
    params, state = history.params[-1], history.states[-1]
    assert_pruned(params, state, toy)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), {"rng": jax.random.key(1), "opt_state": state})
    jax.tree.map(np.testing.assert_array_equal, ct.masks_of(several), ct.masks_of(state))
    with_key = params | {"rng": jax.random.key(2)}
    masks = ct.masks_of(state)
    assert ct.report(with_key, masks).marked == 0
    assert ct.apply_masks(with_key, masks)["rng"] == with_key["rng"]
    for criterion in (ct.importance.taylor, ct.importance.group_taylor, ct.importance.magnitude):
        scores = criterion(with_key, with_key)
        assert scores.pop("rng") is None
        jax.tree.map(np.testing.assert_array_equal, scores, criterion(params, params))
