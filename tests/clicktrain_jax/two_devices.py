"""Run by test_data_parallel.py in a process of its own with two CPU devices: one step, data-parallel and alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import clicktrain_jax as ct

STEPS = 5
IMAGES = np.random.default_rng(0).normal(size=(STEPS, 8, 72)).astype(np.float32)


def train(shard):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(1)
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 8, 6)), jnp.float32)},
        "dense": {"kernel": jnp.asarray(rng.normal(size=(6, 1)), jnp.float32)},
    }
    plan = ct.make_plan(params, {"conv/kernel": 0.5})
    tx = ct.clicktrain(optax.sgd(0.01, momentum=0.9), plan, select_step=1, prune_step=3, coeff=1e-3)

    def loss(params, images):
        # A 3x3 convolution at a single position.
        hidden = jnp.tanh(images @ params["conv"]["kernel"].reshape(72, 6))
        return jnp.mean(jnp.square(hidden @ params["dense"]["kernel"] - 1))

    @jax.jit
    def train_step(params, state, images):
        updates, state = tx.update(jax.grad(loss)(params, images), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    if shard:
        params, state = jax.device_put((params, state), whole)
    for images in IMAGES:
        images = jax.device_put(images, split) if shard else jnp.asarray(images)
        assert len(images.sharding.device_set) == (2 if shard else 1)
        params, state = train_step(params, state, images)
    assert train_step._cache_size() == 1
    assert not shard or len(params["conv"]["kernel"].sharding.device_set) == 2
    return params, state


def main():
    assert jax.device_count() == 2
    (alone, state_alone), (parallel, state_parallel) = train(False), train(True)
    masks, others = ct.masks_of(state_parallel), ct.masks_of(state_alone)
    jax.tree.map(np.testing.assert_array_equal, masks, others)
    keep = np.asarray(masks.pattern["conv"]["kernel"] & masks.kernel["conv"]["kernel"])
    assert keep.sum() == 24 * 4
    for array in (parallel["conv"]["kernel"], state_parallel.inner_state[0].trace["conv"]["kernel"]):
        for device_array in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(device_array.data) != 0, keep)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), alone, parallel)
    print("two devices agree")


if __name__ == "__main__":
    main()
