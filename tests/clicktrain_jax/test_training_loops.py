"""Users' own loops, unchanged but for the optimizer: Flax linen, and NNX with its nnx.Optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import clicktrain_jax as ct
from clicktrain_jax.trees import named_leaves

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 2)), jnp.float32)
LABELS = jnp.arange(8) % 3
SCHEDULE = {"select_step": 1, "prune_step": 3, "coeff": 1e-3}
STEPS = 6


def assert_pruned(params, masks):
    zeros = {name: int((np.asarray(leaf) == 0).sum()) for name, leaf in named_leaves(params)}
    for layer in ct.report(params, masks).layers:
        assert not layer.pruned or zeros[layer.name] == layer.weights - layer.retained > 0, layer.name
    applied = dict(named_leaves(ct.apply_masks(params, masks)))
    for name, leaf in named_leaves(params):
        np.testing.assert_array_equal(leaf, applied[name], err_msg=name)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (4, 8):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def test_linen():
    model = Net()
    params = model.init(jax.random.key(0), IMAGES)["params"]
    plan = ct.make_plan(params, {"Conv_0/kernel": None, "Conv_1/kernel": 0.5}, strict=True)
    tx = ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, **SCHEDULE)

    @jax.jit
    def train_step(params, opt_state):
        def loss(params):
            logits = model.apply({"params": params}, IMAGES)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = tx.init(params)
    values = []
    for _ in range(STEPS):
        params, opt_state, value = train_step(params, opt_state)
        values.append(float(value))
    assert train_step._cache_size() == 1
    assert np.isfinite(values).all()
    assert_pruned(params, ct.masks_of(opt_state))


class Stack(nnx.Module):
    """Twelve layers in a list: as text, "10" sorts before "2"."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(12)])
        self.head = nnx.Conv(4, 3, (1, 1), rngs=rngs)


def stack_loss(model):
    """Every layer's kernel to its own target: no convolution to compile."""
    kernels = [layer.kernel[...] for layer in model.layers]
    targets = jnp.sin(jnp.arange(12 * 144.0)).reshape(12, 3, 3, 4, 4)
    return 0.5 * jnp.sum((jnp.stack(kernels) - targets) ** 2) + jnp.sum(jnp.sin(model.head.kernel[...]))


def test_nnx_list_of_layers():
    model = Stack(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    # Each layer its own fraction, so that a mix-up of layers shows.
    rules = {f"layers/{index}/kernel": index / 16 for index in range(12)} | {"head/kernel": 0.5}
    plan = ct.make_plan(params, rules, strict=True)
    tx = ct.clicktrain(optax.adam(1e-2), plan, **SCHEDULE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = 0

    @nnx.jit
    def train_step(model, optimizer):
        nonlocal traces
        traces += 1
        grads = nnx.grad(stack_loss)(model)
        optimizer.update(model, grads)

    for step in range(STEPS):
        masks = ct.masks_of(optimizer.opt_state)
        kept = [int(leaf[0, 0].sum()) for leaf in jax.tree.leaves(masks.kernel)]
        assert all(count in (12, 16) for count in kept) == (step <= 1)
        train_step(model, optimizer)
    assert traces == 1

    masks = ct.masks_of(optimizer.opt_state)
    kernels = dict(named_leaves(masks.kernel))
    for index in range(12):
        assert int((~np.asarray(kernels[f"layers/{index}/kernel"])[0, 0]).sum()) == index
    params = nnx.state(model, nnx.Param)
    assert_pruned(params, masks)
    adam = optimizer.opt_state.inner_state[0]
    for moment in (adam.mu, adam.nu):
        assert_pruned(moment, masks)


def test_nnx_convolutions():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.conv(nnx.relu(self.stem(x)))).mean(axis=(1, 2)))

    model = Model(nnx.Rngs(0))
    plan = ct.make_plan(nnx.state(model, nnx.Param), {"stem/kernel": None, "conv/kernel": 0.5}, strict=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, **SCHEDULE))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(IMAGES), LABELS).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(train_step(model, optimizer)) for _ in range(STEPS)]
    assert np.isfinite(values).all()
    assert_pruned(nnx.state(model, nnx.Param), ct.masks_of(optimizer.opt_state))
    jax.tree.map(np.testing.assert_array_equal, ct.masks_of(optimizer), ct.masks_of(optimizer.opt_state))
