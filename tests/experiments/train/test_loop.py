"""The training loop: phases, records, resuming, and what stops it."""

import collections
import dataclasses
import json
import re
import signal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import clicktrain_jax as ct
from experiments.records import RunFolder, read_metrics
from experiments.train import loop
from experiments.train.step import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_trainer):
    """An uninterrupted run: its folder and summary."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, loop.train(tiny.CONFIG, folder, trainer=tiny_trainer)


def test_a_run_goes_through_all_phases_and_leaves_its_records(finished, tiny_trainer):
    folder, summary = finished
    assert tiny_trainer.steps_per_epoch == 5  # four batches of 32 and one of 12
    phases = [line["phases"] for line in read_metrics(folder)]
    assert phases == [["dense"], ["select", "regularize"], ["regularize"], ["prune", "pruned"], ["pruned"]]
    for name in ("config.json", "setting.json", "metrics.jsonl", "summary.json", "checkpoints"):
        assert (folder / name).exists()
    assert 0 < summary["final_top1"] <= summary["best_top1"] <= 1
    assert summary["best_pruned_top1"] <= summary["best_top1"]
    # The trainer is shared: whoever came first paid for the compiling.
    assert tiny_trainer.compile_seconds > 0
    assert summary["compile_seconds"] == sum(line["compile_seconds"] for line in read_metrics(folder))
    assert summary["train_and_compile_seconds"] == summary["train_seconds"] + summary["compile_seconds"]
    # Half of the kernels with 4 of 9 taps: 4.5x, but for the first convolution.
    assert 4 < summary["conv_compression"] < 4.5
    setting = json.loads((folder / "setting.json").read_text())
    assert setting["versions"]["jax"] == jax.__version__


def test_masked_weights_are_exactly_zero_at_the_end_and_not_before_the_prune(tiny_trainer):
    state = tiny_trainer.init(0)
    for epoch in range(tiny.CONFIG.epochs):
        state, _ = tiny_trainer.run_epoch(state, epoch, 0)
        keep = ct.masks_of(state.opt_state).kernel
        for name, mask in keep.items():
            mask = mask.get("kernel")
            if mask is None or epoch < tiny.CONFIG.prune.select_epoch:
                assert mask is None or bool(mask.all())
                continue
            weights = np.asarray(state.params[name]["kernel"])
            zero = weights[~np.asarray(mask)] == 0
            assert zero.all() if epoch >= tiny.CONFIG.prune.prune_epoch else not zero.any()


def test_equal_seeds_give_equal_bits_and_others_do_not(finished, tiny_trainer, tmp_path):
    again = loop.train(tiny.CONFIG, tmp_path / "again", trainer=tiny_trainer)
    other = loop.train(tiny.changed(seed=1), tmp_path / "other", trainer=tiny_trainer)
    assert again["params_sha256"] == finished[1]["params_sha256"]
    assert again["masks_sha256"] == finished[1]["masks_sha256"]
    assert other["params_sha256"] != finished[1]["params_sha256"]


@pytest.mark.slow
def test_one_compiled_loop_an_epoch_trains_as_one_call_an_update(tiny_trainer, tiny_dataset):
    def run(trainer):
        state = trainer.init(0)
        for epoch in range(tiny.CONFIG.epochs):
            state, metrics = trainer.run_epoch(state, epoch, 0)
        return state, metrics

    config = tiny.changed(loop=dataclasses.replace(tiny.CONFIG.loop, epoch_program="scan"))
    scanned = Trainer(config, tiny_dataset)
    assert scanned.scan and not tiny_trainer.scan
    (state, metrics), (other, other_metrics) = run(tiny_trainer), run(scanned)
    # XLA's convolutions inside a compiled loop sum in another order.
    np.testing.assert_allclose(metrics[:, 0], other_metrics[:, 0], rtol=2e-3)
    for one, two in zip(jax.tree.leaves(state.opt_state.masks), jax.tree.leaves(other.opt_state.masks)):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params)):
        np.testing.assert_allclose(one, two, rtol=2e-2, atol=2e-3)


def test_the_loop_computes_what_the_transformation_does_in_a_users_own_loop(tiny_trainer):
    """Same batches, same keys: `ct.clicktrain` in a plain loop ends at the loop's weights."""
    trainer, prune = tiny_trainer, tiny.CONFIG.prune
    state = trainer.init(0)
    for epoch in range(tiny.CONFIG.epochs):
        state, _ = trainer.run_epoch(state, epoch, 0)

    start = trainer.init(0)
    transform = ct.clicktrain(
        trainer.optimizer,
        trainer.plan,
        select_step=prune.select_epoch * trainer.steps_per_epoch,
        prune_step=prune.prune_epoch * trainer.steps_per_epoch,
        coeff=prune.coeff,
    )
    # The loop's own dense update, with the transformation where its optimizer was.
    users = Trainer(tiny.changed(method=None), trainer.dataset)
    users.optimizer = transform
    theirs = start._replace(opt_state=transform.init(start.params))
    for epoch in range(tiny.CONFIG.epochs):
        theirs, _ = users.run_epoch(theirs, epoch, 0)
    jax.tree.map(np.testing.assert_array_equal, ct.masks_of(theirs.opt_state), ct.masks_of(state.opt_state))
    assert ct.status(theirs.opt_state) == ct.status(state.opt_state)
    for one, two in zip(jax.tree.leaves(theirs.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scores_of_several_updates_and_a_second_selection(tiny_dataset, tmp_path, monkeypatch):
    """As in a user's own loop with the same options; and stopped inside a window of gathering, the same bits."""
    prune = dataclasses.replace(
        tiny.CONFIG.prune, select_epoch=1, reselect_epoch=2, importance_steps=4, patterns="coverage", num_patterns=3
    )
    config = tiny.changed(method=prune, epochs=4, mixup_epoch=None)
    trainer = Trainer(config, tiny_dataset)
    folder = tmp_path / "whole"
    whole = loop.train(config, folder, trainer=trainer)
    assert whole["compile_seconds"] > 0
    phases = [line["phases"] for line in read_metrics(folder)]
    assert phases == [["dense"], ["select", "regularize"], ["select", "regularize"], ["prune", "pruned"]]

    # The first selection's window began three updates before the first epoch's end.
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(loop.Interrupted):
            loop.train(config, tmp_path / "stopped", trainer=trainer)
    resumed = loop.train(config, tmp_path / "stopped", trainer=trainer)
    assert resumed["params_sha256"] == whole["params_sha256"] and resumed["masks_sha256"] == whole["masks_sha256"]

    start = trainer.init(0)
    transform = ct.clicktrain(
        trainer.optimizer,
        trainer.plan,
        select_step=5,
        reselect_step=10,
        prune_step=15,
        coeff=prune.coeff,
        patterns=trainer.patterns,
        importance_steps=4,
    )
    users = Trainer(dataclasses.replace(config, method=None), tiny_dataset)
    users.optimizer = transform
    theirs = start._replace(opt_state=transform.init(start.params))
    for epoch in range(config.epochs):
        theirs, _ = users.run_epoch(theirs, epoch, 0)
    state = trainer.init(0)
    for epoch in range(config.epochs):
        state, _ = trainer.run_epoch(state, epoch, 0)
    jax.tree.map(np.testing.assert_array_equal, ct.masks_of(theirs.opt_state), ct.masks_of(state.opt_state))
    for one, two in zip(jax.tree.leaves(theirs.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_the_dense_phase_lowers_to_the_plain_optax_step_and_a_count(tiny_trainer, tiny_dataset):
    plain = Trainer(tiny.changed(method=None), tiny_dataset)
    found = []
    for trainer in (tiny_trainer, plain):
        state = jax.eval_shape(trainer.fresh, jax.random.key(0))
        metrics = jnp.zeros((5, 2))
        args = (state, metrics, trainer.train_data, jnp.arange(140), np.int32(0), jax.random.key(0), {})
        text = jax.jit(trainer.update_step("dense", 32)).lower(*args).as_text()
        found.append(collections.Counter(re.findall(r"stablehlo\.\w+", text)))
    # `optax.safe_increment` of the count.
    assert found[0] - found[1] <= collections.Counter(
        {"stablehlo." + name: 4 for name in ("compare", "add", "select", "constant", "broadcast_in_dim")}
    )
    assert not found[1] - found[0]


def test_a_selection_that_is_put_off_is_tried_again_in_the_next_update(tiny_dataset):
    """The loop reads one flag after it; in the window before it, an update that is not finite adds none."""
    prune = dataclasses.replace(tiny.CONFIG.prune, importance_steps=2, prune_epoch=2)
    how = dataclasses.replace(tiny.CONFIG.loop, pruned_convolution="dense")
    trainer = Trainer(tiny.changed(method=prune, mixup_epoch=2, epochs=3, loop=how), tiny_dataset)
    select = trainer.schedule.select_step

    def spoilt(update):
        def run(grads, state, params, **extra):
            bad = (state.count == select - 1) | (state.count == select + 1)
            updates, good = update(grads, state, params, **extra)
            _, seen = update(jax.tree.map(lambda g: g * jnp.nan, grads), state, params, **extra)
            seen = seen._replace(inner_state=good.inner_state)
            return updates, jax.tree.map(lambda one, two: jnp.where(bad, one, two), seen, good)

        return run

    kinds = {kind: spoilt(getattr(trainer.updates, kind)) for kind in ("gather", "select")}
    trainer.updates = trainer.updates._replace(**kinds)
    state, ran = trainer.init(0), []
    for epoch in range(3):
        state, _ = trainer.run_epoch(state, epoch, 0)
        start = epoch * trainer.steps_per_epoch
        ran += [(phase.name, gathers, start + first, start + end) for phase, gathers, first, end in trainer.ran]
    status = ct.status(state.opt_state)
    assert (status.selected, status.postponed, status.pruned) == (select + 2, 2, trainer.schedule.prune_step)
    assert [segment for segment in ran if segment[0] == "SELECT" or segment[1]] == [
        ("DENSE", True, select - 1, select),
        ("DENSE", True, select, select + 1),
        ("SELECT", False, select + 1, select + 2),
        ("SELECT", False, select + 2, select + 3),
    ]


def test_one_program_mixes_images_in_the_epochs_that_ask_for_it_alone(tiny_dataset):
    losses = []
    for mixup_epoch in (1, None):
        trainer = Trainer(tiny.changed(method=None, epochs=3, mixup_epoch=mixup_epoch), tiny_dataset)
        state, found = trainer.init(0), []
        for epoch in range(3):
            state, metrics = trainer.run_epoch(state, epoch, 0)
            found.append(metrics[:, 0])
        assert sorted(key[:2] for key in trainer.programs.large) == [("gradient", 12), ("gradient", 32)]
        losses.append(found)
    ours, plain = losses
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-6)
    assert (np.abs(np.subtract(ours[1:], plain[1:])) > 1e-3).all()


def interrupt_after(monkeypatch, updates, act):
    """Call ``act`` once after so many updates of the run."""
    original, count = Trainer.run_epoch, 0

    def run_epoch(self, state, epoch, seed, on_step=lambda _: None):
        def counted(done):
            nonlocal count
            count += 1
            if count == updates:
                act()
            on_step(done)

        return original(self, state, epoch, seed, counted)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)


@pytest.mark.parametrize(
    ("number", "updates", "epochs_saved"),
    [
        (signal.SIGINT, 3, 0),
        (signal.SIGTERM, 7, 1),
        (signal.SIGINT, 10, 2),
        (signal.SIGTERM, 18, 3),
        (signal.SIGTERM, 25, 5),
    ],
)
def test_a_signal_stops_between_updates_and_resuming_gives_the_same_bits(
    finished, tiny_trainer, tmp_path, monkeypatch, number, updates, epochs_saved
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, updates, lambda: signal.raise_signal(number))
        with pytest.raises(loop.Interrupted) as stop:
            loop.train(tiny.CONFIG, folder, trainer=tiny_trainer)
    assert (stop.value.signal_number, stop.value.epochs_saved) == (number, epochs_saved)
    assert (folder / "summary.json").exists() == (epochs_saved == tiny.CONFIG.epochs)
    resumed = loop.train(tiny.CONFIG, folder, trainer=tiny_trainer)
    assert resumed["params_sha256"] == finished[1]["params_sha256"]
    assert [line["epoch"] for line in read_metrics(folder)] == list(range(tiny.CONFIG.epochs))


def test_a_finished_run_is_returned_as_it_is(finished):
    folder, summary = finished
    assert loop.train(tiny.CONFIG, folder) == summary


def test_a_broken_checkpoint_falls_back_to_the_one_before_and_says_so(finished, tiny_trainer, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 22, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(loop.Interrupted):
            loop.train(tiny.CONFIG, folder, trainer=tiny_trainer)
    newest = folder / "checkpoints" / "4"
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 2000]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="checkpoint 4 .* is broken .* falling back"):
        resumed = loop.train(tiny.CONFIG, folder, trainer=tiny_trainer)
    assert resumed["params_sha256"] == finished[1]["params_sha256"]
    assert (folder / "checkpoints" / "4.broken").exists()


def test_a_changed_byte_in_a_checkpoint_is_found(tmp_path):
    from experiments.train.checkpoints import Checkpoints

    tree = {"weights": np.arange(4096, dtype=np.float32)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for number in (1, 2):
        checkpoints.save(number, {"weights": tree["weights"] * number})
    blobs = [path for path in (tmp_path / "checkpoints" / "2").rglob("*") if path.is_file() and "/d/" in str(path)]
    assert blobs
    for path in blobs:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        number, restored = checkpoints.restore_newest(tree)
    checkpoints.close()
    assert number == 1 and any("checkpoint 2" in str(warning.message) for warning in caught)
    np.testing.assert_array_equal(restored["weights"], tree["weights"])


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tiny_dataset, tmp_path):
    config = tiny.changed(learning_rate=1e30, method=None, net="small")
    with pytest.raises(loop.NonFiniteLoss, match="not finite.* in epoch 0.* 0 whole epochs.*learning_rate"):
        loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_what_is_wrong_with_a_config_shows_before_anything_is_written(tiny_dataset, tiny_trainer, tmp_path):
    with pytest.raises(ValueError, match="unknown net 'vgg99'"):
        loop.train(tiny.changed(net="vgg99"), tmp_path / "run", dataset=tiny_dataset)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="trainer was made for another config"):
        loop.train(tiny.changed(learning_rate=0.5), tmp_path / "run", trainer=tiny_trainer)


def test_a_folder_whose_making_was_cut_short_is_taken_up(tiny_dataset, tmp_path):
    (tmp_path / "setting.json").write_text("{}")
    (tmp_path / "config.json.tmp").write_text("{")
    assert RunFolder(tmp_path).check(tiny.CONFIG, tiny_dataset.fingerprint) is False


def test_a_net_that_diverges_in_an_epochs_last_update_is_not_saved(tiny_dataset, tmp_path):
    # One update an epoch: its loss is taken before the update that breaks the weights.
    config = tiny.changed(learning_rate=1e38, method=None, mixup_epoch=None, batch_size=140, lr_schedule="step")
    with pytest.raises(loop.NonFiniteLoss, match="0 whole epochs"):
        loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_net_that_diverges_is_not_saved_within_an_epoch(tiny_dataset, tmp_path):
    every = dataclasses.replace(tiny.CONFIG.loop, checkpoint_every_steps=1)
    config = tiny.changed(learning_rate=1e38, method=None, mixup_epoch=None, lr_schedule="step", loop=every)
    with pytest.raises(loop.NonFiniteLoss, match="0 whole epochs"):
        loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    # The first update leaves weights that are finite, the second does not.
    assert [path.name for path in (tmp_path / "run" / "within").iterdir()] == ["1"]


def test_checkpoints_none_of_which_can_be_read_stay_and_are_an_error(tmp_path):
    from experiments.train.checkpoints import Checkpoints

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"weights": np.ones(3)})
    with pytest.raises(ValueError, match="no checkpoint in .* can be read; number 1"):
        checkpoints.restore_newest({"weights": np.ones(5)})
    checkpoints.close()
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_folder_of_another_run_is_refused_and_left_alone(finished, tmp_path, tiny_dataset):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="another config: seed is 0 there and 7 here"):
        loop.train(tiny.changed(seed=7), folder, dataset=tiny_dataset)
    with pytest.raises(ValueError, match="other images"):
        RunFolder(folder).check(tiny.CONFIG, "another fingerprint")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        loop.train(tiny.CONFIG, tmp_path, dataset=tiny_dataset)
    assert (folder / "metrics.jsonl").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_bfloat16_computes_with_float32_masters(tiny_dataset):
    trainer = Trainer(tiny.changed(precision="bfloat16", method=None), tiny_dataset)
    state, metrics = trainer.run_epoch(trainer.init(0), 0, 0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert np.isfinite(metrics).all()


def test_tensorboard_events_are_written_when_asked_for(tiny_dataset, tmp_path):
    pytest.importorskip("tensorboardX")
    options = dataclasses.replace(tiny.CONFIG.loop, tensorboard=True, eval_every_epochs=2, checkpoint_every_epochs=2)
    config = tiny.changed(method=None, mixup_epoch=None, epochs=3, loop=options)
    loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    assert list((tmp_path / "run" / "events").iterdir())
    # Every second epoch and the last one.
    assert ["eval_top1" in line for line in read_metrics(tmp_path / "run")] == [False, True, True]
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"2", "3"} <= saved and "1" not in saved
