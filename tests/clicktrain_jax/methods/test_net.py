"""Nets and loops that know nothing of pruning: only the optimizer is another. Then report, accelerate, export.

One net is that of a first example, in Flax; the other is Haiku's own residual net, as it is installed.
"""

import functools
import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import clicktrain_jax as ct
from clicktrain_jax import methods

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 1)), jnp.float32)
LABELS = jnp.arange(8) % 4


class CNN(nn.Module):
    """The net of a first example: two convolutions with pooling, two linear layers, no names given."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(x)


class Told(NamedTuple):
    """What a method is told of a net; the threshold finds dead channels at once."""

    plan: ct.Plan
    nodes: Any
    threshold: float


MODEL = CNN()
PARAMS = MODEL.init(jax.random.key(0), IMAGES)["params"]
PLAN = ct.make_plan(PARAMS, {"Conv_0/kernel": None, "Conv_1/kernel": 0.5}, strict=True)
NODES = ct.channels.channel_nodes(MODEL.apply, {"params": PARAMS}, IMAGES.shape[1:])
CNN_TOLD = Told(PLAN, NODES, 0.35)
KEY = jax.random.key(1)
SET = ct.patterns.fixed_set(4)
METHODS = {
    "clicktrain": lambda inner, net: ct.clicktrain(inner, net.plan, select_step=0, prune_step=1, coeff=1e-3),
    "magnitude": lambda inner, net: methods.magnitude(inner, net.plan, prune_step=1),
    "gradual_magnitude": lambda inner, net: methods.gradual_magnitude(
        inner, net.plan, begin_step=0, end_step=2, every=1
    ),
    "rigl": lambda inner, net: methods.rigl(inner, net.plan, key=KEY, every=2, end_step=4),
    "sparse_evolutionary": lambda inner, net: methods.sparse_evolutionary(
        inner, net.plan, key=KEY, every=2, end_step=4
    ),
    "n_of_m": lambda inner, net: methods.n_of_m(inner, net.plan, prune_step=1),
    "sr_ste": lambda inner, net: methods.sr_ste(inner, net.plan),
    "admm": lambda inner, net: methods.admm(inner, net.plan, patterns=SET, rho=1e-2, every=1, prune_step=2),
    "prunetrain": lambda inner, net: methods.prunetrain(inner, net.nodes, every=2, threshold=net.threshold),
    "random": lambda inner, net: methods.random(inner, net.plan, key=KEY),
}
every_method = pytest.mark.parametrize("name", METHODS)


def test_no_method_is_left_out():
    first = {name: next(iter(inspect.signature(getattr(methods, name)).parameters)) for name in methods.__all__}
    assert set(METHODS) == {"clicktrain"} | {name for name, parameter in first.items() if parameter == "inner"}


def train(tx, forward=lambda params: params):
    # flax begins to count with a Python int, which is another program than an array.
    state = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx).replace(step=jnp.int32(0))

    def train_step(state):
        def loss(params):
            logits = state.apply_fn({"params": forward(params)}, IMAGES)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    train_step = quick_jit(train_step)
    for _ in range(5):
        state, value = train_step(state)
    assert train_step._cache_size() == 1 and np.isfinite(value)
    return state


@every_method
def test_an_unmodified_net_is_pruned(name, tmp_path):
    forward = straight_through(name, PLAN)
    state = train(METHODS[name](optax.sgd(0.1, momentum=0.9), CNN_TOLD), forward)
    masks, params = ct.masks_of(state), forward(state.params)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(params, masks), params)
    report = ct.report(params, masks)
    assert report.marked == 0 and report.conv_compression > 1.05
    if name not in ("clicktrain", "admm", "prunetrain"):
        assert {layer.name: layer.retained for layer in report.convs}["Conv_1/kernel"] == 576

    def apply(variables, images):
        return MODEL.apply(variables, images)

    expected = apply({"params": params}, IMAGES)
    # The weights that live on under a straight-through estimator are masked by whoever is given the masks.
    fast = ct.accelerate(apply, masks)({"params": state.params}, IMAGES)
    np.testing.assert_allclose(fast, expected, rtol=1e-4, atol=1e-5)
    variables = {"params": state.params}
    ct.export(tmp_path / "net", apply, variables, masks, image_shape=IMAGES.shape[1:], stablehlo=False)
    np.testing.assert_allclose(ct.load(tmp_path / "net", apply)(IMAGES), expected, rtol=1e-4, atol=1e-5)


class Haiku(NamedTuple):
    """Its residual net, small, and one gradient program for all optimizers.

    ``gradient`` takes weights and averages, and gives the gradient with the loss and the next averages.
    """

    params: Any
    averages: Any
    told: Told
    gradient: Any


def straight_through(name, plan):
    return (lambda params: methods.straight_through(params, plan)) if name == "sr_ste" else lambda params: params


@pytest.fixture(scope="module")
def haiku():
    hk = pytest.importorskip("haiku", reason="pip install dm-haiku")
    options = {"blocks_per_group": (1, 1, 1, 1), "bottleneck": False, "channels_per_group": (8, 8, 16, 16)}
    stem = {"output_channels": 8, "kernel_shape": 7, "stride": 2}

    def forward(images, training):
        net = hk.nets.ResNet(num_classes=4, initial_conv_config=stem, **options)
        return net(images, is_training=training)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    images = jnp.tile(IMAGES, (1, 2, 2, 3))
    params, averages = jax.jit(net.init, static_argnums=2)(jax.random.key(0), images, True)
    rules = {".*/initial_conv/w": None, ".*/shortcut_conv/w": None, ".*/conv_[01]/w": 0.5}
    plan = ct.make_plan(params, rules, strict=True)
    nodes = ct.channels.channel_nodes(
        lambda variables, x: net.apply(variables["params"], variables["averages"], x, False)[0],
        {"params": params, "averages": averages},
        images.shape[1:],
    )

    @quick_jit
    def gradient(params, averages):
        def loss(params):
            logits, after = net.apply(params, averages, images, True)
            value = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
            return value, (value, after)

        return jax.grad(loss, has_aux=True)(params)

    return Haiku(params, averages, Told(plan, nodes, 0.35), gradient)


@every_method
def test_a_public_librarys_residual_net_is_pruned(name, haiku):
    params, averages, told, gradient = haiku
    tx, forward = METHODS[name](optax.sgd(0.1, momentum=0.9), told), straight_through(name, told.plan)

    @quick_jit
    def change(slope, value, params, state):
        # Through the estimator, if there is one: the gradient is that of the masked weights.
        _, back = jax.vjp(forward, params)
        updates, state = tx.update(*back(slope), state, params, value=value)
        params = optax.apply_updates(params, updates)
        return params, forward(params), state

    state, kept = tx.init(params), forward(params)
    for _ in range(5):
        slope, (value, averages) = gradient(kept, averages)
        params, kept, state = change(slope, value, params, state)
    assert change._cache_size() == 1
    masks = ct.masks_of(state)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(kept, masks), kept)
    report = ct.report(kept, masks)
    assert report.marked == 0 and report.conv_compression > 1.05
    pruned = {layer.name for layer in report.layers if layer.pruned}
    assert pruned == {layer.name for layer in told.plan.layers} or name == "prunetrain" and pruned
