"""Small sums on the host: the same numbers as XLA's, and no program is compiled for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clicktrain_jax import models
from clicktrain_jax.deploy import fold, host


def folding(variables):
    scale = variables["scale"] / jnp.sqrt(variables["variance"] + 1e-5)
    kernel = variables["kernel"] * scale.reshape(1, 1, 1, -1)
    shift = jnp.broadcast_to(-scale * jax.lax.rsqrt(variables["variance"]), (4,)) - variables["scale"]
    turned = jnp.transpose(kernel, (2, 0, 1, 3))
    return {"kernel": kernel, "shift": shift, "turned": turned, "one": jnp.squeeze(variables["one"], 0)}


@pytest.fixture
def variables():
    rng = np.random.default_rng(3)
    shapes = {"scale": (4,), "variance": (4,), "kernel": (3, 3, 2, 4), "one": (1, 5)}
    return {name: rng.uniform(0.5, 2.0, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def refused(monkeypatch):
    """Whether NumPy could not do it, of each call."""
    found, run = [], host.walk

    def watched(*arguments):
        try:
            result = run(*arguments)
        except host._Unknown:
            found.append(True)
            raise
        return result

    monkeypatch.setattr(host, "walk", watched)
    return found


def test_as_xla_computes_it(variables, refused):
    found, wanted = host.evaluate(folding, variables), jax.jit(folding)(variables)
    assert not refused and found.keys() == wanted.keys()
    for name, array in found.items():
        assert isinstance(array, jax.Array) and array.dtype == wanted[name].dtype
        np.testing.assert_allclose(array, wanted[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "function",
    [
        lambda variables: {"a": jnp.exp(variables["scale"])},
        lambda variables: {"a": variables["scale"].astype(jnp.bfloat16) * 2},
        lambda variables: {"a": jnp.arange(4.0) + variables["scale"]},
    ],
)
def test_what_is_not_written_is_xlas(function, variables, refused):
    np.testing.assert_array_equal(host.evaluate(function, variables)["a"], jax.jit(function)(variables)["a"])
    assert refused


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_nets_are_folded_without_a_program(name, refused):
    model = models.build(name, num_classes=10, width=0.125)
    shape = models.default_image_shape(name)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), variables)
    fold.fold(lambda variables, images: model.apply(variables, images, train=False), variables, shape)
    assert not refused
