"""Run by test_devices.py in a process of its own with two CPU devices: all methods alone, data-parallel, sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clicktrain_jax as ct
from clicktrain_jax import methods

STEPS = 5
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(STEPS, 8, 72)).astype(np.float32)
PARAMS = {
    "conv": {"kernel": RNG.normal(size=(3, 3, 8, 6)).astype(np.float32)},
    "dense": {"kernel": RNG.normal(size=(6, 1)).astype(np.float32)},
}
PLAN = ct.make_plan(PARAMS, {"conv/kernel": 0.5})
NODES = (ct.channels.ChannelNode(6, (("conv/kernel", 3),), (), (("dense/kernel", 0, 1),)),)
KEY, INNER = jax.random.key(0), optax.sgd(0.01, momentum=0.9)
METHODS = {
    "magnitude": methods.magnitude(INNER, PLAN, prune_step=1),
    "gradual": methods.gradual_magnitude(INNER, PLAN, begin_step=0, end_step=3, every=1),
    "rigl": methods.rigl(INNER, PLAN, key=KEY, every=2, end_step=4),
    "set": methods.sparse_evolutionary(INNER, PLAN, key=KEY, every=2, end_step=4),
    "n_of_m": methods.n_of_m(INNER, PLAN, prune_step=1),
    "sr_ste": methods.sr_ste(INNER, PLAN),
    "admm": methods.admm(INNER, PLAN, patterns=ct.patterns.fixed_set(4), rho=0.1, every=2, prune_step=3),
    "prunetrain": methods.prunetrain(INNER, NODES, prefix="", every=2, threshold=2.5),
    "random": methods.random(INNER, PLAN, key=KEY),
}


def loss(params, images):
    """A 3x3 convolution at a single position."""
    hidden = jnp.tanh(images @ params["conv"]["kernel"].reshape(72, 6))
    return jnp.mean(jnp.square(hidden @ params["dense"]["kernel"] - 1))


GRADIENT = jax.grad(loss)


def train(place_params, place_images, gradient=GRADIENT, names=tuple(METHODS)):
    """All methods in one program: it is compiled once."""
    params = {name: place_params(PARAMS) for name in names}
    states = {name: METHODS[name].init(params[name]) for name in names}

    traces = 0

    @jax.jit
    def train_step(params, states, images):
        nonlocal traces
        traces += 1
        new = {}
        for name in names:
            grads = gradient(params[name], images)
            updates, state = METHODS[name].update(grads, states[name], params[name], value=jnp.float32(1.0))
            new[name] = optax.apply_updates(params[name], updates), state
        return {name: pair[0] for name, pair in new.items()}, {name: pair[1] for name, pair in new.items()}

    for images in IMAGES:
        params, states = train_step(params, states, place_images(images))
    assert traces == 1
    keep = {name: np.asarray(ct.masks_of(states[name]).layers["conv/kernel"].combined()) for name in names}
    for name in names:
        assert not keep[name].all(), name
        if name != "sr_ste":
            for shard in params[name]["conv"]["kernel"].addressable_shards:
                assert not np.asarray(shard.data)[~keep[name][shard.index]].any(), name
    return params, keep


def compare(got, expected, names=tuple(METHODS)):
    for name in names:
        np.testing.assert_array_equal(got[1][name], expected[1][name], err_msg=name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got[0][name], expected[0][name]
        )


def main():
    assert jax.device_count() == 2
    alone = train(lambda tree: jax.tree.map(jnp.asarray, tree), jnp.asarray)
    auto = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(auto, P()), NamedSharding(auto, P("batch"))
    compare(train(lambda tree: jax.device_put(tree, whole), lambda images: jax.device_put(images, split)), alone)

    # A mesh of explicit axes, the kernels sharded along their filters. Gradients of the weights themselves.
    def pull(params, images):
        return jax.tree.map(jnp.sin, params)

    explicit = jax.make_mesh((2,), ("filters",), axis_types=(AxisType.Explicit,))

    def place(tree):
        specs = {"conv": {"kernel": P(None, None, None, "filters")}, "dense": {"kernel": P()}}
        return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(explicit, spec)), tree, specs)

    names = tuple(name for name in METHODS if name not in ("admm", "prunetrain"))
    expected = train(lambda tree: jax.tree.map(jnp.asarray, tree), jnp.asarray, pull, names)
    compare(train(place, lambda images: images, pull, names), expected, names)
    print("all methods agree")


if __name__ == "__main__":
    main()
