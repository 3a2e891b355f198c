"""Options of a recipe: averaged weights, smoothed labels, a lasso that rises, masks that are chosen anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import clicktrain_jax as ct
from experiments.configs.methods import ChannelConfig, MagnitudeConfig, RiglConfig
from experiments.data import load
from experiments.train import loop
from experiments.train.step import Trainer
from experiments.train.update import averaged, cross_entropy


def test_an_average_by_hand():
    first, *others = (jnp.asarray([float(value)]) for value in (8, 2, 5))
    average = averaged(jnp.zeros(1), first, 0, 0.9)
    assert average == first  # what was before the last epochs counts for nothing
    expected = 8.0
    for done, value in enumerate(others, start=1):
        average = averaged(average, value, done, 0.9)
        held = (1 + done) / (10 + done)
        expected = held * expected + (1 - held) * float(value[0])
    np.testing.assert_allclose(average, expected, rtol=1e-6)
    np.testing.assert_allclose(averaged(jnp.ones(1), jnp.zeros(1), 10_000, 0.9), 0.9, rtol=1e-6)


def test_smoothed_labels_by_hand():
    logits, labels = jax.random.normal(jax.random.key(0), (5, 4)), jnp.asarray([0, 1, 2, 3, 1])
    spread = 0.9 * jax.nn.one_hot(labels, 4) + 0.1 / 4
    np.testing.assert_allclose(
        cross_entropy(logits, labels, 0.1), optax.softmax_cross_entropy(logits, spread), rtol=1e-5
    )
    assert (cross_entropy(logits, labels) == optax.softmax_cross_entropy_with_integer_labels(logits, labels)).all()
    slopes = [
        jax.grad(lambda logits, scatters=scatters: cross_entropy(logits, labels, 0.1, scatters=scatters).sum())(logits)
        for scatters in (True, False)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_a_run_ends_with_the_average_under_its_masks(tmp_path):
    prune = dataclasses.replace(tiny.CONFIG.prune, prune_epoch=2)
    # Whatever way the pruned phase is run, and without a last batch's programs.
    how = dataclasses.replace(tiny.CONFIG.loop, pruned_convolution="dense")
    config = tiny.changed(method=prune, ema_epochs=2, label_smoothing=0.1, loop=how, partial_batch="drop")
    trainer = Trainer(config, load(config.data))
    state = trainer.init(0)
    for epoch in range(config.epochs):
        state, _ = trainer.run_epoch(state, epoch, 0)
        raw, average = jax.device_get((state.params, state.average[0]))
        state = trainer.settled(state, epoch)
    assert any((one != other).any() for one, other in zip(jax.tree.leaves(raw), jax.tree.leaves(average)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), average)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(state.params, ct.masks_of(state.opt_state)), average)
    # The loop does the same, and a run that was stopped in between too: the average is in the checkpoint.
    summary = loop.train(config, tmp_path / "run", trainer=trainer)
    assert summary["final_top1"] == trainer.evaluate(state)[1]


def test_the_lasso_rises_after_the_selection():
    prune = dataclasses.replace(tiny.CONFIG.prune, coeff_ramp_epochs=2, reselect_every_epochs=1)
    trainer = Trainer(tiny.changed(method=prune), load(tiny.CONFIG.data))
    assert trainer.schedule.reselect_every == trainer.steps_per_epoch == 5
    from experiments.train.recipe import lasso_weight

    weight = lasso_weight(prune, 5, 5)
    np.testing.assert_allclose([weight(step) for step in (5, 10, 15, 20)], [0, 5e-4, 1e-3, 1e-3], atol=1e-9)
    assert lasso_weight(tiny.CONFIG.prune, 5, 5) == 1e-3


def test_a_run_measures_its_layers_for_a_target_in_time(monkeypatch):
    asked = []

    def layer_times(apply_fn, variables, images, plan):
        asked.append((images.shape, plan))
        assert apply_fn(variables, jnp.zeros(images.shape)).shape == (3, 10)
        names = [layer.name for layer in plan.layers]
        return ct.LayerTimes(10.0, tuple(ct.LayerTime(name, 2.0, (0.1, 1.0), (0.2, 2.0)) for name in names))

    monkeypatch.setattr(ct, "layer_times", layer_times)
    prune = dataclasses.replace(
        tiny.CONFIG.prune, fractions=(), target=1.2, target_of="latency", latency_batch=3, tile=(8, 1), floor=False
    )
    plan = Trainer(tiny.changed(method=prune), load(tiny.CONFIG.data)).plan
    [(shape, measured)] = asked
    assert shape == (3, 8, 8, 1) and plan.target.of == "latency"
    # In the shapes in which they will be pruned.
    assert [(layer.name, layer.tile) for layer in measured.layers] == [(each.name, each.tile) for each in plan.layers]
    assert all(layer.times.dense_s == 2.0 for layer in plan.layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema_epochs": 2}, "begins in epoch 3, and the masks change until epoch 4: average over at most 1"),
        ({"ema_epochs": 6}, "ema_epochs=6: expected 0 to the run's 5"),
        ({"ema_epochs": 2, "method": RiglConfig(2.0, end_epoch=4)}, "masks change until epoch 4"),
        ({"ema_epochs": 2, "method": ChannelConfig()}, "its masks never stand still"),
        ({"ema_epochs": 2, "method": MagnitudeConfig(2.0, prune_epoch=3)}, "masks change until epoch 4"),
        ({"label_smoothing": 1.0}, "expected shares"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.changed(**fields)
