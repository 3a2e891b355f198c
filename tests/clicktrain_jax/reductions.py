"""Run by test_data_parallel.py in a process of its own with four CPU devices: what travels between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import clicktrain_jax as ct
from experiments.bench.collectives import reduced

RNG = np.random.default_rng(0)
PARAMS = {
    "Conv_0": {"kernel": RNG.normal(size=(3, 3, 3, 16)).astype(np.float32), "bias": np.zeros(16, np.float32)},
    "Conv_1": {"kernel": RNG.normal(size=(3, 3, 16, 32)).astype(np.float32)},
    "Conv_2": {"kernel": RNG.normal(size=(1, 1, 32, 64)).astype(np.float32)},
    "Dense_0": {"kernel": RNG.normal(size=(64, 10)).astype(np.float32)},
    "unused": None,
}
IMAGES = RNG.normal(size=(16, 8, 8, 3)).astype(np.float32)


def loss(params, images):
    x = images
    for name in ("Conv_0", "Conv_1", "Conv_2"):
        x = jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x)
    return jnp.mean(jnp.square(x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Conv_0"]["bias"].sum() - 1))


def main():
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("data",))
    plan = ct.make_plan(PARAMS, {"Conv_0/kernel": None, "Conv_1/kernel": 0.7, "Conv_2/kernel": 0.85})
    masks = ct.select_masks(ct.importance.magnitude(PARAMS), plan, ct.patterns.fixed_set(4))
    params, retained = ct.apply_masks(PARAMS, masks), ct.reduction.retained(PARAMS, masks)
    images = jax.device_put(IMAGES, jax.sharding.NamedSharding(mesh, P("data")))

    def program(reduce):
        mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), check_vma=False)
        return jax.jit(mapped(reduce, out_specs=P())).lower(params, retained, images).compile()

    def whole(params, retained, images):
        return jax.lax.pmean(jax.grad(loss)(params, images), "data")

    def compact(params, retained, images, **options):
        return ct.reduction.pmean(jax.grad(loss)(params, images), retained, "data", **options)

    expected = ct.apply_masks(program(whole)(params, retained, images), masks)
    compiled = program(compact)
    got = compiled(params, retained, images)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for leaf in jax.tree.leaves(got):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 4 and all((copy == copies[0]).all() for copy in copies)
    travels = ct.reduction.num_bytes(PARAMS, retained)
    assert reduced(compiled.as_text()) == (travels.compact, 1)
    kept = sum(int(np.asarray(mask.combined()).sum()) for mask in masks.layers.values())
    assert travels.pruned_compact == 4 * kept and travels.pruned_dense == 4 * (9 * 16 * 32 + 32 * 64)
    assert travels.dense == 4 * sum(np.size(leaf) for leaf in jax.tree.leaves(PARAMS))
    assert travels.dense - travels.pruned_dense == travels.compact - travels.pruned_compact

    half = program(functools.partial(compact, dtype=jnp.bfloat16))(params, retained, images)
    for name, leaf in {"a": half["Conv_1"]["kernel"], "b": half["Dense_0"]["kernel"]}.items():
        other = expected["Conv_1" if name == "a" else "Dense_0"]["kernel"]
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, other, rtol=0.03, atol=0.01 * float(jnp.abs(other).max()))
    assert ct.reduction.num_bytes(PARAMS, retained, dtype=jnp.bfloat16).compact * 2 == travels.compact

    # A whole update, the wrapper around the optimizer: as with the whole gradient.
    tx = ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, select_step=0, prune_step=1, coeff=1e-3)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(expected, state, params)
    masks = ct.masks_of(state)
    params, retained = ct.apply_masks(PARAMS, masks), ct.reduction.retained(PARAMS, masks)
    one, _ = tx.update(program(whole)(params, retained, images), state, params)
    other, _ = tx.update(program(compact)(params, retained, images), state, params)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    print("what is retained travels")


if __name__ == "__main__":
    main()
