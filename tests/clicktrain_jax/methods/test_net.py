"""A net and a loop that know nothing of pruning: only the optimizer is another. Then report, accelerate, export."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import clicktrain_jax as ct
from clicktrain_jax import methods

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


MODEL = CNN()
PARAMS = MODEL.init(jax.random.key(0), IMAGES)["params"]
PLAN = ct.make_plan(PARAMS, {"Conv_0/kernel": None, "Conv_1/kernel": 0.5}, strict=True)
NODES = ct.channels.channel_nodes(lambda params, x: MODEL.apply({"params": params}, x), PARAMS, IMAGES.shape[1:])
KEY = jax.random.key(1)
METHODS = {
    "magnitude": lambda inner: methods.magnitude(inner, PLAN, prune_step=1),
    "gradual": lambda inner: methods.gradual_magnitude(inner, PLAN, begin_step=0, end_step=2, every=1),
    "rigl": lambda inner: methods.rigl(inner, PLAN, key=KEY, every=2, end_step=4),
    "set": lambda inner: methods.sparse_evolutionary(inner, PLAN, key=KEY, every=2, end_step=4),
    "n_of_m": lambda inner: methods.n_of_m(inner, PLAN, prune_step=1),
    "sr_ste": lambda inner: methods.sr_ste(inner, PLAN),
    "admm": lambda inner: methods.admm(inner, PLAN, patterns=ct.patterns.fixed_set(4), rho=1e-2, every=1, prune_step=2),
    # A threshold that finds dead channels at once.
    "prunetrain": lambda inner: methods.prunetrain(inner, NODES, prefix="", every=2, threshold=0.35),
    "random": lambda inner: methods.random(inner, PLAN, key=KEY),
}


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

    train_step = jax.jit(train_step, compiler_options={"xla_backend_optimization_level": 0})
    for _ in range(5):
        state, value = train_step(state)
    assert train_step._cache_size() == 1 and np.isfinite(value)
    return state


@pytest.mark.parametrize("name", METHODS)
def test_an_unmodified_net_is_pruned(name, tmp_path):
    def forward(params):
        return methods.straight_through(params, PLAN) if name == "sr_ste" else params

    state = train(METHODS[name](optax.sgd(0.1, momentum=0.9)), forward)
    masks, params = ct.masks_of(state), forward(state.params)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(params, masks), params)
    report = ct.report(params, masks)
    assert report.marked == 0 and report.conv_compression > 1.05
    if name not in ("admm", "prunetrain"):
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
