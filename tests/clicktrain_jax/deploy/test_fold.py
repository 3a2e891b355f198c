"""Folding: the same function with fewer steps, whatever library and order it is written in."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, drawn_like
from flax import nnx
from jax import lax

from clicktrain_jax import models
from clicktrain_jax.deploy.fold import fold

NUMBERS = ("NHWC", "HWIO", "NHWC")


def check(apply_fn, variables, shape, batch=3, **tolerance):
    folded = fold(apply_fn, variables, shape)
    images = np.random.default_rng(1).normal(size=(batch, *shape)).astype(np.float32)
    expected = jax.jit(apply_fn)(variables, images)
    found = jax.jit(folded.function)(folded.arrays, images)
    np.testing.assert_allclose(found, expected, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))
    return folded, folded.steps(batch)


def primitives(steps):
    return [step.equation.primitive.name for step in steps.steps]


@pytest.mark.parametrize(
    "name",
    [
        "small",
        "vgg11",
        "resnet32",
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("resnet50_cifar", marks=pytest.mark.slow),
    ],
)
def test_every_net_has_its_batch_norms_folded(name):
    model = models.build(name, num_classes=10, width=0.125)
    shape = models.default_image_shape(name)
    variables = drawn(model, shape)
    apply_fn = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    folded, steps = check(apply_fn, variables, shape, atol=1e-4, rtol=1e-4)
    assert {"rsqrt", "sub", "mul"}.isdisjoint(primitives(steps))
    assert all(step.bias is not None for step in steps.convolutions)
    assert {step.leaf for step in steps.convolutions} == {
        f"params/{layer.path}" for layer in models.conv_layers(model, shape)
    }
    assert not any("BatchNorm" in name for name in folded.arrays)


def test_nnx_with_convolution_bias():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    model.eval()
    graph, state = nnx.split(model)
    folded, steps = check(lambda state, x: nnx.merge(graph, state)(x), drawn_like(state), (8, 8, 3))
    (convolution,) = steps.convolutions
    assert convolution.leaf == "conv/kernel"
    assert folded.arrays[convolution.bias].shape == (8,)
    assert {"rsqrt", "sub", "mul"}.isdisjoint(primitives(steps))


def convolve(x, w, numbers=NUMBERS):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


VECTOR = np.linspace(0.5, 2.0, 4, dtype=np.float32)
CHAINS = {
    "add": lambda y, v: y + v,
    "added to": lambda y, v: v + y,
    "sub": lambda y, v: y - v,
    "subtracted from": lambda y, v: v - y,
    "mul": lambda y, v: y * v,
    "div": lambda y, v: y / v,
    "neg": lambda y, v: -(y + v),
    "scalar": lambda y, v: 2.0 * y - 1.0,
    "long": lambda y, v: (3.0 - (y * v - v)) / (v + 1.0) + v,
    "broadcast": lambda y, v: y * jnp.broadcast_to(v, (1, 1, 1, 4)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_affine_steps_go_into_the_kernel(name):
    rng = np.random.default_rng(0)
    variables = {"w": rng.normal(size=(3, 3, 2, 4)).astype(np.float32), "v": VECTOR}
    _, steps = check(lambda p, x: CHAINS[name](convolve(x, p["w"]), p["v"]), variables, (5, 6, 2))
    assert len(steps.steps) == 1


STAYS = {
    "divides": lambda y, v: v / (y * y + 1.0),
    "per pixel": lambda y, v: y * jnp.arange(1.0, 7.0)[:, None],
    "used twice": lambda y, v: (y + v) * y,
    "image dependent": lambda y, v: y * y.mean((1, 2), keepdims=True),
    "not affine": lambda y, v: jnp.tanh(y) * v,
    "batch wise": lambda y, v: y + jnp.broadcast_to(v, (y.shape[0], 1, 1, 4)),
    "counts images": lambda y, v: y * jnp.arange(1.0, 1.0 + y.shape[0])[:, None, None, None],
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_affine_stays(name):
    rng = np.random.default_rng(0)
    variables = {"w": rng.normal(size=(3, 3, 2, 4)).astype(np.float32), "v": VECTOR}
    check(lambda p, x: STAYS[name](convolve(x, p["w"]), p["v"]), variables, (5, 6, 2))


def test_other_orders_of_axes():
    rng = np.random.default_rng(0)
    numbers = ("NCHW", "OIHW", "NCHW")
    variables = {"w": rng.normal(size=(3, 3, 2, 4)).astype(np.float32), "v": VECTOR}

    def apply_fn(p, x):
        y = convolve(x.transpose(0, 3, 1, 2), p["w"].transpose(3, 2, 0, 1), numbers)
        return y * p["v"][:, None, None] + 1.0

    folded, steps = check(apply_fn, variables, (5, 6, 2))
    (convolution,) = steps.convolutions
    assert (convolution.leaf, convolution.moves) == ("w", (("transpose", (3, 2, 0, 1)),))
    assert folded.arrays["w"].shape == (4, 2, 3, 3)


def test_one_leaf_in_two_convolutions_is_folded_for_each():
    rng = np.random.default_rng(0)
    variables = {"w": rng.normal(size=(3, 3, 4, 4)).astype(np.float32), "v": VECTOR}

    def apply_fn(p, x):
        return convolve(jax.nn.relu(convolve(x, p["w"]) * p["v"]), p["w"]) + p["v"]

    folded, steps = check(apply_fn, variables, (5, 6, 4), rtol=1e-4)
    assert [step.leaf for step in steps.convolutions] == ["w", "w"]
    assert len({step.name for step in steps.convolutions}) == 2
    assert not np.array_equal(*(folded.arrays[step.name] for step in steps.convolutions))


def test_zeros_stay_zeros():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
    w[rng.random(w.shape) < 0.5] = 0.0
    folded = fold(lambda p, x: convolve(x, p["w"]) * p["v"] - 1.0, {"w": w, "v": VECTOR}, (5, 6, 2))
    assert np.array_equal(np.asarray(folded.arrays["w"]) == 0, w == 0)


def test_bfloat16_nets_keep_their_dtype():
    model = models.build("small", num_classes=10, dtype=jnp.bfloat16)
    variables = drawn(model, (8, 8, 1))
    folded, steps = check(lambda v, x: model.apply(v, x, train=False), variables, (8, 8, 1), atol=0.05, rtol=0.05)
    assert {folded.arrays[step.name].dtype for step in steps.convolutions} == {jnp.dtype(jnp.bfloat16)}
    assert "rsqrt" not in primitives(steps)


def test_random_and_looped_functions_are_left_as_they_are():
    rng = np.random.default_rng(0)
    variables = {"w": rng.normal(size=(3, 3, 2, 2)).astype(np.float32)}

    def apply_fn(p, x):
        y = lax.fori_loop(0, 2, lambda _, y: jnp.tanh(convolve(y, p["w"])), x)
        return lax.cond(p["w"].sum() > 0, lambda y: y + 1, lambda y: y - 1, y)

    _, steps = check(apply_fn, variables, (5, 6, 2))
    assert not steps.convolutions


def test_what_changes_with_the_batch_is_refused():
    folded = fold(lambda p, x: x * (p["v"] if len(x) == 1 else p["v"][:1]), {"v": VECTOR}, (4, 4, 4))
    with pytest.raises(ValueError, match="batch of 1"):
        folded.steps(1)


def test_a_function_of_several_results_is_refused():
    with pytest.raises(ValueError, match="expected one array of logits"):
        fold(lambda p, x: (x, p), {"w": np.ones(3)}, (4, 4, 1))
    with pytest.raises(ValueError, match="image_shape"):
        fold(lambda p, x: x, {"w": np.ones(3)}, (4, 4))


def test_flax_modules_with_mutable_state_and_constants():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            offset = self.variable("constants", "offset", lambda: jnp.full((1, 1, 1, 4), 0.3))
            return nn.Conv(4, (3, 3))(x + 1.0) * offset.value

    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
    _, steps = check(model.apply, variables, (6, 6, 2))
    assert primitives(steps) == ["add", "conv_general_dilated"]


@pytest.mark.parametrize("name", ["resnet32", "vgg11"])
def test_a_symbolic_batch_has_the_same_arrays(name):
    model = models.build(name, num_classes=10, width=0.125)
    shape = models.default_image_shape(name)
    variables = drawn(model, shape)
    folded = fold(lambda variables, images: model.apply(variables, images, train=False), variables, shape)
    (batch,) = jax.export.symbolic_shape("batch")
    symbolic, known = folded.steps(batch), folded.steps(3)
    assert [step.name for step in symbolic.convolutions] == [step.name for step in known.convolutions]
    assert all(step.bias is not None for step in symbolic.convolutions)
