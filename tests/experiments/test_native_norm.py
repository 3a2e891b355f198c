"""A whole update with the native normalisation follows the one with flax's."""

import functools

import jax
import numpy as np
import pytest

import pallas_kernels as pk
from clicktrain_jax import models


@pytest.mark.parametrize("net", ["vgg11", "resnet18", "small"])
def test_a_gradient_follows_flax_s(net):
    shape = models.default_image_shape(net)
    images = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32)

    def run(normalise):
        dropout = {"dropout": 0.0} if net == "vgg11" else {}
        norm = functools.partial(models.Norm, normalise=normalise)
        model = models.build(net, num_classes=10, width=0.25, norm=norm, **dropout)
        variables = model.init(jax.random.key(0), images, train=False)

        def loss(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return (logits**2).mean(), new

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    results, wanted = run(functools.partial(pk.batch_norm, backend="cpu")), run(None)
    assert jax.tree.structure(results) == jax.tree.structure(wanted)
    for result, exact in zip(jax.tree.leaves(results), jax.tree.leaves(wanted)):
        assert result.shape == exact.shape and result.dtype == exact.dtype
        # Rounding decides some maxima and ReLUs otherwise.
        assert np.linalg.norm(result - exact) <= 2e-3 * max(np.linalg.norm(exact), 1e-3)
