"""`accelerate` on users' own NNX modules: split, run by pattern, written back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_like, masked
from flax import nnx

import clicktrain_jax as ct
from clicktrain_jax.trees import map_named, named_leaves
from tests.clicktrain_jax.deploy.own_nets import X, close, jit, masks_for


class Block(nnx.Module):
    def __init__(self, features, strides, rngs):
        self.conv = nnx.Conv(features, features, (3, 3), strides=strides, rngs=rngs)
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.shortcut = nnx.Conv(features, features, (1, 1), strides=strides, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x))) + self.shortcut(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(8, 1, rngs), Block(8, 2, rngs)])
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.grouped(x)).mean((1, 2)))


@functools.cache
def nnx_state():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    state = drawn_like(state)
    return graphdef, state, masks_for(nnx.filter_state(state, nnx.Param), ("conv", "shortcut", "grouped"))


def nnx_net(train):
    graphdef, state, masks = nnx_state()
    model = nnx.merge(graphdef, jax.tree.map(jnp.array, state))
    model.train() if train else model.eval()
    return model, masks


def masked_model(model, masks):
    other = nnx.clone(model)
    nnx.update(other, masked(nnx.state(other, nnx.Param), masks))
    return other


run_nnx = nnx.jit(lambda model, x: model(x))


@pytest.mark.parametrize("train", [False, True])
def test_nnx_modules_are_split_and_written_back(train):
    model, masks = nnx_net(train)
    other = masked_model(model, masks)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    mean = np.asarray(model.blocks[0].norm.mean[...])
    fast = ct.accelerate(lambda model, x: model(x), masks, backend="xla")
    runs = [conv.runs for conv in fast.report(model, X).convolutions]
    assert runs == ["dense", *4 * ["sparse"], "dense"]
    for _ in range(2):  # statistics and the count of dropout move on from call to call
        close(nnx.jit(lambda model, x: fast(model, x))(model, X), run_nnx(other, X))
    rest = nnx.Not(nnx.Param)
    states = [nnx.filter_state(nnx.state(net), rest) for net in (model, other)]
    for one, wanted in zip(*(jax.tree.leaves(state) for state in states)):
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, wanted, rtol=1e-4, atol=1e-5)
    assert train == bool(np.any(model.blocks[0].norm.mean[...] != mean))
    for one, wanted in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), before):
        np.testing.assert_array_equal(one, wanted)  # parameters stay unmasked


def test_nnx_gradients_and_states():
    model, masks = nnx_net(False)

    def loss(forward):
        return lambda model, x: jnp.sum(jnp.sin(forward(model, x)))

    fast = ct.accelerate(lambda model, x: model(x), masks, backend="xla")
    wanted = run_nnx(masked_model(model, masks), X)
    got = nnx.jit(nnx.grad(loss(fast)))(model, X)
    slopes = nnx.jit(nnx.grad(loss(lambda model, x: model(x))))(masked_model(model, masks), X)
    keep = dict(named_leaves(ct.masks.combine(masks)))
    slopes = map_named(lambda name, leaf: leaf if keep[name] is None else np.where(keep[name], leaf, 0), slopes)
    close(jax.tree.leaves(got), jax.tree.leaves(slopes))

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    merged = ct.accelerate(lambda params, rest, x: nnx.merge(graphdef, params, rest)(x), masks)
    close(jit(merged)(params, rest, X), wanted)
    whole = ct.accelerate(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), masks)
    close(jax.jit(whole, static_argnums=0)(*nnx.split(model), X), wanted)


def test_a_call_outside_of_jit_goes_op_by_op():
    model, masks = nnx_net(False)
    one = masks.view(lambda layer: layer.combined())
    one = map_named(lambda name, keep: keep if name == "blocks/0/conv/kernel" else None, one)
    fast = ct.accelerate(lambda model, x: model(x), one, backend="xla")
    close(fast(model, X), run_nnx(masked_model(model, one), X))
