"""A net as a plan for PyTorch: plain data, no step forgotten; its numbers where PyTorch is installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax

from clicktrain_jax import models
from clicktrain_jax.deploy.fold import fold
from experiments.bench.torch_plan import make_plan

NUMBERS = ("NHWC", "HWIO", "NHWC")
KERNEL = np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32)
with_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def folded_net(name):
    model = models.build(name, num_classes=10, width=0.125)
    shape = models.default_image_shape(name)
    return fold(lambda variables, images: model.apply(variables, images, train=False), drawn(model, shape), shape)


def convolved(images, kernel, **settings):
    settings = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))} | settings
    return lax.conv_general_dilated(images, kernel, dimension_numbers=NUMBERS, **settings)


def every_step(variables, images):
    """All that a plan can say, once."""
    x = convolved(images, variables["kernel"], window_strides=(2, 1), padding=((0, 2), (1, 1)))
    x = convolved(x, variables["kernel"].reshape(3, 3, 1, 12)[..., :4], feature_group_count=4, rhs_dilation=(2, 1))
    window, strides, padding = (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0))
    x = lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    x = x + lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([jax.nn.relu(x), jnp.minimum(jnp.maximum(x, 0.1), 2.0), 1.0 - jnp.tanh(x) ** 2], axis=-1)
    x = lax.slice(x, (0, 0, 1, 0), x.shape, (1, 2, 1, 1))
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (2, 3)), constant_values=0.5)
    y = x.sum(axis=(1, 2)) + x.max(axis=(1, 2)) - x.min(axis=(1, 2))
    y = y / jnp.exp(jax.nn.sigmoid(y)).sum(axis=1, keepdims=True)
    return jnp.swapaxes(y[:, None] * jnp.ones((2, 1), jnp.float32), 1, 2).reshape(y.shape[0], -1)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "small"])
def test_the_plan_of_a_net(name):
    folded = folded_net(name)
    plan = make_plan(folded)
    assert json.loads(json.dumps(plan.steps)) == plan.steps
    kinds = [step["op"] for step in plan.steps]
    convolutions = [step for step in plan.steps if step["op"] == "conv"]
    assert len(convolutions) == len(folded.steps(1).convolutions)
    # Every bias, and a classifier's, is within its step; ReLU is a step of its own kind.
    assert all(len(step["inputs"]) == 3 for step in plan.steps if step["op"] in ("conv", "matmul"))
    assert "maximum" not in kinds and kinds.count("relu") >= len(convolutions) - kinds.count("add")
    assert kinds.count("add") == sum(isinstance(place, int) and index > 0 for step in plan.steps
                                     if step["op"] == "add" for index, place in enumerate(step["inputs"]))
    for index, step in enumerate(plan.steps, start=1):
        for place in step["inputs"]:
            assert isinstance(place, dict) or place in plan.arrays or 0 <= place < index
    assert {place for step in plan.steps for place in step["inputs"] if isinstance(place, str)} == plan.arrays.keys()
    weights = sum(array.size for array in plan.arrays.values())
    assert weights == sum(array.size for array in folded.arrays.values())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda v, x: convolved(x, v["kernel"], lhs_dilation=(2, 2)).sum(axis=(1, 2)), "transposed convolution"),
        (lambda v, x: jnp.cumsum(convolved(x, v["kernel"]).sum(axis=(1, 2)), axis=1), "'cumsum' is not written"),
        (lambda v, x: v["kernel"][0, 0] * 2, "not computed from its images"),
        (lambda v, x: jnp.einsum("nhwc,nhwd->ncd", x, x).sum(axis=2), "product other than"),
    ],
)
def test_what_is_not_written(function, message):
    with pytest.raises(ValueError, match=message):
        make_plan(fold(function, {"kernel": KERNEL}, (6, 6, 3)))


@with_torch
@pytest.mark.filterwarnings("ignore")  # TorchScript is on its way out, and says so
@pytest.mark.parametrize("name", ["every step", "vgg11", "resnet18", "small"])
def test_pytorch_computes_the_same(name):
    torch = pytest.importorskip("torch", reason="torch does not work here", exc_type=ImportError)
    from experiments.bench import torch_net

    folded = fold(every_step, {"kernel": KERNEL}, (12, 9, 3)) if name == "every step" else folded_net(name)
    plan = make_plan(folded)
    for batch in (1, 3):
        images = np.random.default_rng(batch).random((batch, *folded.image_shape), np.float32)
        expected = folded.function(folded.arrays, images)
        for form in torch_net.FORMS:
            call = torch_net.make(form, plan.steps, plan.arrays, torch.from_numpy(images))
            for _ in range(3):  # a frozen net is made anew at its second call
                np.testing.assert_allclose(call(), expected, atol=1e-4, rtol=1e-4, err_msg=form)
