"""Run by test_data_parallel.py in a process of its own with four CPU devices: the same masks on every kind of mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clicktrain_jax as ct

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": RNG.normal(size=(4, 4, 8, 16)).astype(np.float32)},
    "b": {"kernel": RNG.normal(size=(1, 4, 16, 8)).astype(np.float32)},
    "head": {"kernel": RNG.normal(size=(8, 4)).astype(np.float32)},
}
PATTERNS = ct.patterns.Generated(4)
STEPS = 5


def step_of(**options):
    # The first layer loses whole kernels, the second has patterns.
    plan = ct.make_plan(PARAMS, {"[ab]/kernel": 0.5}, entries={"a/kernel": None, "b/kernel": 2}, **options)
    tx = ct.clicktrain(
        optax.sgd(0.01, momentum=0.9),
        plan,
        select_step=1,
        prune_step=3,
        coeff=1e-2,
        patterns=PATTERNS,
        importance_steps=2,
    )

    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    return plan, tx, step


def train(place, wrap=lambda step: step, **options):
    _, tx, step = step_of(**options)
    params = place(jax.tree.map(jnp.asarray, PARAMS))
    state, step = tx.init(params), jax.jit(wrap(step))
    for _ in range(STEPS):
        params, state = step(params, state)
    masks = ct.masks_of(state)
    report = ct.report(params, masks)
    assert report.marked == 0 and report.conv_compression > 2.0
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(params, masks), params)
    return params, (masks.pattern, masks.kernel), ct.group_lasso(params, masks)


def compare(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[0], expected[0])
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)


def on(mesh, spec):
    def place(leaf):
        fits = leaf.ndim == 4 and all(axis is None or size % mesh.size == 0 for axis, size in zip(spec, leaf.shape))
        return jax.device_put(leaf, NamedSharding(mesh, spec if fits else P()))

    return lambda tree: jax.tree.map(place, tree)


def main():
    assert jax.device_count() == 4
    expected = train(lambda tree: tree)
    explicit = {n: jax.make_mesh((n,), ("d",), devices=jax.devices()[:n]) for n in (2, 4)}
    auto = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    for mesh, spec in (
        (explicit[4], P()),
        (explicit[4], P("d")),
        (explicit[2], P(None, "d")),
        (explicit[4], P(None, None, "d")),
        (explicit[4], P(None, None, None, "d")),
        (auto, P(None, None, "d")),
        (auto, P(None, None, None, "d")),
    ):
        got = train(on(mesh, spec))
        assert (
            got[0]["a"]["kernel"].sharding.spec == NamedSharding(mesh, P(*spec, *[None] * (4 - len(spec)))).spec
            or mesh is auto
        ), (spec, got[0]["a"]["kernel"].sharding)
        compare(got, expected)
    square = jax.make_mesh((2, 2), ("x", "y"))
    both = NamedSharding(square, P(None, None, "x", "y"))
    compare(
        train(
            lambda tree: jax.tree.map(
                lambda leaf: jax.device_put(leaf, both if leaf.ndim == 4 else NamedSharding(square, P())), tree
            )
        ),
        expected,
    )

    def mapped(step):
        return jax.shard_map(step, mesh=explicit[4], in_specs=(P(), P()), out_specs=(P(), P()))

    compare(train(on(explicit[4], P()), mapped), expected)
    # The parts by themselves, outside jit, with the criterion's own scores and a target.
    plan = ct.make_plan(PARAMS, {"[ab]/kernel": "auto"}, target=4.0, entries={"b/kernel": 2}, tile=(4, 1))
    for criterion in (ct.importance.taylor, ct.importance.group_taylor):
        chosen = []
        for place in (lambda tree: tree, on(explicit[4], P(None, None, None, "d"))):
            params = place(jax.tree.map(jnp.asarray, PARAMS))
            scores = criterion(params, jax.tree.map(jnp.sin, params))
            masks = ct.select_masks(scores, plan, PATTERNS)
            chosen.append((masks.pattern, masks.kernel))
        jax.tree.map(np.testing.assert_array_equal, *chosen)
    # Masks of strangers, which lie on no mesh.
    keep = jax.tree.map(lambda leaf: RNG.random(leaf.shape) < 0.3 if leaf.ndim == 4 else None, PARAMS)
    lasso = [
        ct.add_group_lasso(params, params, keep, 1.0)
        for params in (PARAMS, on(explicit[4], P("d"))(PARAMS), on(explicit[4], P(None, None, "d"))(PARAMS))
    ]
    for got in lasso[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, lasso[0])
    print("all meshes agree")


if __name__ == "__main__":
    main()
