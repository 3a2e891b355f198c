"""Epochs as compiled loops: what they wait for, how many programs a run needs, what is drawn before, the last batch."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from clicktrain_jax import models
from experiments.records import read_metrics
from experiments.train import loop, update
from experiments.train.pruned_phase import Choice
from experiments.train.step import Trainer
from experiments.train.update import Drawn, draw_of, pack, update_loop
from tests.program_counts import epoch_loop

SCAN = dataclasses.replace(tiny.CONFIG.loop, epoch_program="scan")


@pytest.fixture(scope="module")
def scanned(tiny_dataset):
    by_pattern = dataclasses.replace(SCAN, pruned_convolution="pattern")
    return Trainer(tiny.changed(loop=by_pattern, partial_batch="fill"), tiny_dataset)


@pytest.fixture(scope="module")
def run(scanned, tmp_path_factory):
    """``(folder, summary)`` of a run of that trainer, which has its programs from then on."""
    folder = tmp_path_factory.mktemp("scanned") / "run"
    return folder, loop.train(scanned.config, folder, trainer=scanned)


def arguments(trainer):
    state = jax.eval_shape(trainer.fresh, jax.random.key(0))
    metrics = jnp.zeros((trainer.steps_per_epoch, 2))
    return state, metrics, trainer.train_data, trainer._order(jax.random.key(0), 0), np.int32(0), jax.random.key(0), {}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("kind", ["dense", "masked", "pruned"])
def test_a_loop_knows_its_trips_and_decides_nothing_on_the_way(scanned, kind):
    [text] = [
        future.result().as_text() for key, future in scanned.programs._futures.items() if key[:2] == ("loop", kind)
    ]
    # The sampler of mixup's lambda has loops in it: they stand before.
    found = epoch_loop(text)
    assert (found.trip_count, found.conditionals, found.inner_loops) == (5, 0, 0)


def test_a_run_compiles_three_loops_at_most_and_one_update_for_the_selection(scanned, run, tmp_path):
    folder, summary = run
    kinds = sorted(key[:2] for key in scanned.programs.large)
    assert kinds == [("gradient", 32), ("loop", "dense"), ("loop", "masked"), ("loop", "pruned")]
    again = loop.train(scanned.config, tmp_path / "again", trainer=scanned)
    assert len(scanned.programs.large) == 4 and again["params_sha256"] == summary["params_sha256"]
    phases = [line["phases"] for line in read_metrics(folder)]
    assert phases == [["dense"], ["select", "regularize"], ["regularize"], ["prune", "pruned"], ["pruned"]]
    # By pattern from the first whole loop after the prune on.
    assert scanned.images_by_pattern == 160 and summary["pruned_convolution"]["way"] == "pattern"


def test_an_update_that_changes_a_dtype_is_refused(scanned, monkeypatch):
    change_of = update.change_of

    def with_float_steps(trainer, kind):
        change = change_of(trainer, kind)

        def run(*args):
            state, metrics = change(*args)
            return state._replace(step=state.step.astype(jnp.float32)), metrics

        return run

    monkeypatch.setattr(update, "change_of", with_float_steps)
    with pytest.raises(TypeError, match="step to float32: expected the dtypes"):
        jax.eval_shape(update_loop(scanned, "dense", 32, "dense", scanned.loop_length), *arguments(scanned))


def test_an_epochs_last_batch_is_filled_from_the_next_ones_order(scanned):
    assert (scanned.steps_per_epoch, scanned.tail, scanned.loop_length) == (5, 0, 5)
    key = jax.random.key(3)
    orders = [np.asarray(scanned._order(key, epoch)) for epoch in range(2)]
    assert len(orders[0]) == 160
    np.testing.assert_array_equal(np.sort(orders[0][:140]), np.arange(140))
    np.testing.assert_array_equal(orders[0][140:], orders[1][:20])


@pytest.mark.parametrize(
    ("partial_batch", "platform", "steps", "tail"),
    [
        ("keep", "cpu", 5, 12),
        ("keep", "gpu", 5, 0),
        ("partial", "gpu", 5, 12),
        ("fill", "cpu", 5, 0),
        ("drop", "gpu", 4, 0),
    ],
)
def test_what_becomes_of_the_last_batch(tiny_dataset, partial_batch, platform, steps, tail):
    trainer = Trainer(tiny.changed(partial_batch=partial_batch), tiny_dataset, platform)
    assert (trainer.steps_per_epoch, trainer.tail) == (steps, tail)
    assert trainer.scan == (platform == "gpu")


def test_what_is_drawn_for_an_epoch_is_what_each_update_would_draw(scanned):
    draw, key = jax.jit(draw_of(scanned, 32)), jax.random.key(5)
    steps = 4 * scanned.steps_per_epoch + jnp.arange(-2, 3)  # the last three mix images
    together = jax.jit(jax.vmap(draw_of(scanned, 32), (None, 0)))(key, steps)
    assert isinstance(together, Drawn)
    for place, step in enumerate(steps):
        alone = draw(key, step)
        for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(together)):
            if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, two = jax.random.key_data(one), jax.random.key_data(two)
            np.testing.assert_array_equal(one, two[place])
    lam = np.asarray(together.mixture.lam)
    assert (lam[:2] == 1).all() and ((0 <= lam[2:]) & (lam[2:] < 1)).all()
    assert draw(key, steps[-1] + 40).mixture.lam < 1  # beyond the run's end


def test_packing_changes_nothing():
    tree = {
        "small": jnp.arange(6.0).reshape(2, 3),
        "other": jnp.ones(3),
        "nan": jnp.float32(jnp.nan),
        "count": jnp.int32(-7),
        "codes": jnp.arange(3),
        "flag": jnp.bool_(True),
        "short": jnp.ones(2, jnp.bfloat16),
        "empty": jnp.zeros((0,)),
        "large": jnp.ones((100, 100)),
    }
    packed, unpack = pack(tree)
    assert {name: len(flat) for name, flat in packed[0].items()} == {"uint32": 11, "uint16": 2}
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), tree)


def test_weights_are_kept_short_where_the_net_rounds_them_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(update, "SMALL", 2**10)
    net = SimpleNamespace(model=models.build("vgg11", num_classes=10, dtype=jnp.bfloat16), image_shape=(32, 32, 3))
    leaves = jax.tree_util.tree_leaves_with_path(models.abstract_variables(net.model, net.image_shape)["params"])
    found = {jax.tree_util.keystr(leaves[place][0]) for place in update.read_in(net, jnp.bfloat16)}
    kernels = {jax.tree_util.keystr(path) for path, leaf in leaves if leaf.ndim > 1}
    # The last layer is computed in float32.
    assert kernels - found == {"['Dense_2']['kernel']"} and found < kernels
    assert not update.read_in(net, jnp.float16)


def test_updates_that_no_loop_fits_are_called_one_by_one(tiny_dataset):
    """Those of the epoch of a selection, and of one that gathers scores for it; and all that follow a smaller batch."""
    prune = dataclasses.replace(tiny.CONFIG.prune, select_epoch=1, prune_epoch=2, importance_steps=3)
    trainer = Trainer(tiny.changed(loop=SCAN, method=prune, epochs=4, mixup_epoch=None), tiny_dataset)
    assert (trainer.loop_length, trainer.tail) == (4, 12)
    calls = []

    def called(kind, *_, **__):
        return lambda *args: calls.append((kind, int(args[4]))) or args[:2]

    trainer._loop = trainer._program = called
    trainer._facts = lambda state: trainer.schedule.planned(trainer.epoch * 5)
    trainer._prepare_pruned = trainer._prepare_masked = lambda *_: None
    trainer._choose_pruned = lambda *_: trainer.pruned.choice
    trainer.pruned.choice = Choice("dense", {}, {}, "asked for")
    state, found = trainer.init(0), []
    for epoch in range(4):
        trainer.epoch, calls[:] = epoch, []
        trainer.run_epoch(state, epoch, 0)
        found.append(list(calls))
    assert found[0] == [("dense", 0), ("dense", 1), ("dense", 2), ("gather", 3), ("gather", 4)]
    assert found[1][0] == ("select", 0)
    assert found[2] == [("masked", 0), ("pruned", 4)] and found[3] == [("masked", 0), ("pruned", 4)]


@pytest.mark.slow
def test_a_run_saved_between_a_pruned_loop_and_an_epochs_last_update_goes_on(tiny_dataset, tmp_path):
    fields = dict(pruned_convolution="pattern", checkpoint_every_steps=2)
    config = tiny.changed(loop=dataclasses.replace(SCAN, **fields))
    trainer = Trainer(config, tiny_dataset)
    whole = loop.train(config, tmp_path / "whole", trainer=trainer)
    original = trainer._run_segment

    def killed(segment, known, state, *rest):
        if int(state.step) == 24:
            raise KeyboardInterrupt
        return original(segment, known, state, *rest)

    trainer._run_segment = killed
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", trainer=trainer)
    assert [path.name for path in (tmp_path / "run/within").iterdir()] == ["24"]
    del trainer._run_segment
    again = loop.train(config, tmp_path / "run", trainer=trainer)
    lines = [read_metrics(tmp_path / name)[-1]["training_multiply_adds"] for name in ("whole", "run")]
    assert again["params_sha256"] == whole["params_sha256"] and lines[0] == lines[1]
