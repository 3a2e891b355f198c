"""Containers and dtypes that parameters come in: the same masks, the same zeros."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import clicktrain_jax as ct
from clicktrain_jax.trees import named_leaves

SHAPES = [(3, 3, 8, 4), (1, 1, 4, 5), (3, 3, 5, 3)]
SCHEDULE = {"select_step": 0, "prune_step": 1, "coeff": 0.1}


class Pair(NamedTuple):
    first: object
    second: object


def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES]


CONTAINERS = {
    "list": (lambda a, b, c: [a, b, c], ["0", "1", "2"]),
    "tuple in dict in list": (lambda a, b, c: [{"x": (a, b)}, {"y": c}], ["0/x/0", "0/x/1", "1/y"]),
    "frozen": (lambda a, b, c: FrozenDict({"m": {"a": a}, "n": {"b": b, "c": c}}), ["m/a", "n/b", "n/c"]),
    "named tuple": (lambda a, b, c: Pair([a, b], c), ["first/0", "first/1", "second"]),
    "with None": (lambda a, b, c: {"a": a, "gone": None, "b": {"b": b, "c": c}}, ["a", "b/b", "b/c"]),
    "nnx state": (lambda a, b, c: nnx.state(module_of(a, b, c)), ["block/a/kernel", "block/b/kernel", "c/kernel"]),
}


def module_of(a, b, c):
    def layer(kernel):
        module = nnx.Module()
        module.kernel = nnx.Param(kernel)
        return module

    root = nnx.Module()
    root.block = nnx.Module()
    root.block.a, root.block.b, root.c = layer(a), layer(b), layer(c)
    return root


def plan_of(tree, names):
    return ct.make_plan(tree, {name: fraction for name, fraction in zip(names, (0.55, 0.5, 0.35))})


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(toy, container):
    build, names = CONTAINERS[container]
    tree = build(*arrays())
    assert [name for name, leaf in named_leaves(tree) if leaf is not None] == sorted(names)
    plan = plan_of(tree, names)
    tx = ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, **SCHEDULE)
    history = toy.run(tx, tree, steps=4)
    assert history.traces == 1
    masks = ct.masks_of(history.states[-1])
    expected = ct.select_masks(ct.importance.taylor(tree, history.grads[0]), plan, ct.patterns.fixed_set(4))
    assert jax.tree.structure(expected.kernel) == jax.tree.structure(tree)
    for kind in ct.Masks._fields:
        got = dict(named_leaves(getattr(masks, kind)))
        for name, mask in named_leaves(getattr(expected, kind)):
            np.testing.assert_array_equal(got[name], mask, err_msg=name)
    momentum = history.states[-1].inner_state[0].trace
    for trained in (history.params[-1], momentum):
        applied = dict(named_leaves(ct.apply_masks(trained, masks)))
        zeros = 0
        for name, leaf in named_leaves(trained):
            np.testing.assert_array_equal(leaf, applied[name])
            zeros += 0 if leaf is None else int((np.asarray(leaf) == 0).sum())
        report = ct.report(trained, masks)
        assert zeros == report.model_weights - report.model_retained > 0
    check_copies_are_found(tx, history.states[-1], tree)


def check_copies_are_found(tx, state, tree):
    """`optax.tree.map_params` gives copies of the parameters, and nothing else of a state, to its function."""
    found = optax.tree.map_params(tx, lambda _, leaf: leaf.shape, state, tree, transform_non_params=lambda _: "another")
    assert jax.tree.structure(found.masks) == jax.tree.structure(state.masks)
    others = jax.tree.leaves(found._replace(inner_state=None))
    assert set(others) == {"another"} and len(others) == len(jax.tree.leaves(state._replace(inner_state=None)))
    assert jax.tree.leaves(found.inner_state) == jax.tree.leaves(jax.tree.map(jnp.shape, tree))


def test_bare_array(toy):
    (kernel, *_), names = arrays(), [""]
    history = toy.run(ct.clicktrain(optax.adam(0.1), plan_of(kernel, names), **SCHEDULE), kernel, steps=3)
    masks = ct.masks_of(history.states[-1])
    np.testing.assert_array_equal(history.params[-1] != 0, masks.pattern & masks.kernel)


MIXED = {
    "bf16": (jnp.bfloat16, None, optax.adamw(1e-2)),
    "f32 with bf16 gradients": (jnp.float32, jnp.bfloat16, optax.sgd(0.1, momentum=0.9)),
    "f32 with bf16 moments": (jnp.float32, None, optax.adam(1e-2, mu_dtype=jnp.bfloat16)),
    "bf16 with f32 gradients": (jnp.bfloat16, jnp.float32, optax.sgd(0.1, momentum=0.9)),
    "f16 with bf16 gradients": (jnp.float16, jnp.bfloat16, optax.sgd(0.1)),
}


@pytest.mark.parametrize("mix", MIXED)
def test_dtypes(toy, mix):
    param_dtype, grad_dtype, inner = MIXED[mix]
    tree = toy.params(param_dtype)
    tx = ct.clicktrain(inner, toy.plan(tree), **(toy.SCHEDULE | {"select_step": 1, "prune_step": 3}))
    history = toy.run(tx, tree, steps=6, grad_dtype=grad_dtype)
    # With gradients of another dtype optax's own moments may take it after the first update: a second trace.
    assert history.traces == 1 or grad_dtype
    for trained, state in list(zip(history.params, history.states))[4:]:
        assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(param_dtype)}
        for layer, keep in toy.keep_of(state).items():
            assert not np.asarray(trained[layer]["kernel"])[~keep].any()
            for array in toy.mirrors(state.inner_state, layer):
                assert not array[~keep].any()


def test_multi_steps_with_bfloat16_gradients(toy):
    tx = optax.MultiSteps(ct.clicktrain(optax.sgd(0.1), toy.plan(), **toy.SCHEDULE), 2)
    history = toy.run(tx, steps=2 * toy.STOP, grad_dtype=jnp.bfloat16)
    for layer, keep in toy.keep_of(history.states[-1]).items():
        assert not np.asarray(history.params[-1][layer]["kernel"])[~keep].any()


def test_float64(toy):
    with jax.enable_x64(True):
        tree = toy.params(jnp.float64)
        history = toy.run(ct.clicktrain(optax.adam(1e-2), toy.plan(tree), **toy.SCHEDULE), tree)
        assert history.traces == 1
        for layer, keep in toy.keep_of(history.states[-1]).items():
            kernel = history.params[-1][layer]["kernel"]
            assert kernel.dtype == jnp.float64
            np.testing.assert_array_equal(np.asarray(kernel) != 0, keep)


def test_a_layer_is_not_taken_for_another_of_the_same_shape(toy):
    """Names end alike and shapes are equal: the optimizer's memory is masked by the layer's own mask."""
    rng = np.random.default_rng(0)
    kernel = [jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32) for _ in range(3)]
    tree = {"kernel": kernel[0], "a": {"kernel": kernel[1], "b": {"kernel": kernel[2]}}}
    plan = ct.make_plan(tree, {"kernel": None, "a/kernel": 0.5, "a/b/kernel": 0.25})
    history = toy.run(ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, **SCHEDULE), tree, steps=3)
    trace, trained = history.states[-1].inner_state[0].trace, history.params[-1]
    assert np.all(trace["kernel"]) and np.all(trained["kernel"])
    jax.tree.map(lambda m, w: np.testing.assert_array_equal(m != 0, w != 0), trace, trained)


def test_a_module_named_like_a_field_of_the_optimizer(toy):
    """Momentum of the dense "a" lies at "trace/a" in the state: it is not the pruned layer of that name."""
    rng = np.random.default_rng(0)
    kernel = [jnp.asarray(rng.normal(size=(3, 3, 4, 4)), jnp.float32) for _ in range(2)]
    tree = {"trace": {"a": kernel[0]}, "a": kernel[1]}
    plan = ct.make_plan(tree, {"trace/a": 0.5, "a": None})
    history = toy.run(ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, **SCHEDULE), tree, steps=3)
    trace = history.states[-1].inner_state[0].trace
    assert np.all(history.params[-1]["a"]) and np.all(trace["a"])
    np.testing.assert_array_equal(trace["trace"]["a"] != 0, history.params[-1]["trace"]["a"] != 0)
