"""A batch's gradient as the mean over parts: which images, which statistics, what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from experiments.train.recipe import learning_rate
from experiments.train.step import Trainer
from experiments.train.update import gradient_of

PLAIN = dict(method=None, mixup_epoch=None, crop_padding=0)
SCAN = dataclasses.replace(tiny.CONFIG.loop, epoch_program="scan")


def found(config, dataset, images, batch):
    trainer = Trainer(config, dataset)
    state, key = trainer.init(0), jax.random.key(0)
    gradient = jax.jit(gradient_of(trainer, batch, "dense"))
    return jax.device_get(gradient(state.params, state.batch_stats, 0, trainer.train_data, images, 0, key, {}))


@pytest.fixture(scope="module")
def halves(tiny_dataset):
    """What is found on the first 32 images, in two ways to make halves of them."""
    small, order = tiny.changed(batch_size=16, **PLAIN), np.arange(32)

    def mean(*images):
        parts = [found(small, tiny_dataset, part, 16) for part in images]
        return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parts)

    return {"accumulate": mean(order[::2], order[1::2]), "shards": mean(order[:16], order[16:])}


@pytest.mark.parametrize("loop", [tiny.CONFIG.loop, SCAN], ids=["written out", "in a loop"])
@pytest.mark.parametrize("field", ["accumulate", "shards"])
def test_a_batch_in_two_parts_is_the_mean_of_two_batches(halves, tiny_dataset, field, loop):
    config = tiny.changed(loop=loop, **{field: 2}, **PLAIN)
    got = found(config, tiny_dataset, np.arange(32), 32)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(halves[field])):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def test_the_ways_to_divide_a_batch_differ(halves):
    """So the test above can tell one from the other."""
    one, two = halves["accumulate"].loss, halves["shards"].loss
    assert abs(one - two) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(accumulate=0), "accumulate=0: expected at least 1"),
        (dict(accumulate=3), "batch_size=32 cannot be divided into accumulate=3 times shards=1"),
        (dict(accumulate=4, shards=16), "expected a multiple of 64"),
        (dict(shards=2, partial_batch="partial"), "partial_batch='partial' with accumulate or shards"),
        (dict(loop=dataclasses.replace(tiny.CONFIG.loop, ordered=True)), "loop.ordered with shards=1"),
        (dict(warmup_epochs=5), "warmup_epochs=5: expected 0 to 4"),
    ],
)
def test_what_does_not_divide_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.changed(**fields)


def test_fewer_images_than_a_batch_are_divided_or_refused(tiny_dataset):
    with pytest.raises(ValueError, match="140 training images, which cannot be divided into accumulate=8"):
        Trainer(tiny.changed(batch_size=256, accumulate=8, **PLAIN), tiny_dataset)


def test_the_last_batch_is_filled_where_it_has_parts(tiny_dataset):
    trainer = Trainer(tiny.changed(accumulate=4, **PLAIN), tiny_dataset)
    assert (trainer.steps_per_epoch, trainer.tail) == (5, 0)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_a_warm_up_rises_in_a_line(schedule):
    milestones = (3,) if schedule == "step" else ()
    config = tiny.changed(lr_schedule=schedule, lr_milestones=milestones, warmup_epochs=2, learning_rate=0.4)
    rate = learning_rate(config, 10)
    rates = np.asarray([float(rate(step)) for step in range(50)])
    # The cosine schedule's warm-up, as ever, begins at zero; the other one's first update moves.
    np.testing.assert_allclose(rates[:20], 0.4 * (np.arange(20) + (schedule == "step")) / 20, rtol=1e-5, atol=1e-7)
    if schedule == "step":
        np.testing.assert_allclose(rates[20:], [0.4] * 10 + [0.04] * 20, rtol=1e-6)
    else:
        np.testing.assert_allclose(rates[[20, 49]], [0.4, 0.2 * (1 + np.cos(np.pi * 29 / 30))], rtol=1e-5)


def test_without_a_warm_up_the_schedule_is_as_it_was():
    rate = learning_rate(tiny.changed(lr_schedule="step", lr_milestones=(3,)), 10)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 29, 30)], [0.1, 0.1, 0.01], rtol=1e-6)
