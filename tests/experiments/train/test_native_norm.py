"""Updates with the native normalisation follow those with flax's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from drawn import drawn

import pallas_kernels as pk
from clicktrain_jax import models
from experiments.train.step import Trainer
from experiments.train.update import update_step
from pallas_kernels import native


@pytest.mark.parametrize("net", ["vgg11", "resnet18", "small"])
def test_a_gradient_follows_flax_s(net):
    shape = models.default_image_shape(net)
    draws = [np.random.default_rng(seed).standard_normal((8, *shape)).astype(np.float32) for seed in range(3)]

    def gradient_of(normalise):
        dropout = {"dropout": 0.0} if net == "vgg11" else {}
        norm = functools.partial(models.Norm, normalise=normalise)
        model = models.build(net, num_classes=10, width=0.25, norm=norm, **dropout)
        variables = drawn(model, shape)

        def loss(params, images):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return (logits**2).mean(), new

        return functools.partial(jax.jit(jax.grad(loss, has_aux=True)), variables["params"])

    native_one, wanted_one = gradient_of(functools.partial(pk.batch_norm, backend="cpu")), gradient_of(None)
    worst = []
    for images in draws:
        results, wanted = native_one(images), wanted_one(images)
        chex.assert_trees_all_equal_shapes_and_dtypes(results, wanted)
        pairs = zip(jax.tree.leaves(results), jax.tree.leaves(wanted))
        worst.append(max(np.linalg.norm(one - exact) / max(np.linalg.norm(exact), 1e-3) for one, exact in pairs))
    # Rounding decides a ReLU or a maximum otherwise in some draws, by the processor and how XLA compiles: a hundredth
    # then, and 1e-5 without.
    assert sorted(worst)[1] <= 2e-4 and max(worst) <= 0.02, worst


def test_an_update_follows_the_one_without_the_library(tiny_dataset, monkeypatch):
    def update():
        # Nothing is drawn: the samplers take longer to compile than the net.
        trainer = Trainer(tiny.changed(method=None, crop_padding=0, mixup_epoch=None), tiny_dataset)
        before = trainer.init(0)
        step = jax.jit(update_step(trainer, "dense", trainer.config.batch_size))
        metrics = jnp.zeros((trainer.steps_per_epoch, 2))
        order = jnp.arange(len(trainer.train_data.labels))
        args = (before, metrics, trainer.train_data, order, 0, jax.random.key(0), {})
        after, metrics = step(*args)
        moved = jax.tree.map(lambda new, old: np.asarray(new) - old, after.params, before.params)
        return step.lower(*args).as_text(), (moved, after.batch_stats, metrics)

    text, results = update()
    assert "clicktrain_batch_norm" in text
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    text, wanted = update()
    assert "clicktrain" not in text
    assert jax.tree.structure(results) == jax.tree.structure(wanted)
    for result, exact in zip(jax.tree.leaves(results), jax.tree.leaves(wanted)):
        assert np.linalg.norm(result - exact) <= 1e-3 * np.linalg.norm(exact)
