"""One contract over every method: a user's unchanged loop, compiled once, zeros held, masks found wherever they lie."""

import doctest
import importlib
import inspect
import pkgutil
from functools import partial

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src import monitoring

import clicktrain_jax as ct
from clicktrain_jax import methods
from clicktrain_jax.channels import ChannelNode

DENSITIES = {"Conv_1/kernel": 0.3, "Conv_2/kernel": 0.45}
KEY = jax.random.key(5)
EXCHANGE = {"densities": DENSITIES, "key": KEY, "every": 2, "end_step": 6}
NODES = (ChannelNode(4, (("Conv_1/kernel", 3),), (("Conv_1/bias", 0),), (("Conv_2/kernel", 2, 1),)),)
STEPS = 6
# Each around an optimizer, with a plan of the toy problem. All masks stand before the last two updates.
METHODS = {
    "magnitude": lambda inner, plan: methods.magnitude(inner, plan, prune_step=2, densities=DENSITIES),
    "gradual_magnitude": lambda inner, plan: methods.gradual_magnitude(
        inner, plan, densities=DENSITIES, begin_step=0, end_step=3, every=1
    ),
    "rigl": lambda inner, plan: methods.rigl(inner, plan, **EXCHANGE),
    "sparse_evolutionary": lambda inner, plan: methods.sparse_evolutionary(inner, plan, **EXCHANGE),
    "n_of_m": lambda inner, plan: methods.n_of_m(inner, plan, prune_step=2),
    "sr_ste": lambda inner, plan: methods.sr_ste(inner, plan),
    "admm": lambda inner, plan: methods.admm(
        inner, plan, patterns=ct.patterns.fixed_set(4), rho=0.1, every=2, prune_step=3
    ),
    "prunetrain": lambda inner, plan: methods.prunetrain(inner, NODES, prefix="", every=3, threshold=50.0),
    "random": lambda inner, plan: methods.random(inner, plan, densities=DENSITIES, key=KEY),
}
every_method = pytest.mark.parametrize("name", METHODS)


def test_no_method_is_left_out():
    first = {name: next(iter(inspect.signature(getattr(methods, name)).parameters)) for name in methods.__all__}
    assert set(METHODS) == {name for name, parameter in first.items() if parameter == "inner"}


def keep_of(state):
    return {name: np.asarray(layer.combined()) for name, layer in ct.masks_of(state).layers.items()}


def kernel(tree, name):
    layer, leaf = name.split("/")
    return np.asarray(tree[layer][leaf])


@pytest.fixture(scope="module")
def runs(toy):
    """``run(name, inner)``: the history around SGD with momentum, once for each method."""
    made = {}

    def run(name):
        if name not in made:
            tx = METHODS[name](optax.sgd(0.1, momentum=0.9), toy.plan())
            made[name] = tx, toy.run(tx, steps=STEPS, value=jnp.float32(2.0))
        return made[name]

    return run


@every_method
def test_a_loop_that_is_compiled_once_ends_pruned(runs, name, toy):
    tx, history = runs(name)
    assert history.traces == 1
    first = jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), history.states[0])
    for state in history.states[1:]:
        assert jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), state) == first
    last, state = history.params[-1], history.states[-1]
    before = keep_of(history.states[-2])
    for layer, keep in keep_of(state).items():
        assert 0 < keep.sum() < keep.size
        if name == "sr_ste":  # its masks are those of the moment
            last = methods.straight_through(last, toy.plan())
        else:
            np.testing.assert_array_equal(keep, before[layer])
            memory = toy.mirrors(optax.tree.get(state, "trace"), layer.split("/")[0])
            assert len(memory) == 1 and not memory[0][~keep].any() and memory[0][keep].all()
        np.testing.assert_array_equal(kernel(last, layer) != 0, keep)
    for layer in ("Conv_0", "Dense_0"):
        assert np.all(history.params[-1][layer]["kernel"])
    status = ct.status(state)
    assert status.count == STEPS and status.pruned is not None and status.selected is not None
    masks = ct.masks_of(state)
    assert not masks.pending
    report = ct.report(last, masks)
    assert report.marked == 0 and report.pruned_layers_compression > 1.2


@every_method
def test_masks_of_the_first_state(runs, name, toy):
    """Before anything is done no weight is called pruned; masks that are drawn already are pending."""
    tx, history = runs(name)
    masks = ct.masks_of(history.states[0])
    drawn = name in ("rigl", "sparse_evolutionary", "random")
    assert masks.pending == drawn and ct.status(history.states[0]).count == 0
    if name != "sr_ste":
        assert ct.report(history.params[0], masks).conv_compression == 1.0
    shapes = jax.eval_shape(tx.init, toy.params())
    assert jax.tree.structure(shapes) == jax.tree.structure(history.states[0])


@every_method
def test_optax_tells_copies_of_the_parameters_from_all_else(runs, name):
    """`optax.tree.map_params`, by which a state is sharded as the parameters are."""
    tx, history = runs(name)
    state = history.states[-1]
    if name == "prunetrain":  # its masks have shapes that the parameters alone tell
        with pytest.raises(ValueError, match="the tree has no leaf 'Conv_1/kernel'"):
            optax.tree.map_params(tx, lambda leaf: -leaf, state)
        return
    turned = optax.tree.map_params(tx, lambda leaf: -leaf, state)
    trace = optax.tree.get(state, "trace")
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, -old), optax.tree.get(turned, "trace"), trace)
    jax.tree.map(np.testing.assert_array_equal, optax.tree.set(turned, trace=trace), state)


@pytest.fixture
def compilations():
    """A list that grows by one for each program that is compiled."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


@every_method
def test_the_same_without_jit_and_nothing_is_compiled_twice(runs, name, toy, compilations):
    tx, history = runs(name)
    tree, state = toy.params(), tx.init(toy.params())
    for step in range(STEPS):
        updates, state = tx.update(history.grads[step], state, tree, value=jnp.float32(2.0))
        tree = optax.apply_updates(tree, updates)
        if step == 0:
            compilations.clear()
    assert not compilations
    jax.tree.map(np.testing.assert_array_equal, keep_of(state), keep_of(history.states[-1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), tree, history.params[-1])
    assert ct.status(state) == ct.status(history.states[-1])


def nnx_states(state):
    class Holder(nnx.Module):
        pass

    holder = Holder()
    holder.opt_state = nnx.data(jax.tree.map(nnx.Variable, state))
    return nnx.state(holder)


PLACES = {
    "chained": lambda state: (optax.EmptyState(), (state,)),
    "nnx state": nnx_states,
    "restored without a template": lambda state: flax.serialization.msgpack_restore(flax.serialization.to_bytes(state)),
    "replicated": lambda state: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state),
}


@every_method
def test_masks_are_found_wherever_the_state_stands(runs, name):
    state = runs(name)[1].states[-1]
    expected = keep_of(state)
    for where, place in PLACES.items():
        held = place(state)
        found = {layer: np.asarray(mask.combined()) for layer, mask in ct.masks_of(held).layers.items()}
        assert set(found) == set(expected), where
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert ct.status(held) == ct.status(state)


@every_method
def test_a_checkpoint_goes_on_bit_for_bit(runs, name, toy):
    tx, history = runs(name)
    data = flax.serialization.to_bytes(history.states[4])
    restored = flax.serialization.from_bytes(tx.init(toy.params()), data)
    assert jax.tree.structure(restored) == jax.tree.structure(history.states[4])
    jax.tree.map(np.testing.assert_array_equal, restored, history.states[4])


@every_method
def test_what_is_handed_on_and_what_is_refused(name, toy):
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda grad: -0.1 * grad, updates), state + value

    inner = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)
    tx = METHODS[name](inner, toy.plan())
    params = toy.params()
    state = tx.init(params)
    _, after = tx.update(params, state, params, value=jnp.float32(3))
    seen = after
    while hasattr(seen, "inner_state"):
        seen = seen.inner_state
    assert float(seen) == 3
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="leaves? against|no leaf|has shape|another tree"):
        tx.init({"Conv_1": {"kernel": jnp.ones((3, 3, 8, 4))}})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prunetrain"])
def test_a_state_of_another_plan_is_refused(name, toy):
    params = toy.params()
    state = METHODS[name](optax.sgd(0.1), toy.plan()).init(params)
    wider = {**params, "Conv_1": {"kernel": jnp.ones((3, 3, 8, 8)), "bias": jnp.ones(8)}}
    tx = METHODS[name](optax.sgd(0.1), toy.plan(wider))
    with pytest.raises(ValueError, match="the optimizer state was made for another plan: 'Conv_1/kernel' has shape"):
        tx.update(wider, state, wider)


@every_method
def test_strict_modes(name, toy):
    """No dtype and no rank is promoted without a word."""
    params = toy.params()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        tx = METHODS[name](optax.sgd(0.1, momentum=0.9), toy.plan())
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(partial(tx.update, value=jnp.float32(1)), params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        if name == "sr_ste":
            jax.eval_shape(lambda params: methods.straight_through(params, toy.plan()), params)


class Pair(nnx.Module):
    """Two convolutions of the toy's shapes."""

    def __init__(self, rngs):
        self.Conv_1 = nnx.Conv(8, 4, (3, 3), rngs=rngs)
        self.Conv_2 = nnx.Conv(4, 5, (1, 1), use_bias=False, rngs=rngs)


class LinenPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(5, (1, 1), use_bias=False, name="Conv_2")(nn.Conv(4, (3, 3), name="Conv_1")(x))


def containers():
    yield "linen", LinenPair().init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))["params"]
    yield "nnx", nnx.state(Pair(nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize("container", ["linen", "nnx"])
@every_method
def test_containers(name, container, toy):
    params = dict(containers())[container]
    plan = ct.make_plan(params, {"Conv_1/kernel": 0.55, "Conv_2/kernel": 0.5})
    tx = METHODS[name](optax.sgd(0.1, momentum=0.9), plan)

    @toy.quick_jit
    def step(params, state):
        updates, state = tx.update(params, state, params, value=jnp.float32(1.0))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    masks = ct.masks_of(state)
    assert step._cache_size() == 1 and set(masks.layers) == set(DENSITIES)
    if name == "sr_ste":
        params = methods.straight_through(params, plan)
    report = ct.report(params, masks)
    assert report.marked == 0 and report.pruned_layers_compression > 1.2
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(params, masks), params)


def test_kernels_of_other_layouts():
    """OIHW, as PyTorch keeps them: n:m goes along the input channels all the same, the others along nothing."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 3, 3)), jnp.float32)}
    plan = ct.make_plan(params, {"w": 0.5}, axes="OIHW")
    for name, tx in {
        "n_of_m": methods.n_of_m(optax.sgd(0.1), plan, prune_step=0),
        "magnitude": methods.magnitude(optax.sgd(0.1), plan, prune_step=0),
        "rigl": methods.rigl(optax.sgd(0.1), plan, key=KEY, every=1, end_step=2),
    }.items():
        updates, state = tx.update(params, tx.init(params), params)
        new, keep = optax.apply_updates(params, updates), keep_of(state)["w"]
        assert keep.shape == (5, 8, 3, 3) and keep.sum() == 180
        np.testing.assert_array_equal(np.asarray(new["w"]) != 0, keep)
        if name == "n_of_m":
            assert (keep.reshape(5, 2, 4, 3, 3).sum(axis=2) == 2).all()
    hwio = {"w": params["w"].transpose(2, 3, 1, 0)}
    masks = [
        methods.n_of_m_masks(tree, ct.make_plan(tree, {"w": 0.0}, axes=axes)).kernel["w"]
        for tree, axes in ((params, "OIHW"), (hwio, "HWIO"))
    ]
    np.testing.assert_array_equal(masks[0].transpose(2, 3, 1, 0), masks[1])


@pytest.mark.parametrize("module", [info.name for info in pkgutil.iter_modules(methods.__path__)])
def test_docstring_examples_run(module):
    found = importlib.import_module(f"clicktrain_jax.methods.{module}")
    result = doctest.testmod(found)
    assert result.failed == 0
    public = [name for name in methods.__all__ if getattr(getattr(methods, name), "__module__", "") == found.__name__]
    told = {name: getattr(methods, name).__doc__ for name in public}
    assert all(told.values())
    bare = {
        "AdmmState",
        "PruneTrainState",
        "add_channel_lasso",
        "admm_residual",
        "channel_lasso",
        "living_channels",
        "random_scores",
    }
    assert [name for name, text in told.items() if ">>>" not in text and name not in bare] == []
