"""Runs of a loaded net's layers in one call of the native kernels: what is taken, what is left, and the same logits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_masks, masked

import clicktrain_jax as ct
from clicktrain_jax.deploy import chains
from clicktrain_jax.deploy.load import inference_net
from pallas_kernels import native
from pallas_kernels.chain import Conv, Pool

pytestmark = pytest.mark.skipif(not native.is_fast(), reason="there are no native kernels here")

SHAPE = (11, 9, 3)


class Residual(nn.Module):
    """A shortcut, a strided convolution, pools of both kinds, and linear layers behind a map that is not one pixel."""

    between: bool = False
    head: str = "flatten"

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3))
        x = nn.relu(conv(16)(x))
        y = conv(16)(nn.relu(conv(16)(x)))
        x = nn.relu(x + y)
        if self.between:
            x = jnp.tanh(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(conv(24, strides=(2, 2))(x))
        x = nn.relu(conv(24)(x))
        if self.head == "flatten":
            x = nn.avg_pool(x, (2, 2), (1, 1)).reshape(len(x), -1)
        else:
            x = x.mean((1, 2))
        return nn.Dense(7)(nn.relu(nn.Dense(20)(x)))


@functools.cache
def made(between, head, filters):
    model = Residual(between, head)
    x = np.random.default_rng(1).normal(size=(5, *SHAPE)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    plan = ct.make_plan(variables["params"], {"Conv_[1234]/kernel": 0.5}, tile=(filters, 1))
    masks = drawn_masks(variables["params"], plan)
    variables = {"params": masked(variables["params"], masks)}
    net = inference_net(model.apply, variables, masks, image_shape=SHAPE, normalise=None)
    return net, x, np.asarray(jax.jit(model.apply)(variables, x))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    native.why_not()


def runs_of(net, batch, choice):
    steps, _ = chains.chained(net.folded.steps(batch), net._sites(batch, choice))
    return [
        step.equation.steps if isinstance(step.equation, chains.Chained) else step.equation.primitive.name
        for step in steps.steps
    ]


@pytest.mark.parametrize(("head", "filters"), [("flatten", 8), ("mean", 1)])
def test_a_net_in_one_call(head, filters):
    net, x, wanted = made(False, head, filters)
    (steps,) = runs_of(net, 5, {})
    kinds = [type(step) for step in steps]
    assert kinds == [Conv, Conv, Conv, Pool, Conv, Conv, Pool, Conv, Conv]
    assert [step.relu for step in steps] == [True, True, True, False, True, True, False, True, False]
    # The sum of the shortcut is the convolution's before it.
    assert [getattr(step, "second", None) for step in steps] == [None, None, 1, *[None] * 6]
    for batch in (1, 2, 5):
        np.testing.assert_allclose(net(x[:batch]), wanted[:batch], atol=1e-5)
        np.testing.assert_allclose(net.dense(batch)(x[:batch]), wanted[:batch], atol=1e-5)


def test_what_is_no_step_of_a_chain_stands_between_two():
    net, x, wanted = made(True, "mean", 8)
    first, between, second = runs_of(net, 5, {})
    assert (len(first), between, len(second)) == (3, "tanh", 6)
    np.testing.assert_allclose(net(x), wanted, atol=1e-5)


def test_convolutions_that_run_by_xla_are_left():
    net, x, wanted = made(False, "mean", 8)
    names = [row.name for row in net.report(5).convolutions]
    choice = {names[1]: "dense"}
    found = runs_of(net, 5, choice)
    # Before it one convolution alone, behind it what reads two values from before.
    assert [len(each) if isinstance(each, tuple) else each for each in found] == [
        "conv_general_dilated", "conv_general_dilated", 7
    ]  # fmt: skip
    np.testing.assert_allclose(net.with_choice(5, choice)(x), wanted, atol=1e-5)
    xla = dict.fromkeys(names, "dense")
    assert not any(isinstance(each, tuple) for each in runs_of(net, 5, xla))
