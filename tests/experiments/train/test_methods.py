"""The methods that ClickTrain is compared with, in the training loop: schedules, forks, masks, resuming."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from experiments.configs.methods import (
    AdmmConfig,
    AfterConfig,
    ChannelConfig,
    GradualConfig,
    MagnitudeConfig,
    NOfMConfig,
    NOfMOnceConfig,
    RandomConfig,
    RetrainConfig,
    RiglConfig,
    SetConfig,
)
from experiments.records import read_metrics
from experiments.studies.export import restore
from experiments.train import forks, loop
from experiments.train.recipe import learning_rate
from experiments.train.step import Trainer
from experiments.train.update import mixes

END = tiny.CONFIG.epochs
DENSE = tiny.changed(
    name="dense",
    method=None,
    partial_batch="drop",
    loop=dataclasses.replace(tiny.CONFIG.loop, keep_checkpoints=END, eval_every_epochs=9),
)
AFTER = dataclasses.replace(tiny.CONFIG.prune, importance="magnitude", coeff=0.0, select_epoch=END, prune_epoch=END)
REWIND = dataclasses.replace(DENSE, name="rewind", method=AfterConfig(AFTER, RetrainConfig(2)))
LATER = dataclasses.replace(AFTER, select_epoch=END + 2, prune_epoch=END + 2)
ADMM = dataclasses.replace(
    REWIND, name="admm", method=AfterConfig(LATER, RetrainConfig(2), AdmmConfig(2, every_updates=2))
)
SPARSE = GradualConfig(4.0, begin_epoch=2, end_epoch=4, every_updates=2)
METHODS = {
    "gradual": SPARSE,
    "rigl": RiglConfig(4.0, "erk", end_epoch=4, every_updates=2),
    "set": SetConfig(4.0, "erk", end_epoch=4, every_updates=2),
    "random": RandomConfig(4.0, "erk"),
    "magnitude": MagnitudeConfig(4.0, prune_epoch=2),
    "n_of_m": NOfMConfig(),
    "n_of_m_once": NOfMOnceConfig(prune_epoch=2),
}


@pytest.fixture(scope="module")
def trunk(tiny_dataset, tmp_path_factory):
    """A dense run with a checkpoint of every epoch."""
    folder = tmp_path_factory.mktemp("trunk") / "dense-seed0"
    loop.train(DENSE, folder, dataset=tiny_dataset)
    return folder


def zeros(params):
    return {name: float(np.mean(np.asarray(layer["kernel"]) == 0)) for name, layer in params.items() if "Conv" in name}


def test_the_learning_rate_of_pruning_after_training():
    rate = learning_rate(ADMM, 10)
    dense = learning_rate(DENSE, 10)
    steps = np.arange(10 * END)
    np.testing.assert_array_equal([rate(step) for step in steps], [dense(step) for step in steps])
    assert rate(10 * END) == rate(10 * END + 19) == np.float32(ADMM.method.admm.learning_rate)
    # Two epochs of retraining: the last two of the dense schedule once more.
    first = 10 * (END + 2)
    np.testing.assert_allclose(
        [rate(first + step) for step in range(20)], [dense(10 * (END - 2) + step) for step in range(20)], rtol=1e-6
    )
    cosine = learning_rate(dataclasses.replace(REWIND, method=AfterConfig(AFTER, RetrainConfig(2, "cosine", 0.05))), 10)
    assert cosine(10 * END) == np.float32(0.05) and cosine(10 * END + 20) == 0


@pytest.mark.parametrize("config", [REWIND, pytest.param(ADMM, marks=pytest.mark.slow)], ids=lambda c: c.name)
def test_pruning_after_training_forks_from_the_dense_run(config, trunk, tiny_dataset, tmp_path):
    trainer = Trainer(config, tiny_dataset)
    whole = loop.train(config, tmp_path / "whole", trainer=trainer)
    # All that was compiled is in the summary, what draws the first state too.
    assert whole["compile_seconds"] == pytest.approx(trainer.compile_seconds) and ("init",) in trainer.programs
    forked = forks.train_forked(config, tmp_path / "forked", trunk, trainer=trainer)
    assert forks.fork_epoch(config, trainer.steps_per_epoch) == END
    for key in ("params_sha256", "masks_sha256", "final_top1", "conv_retained"):
        assert forked[key] == whole[key]
    assert forked["epochs"] == config.total_epochs == len(read_metrics(tmp_path / "forked"))
    # What the dense run took is counted.
    assert forked["train_seconds"] > sum(line["train_seconds"] for line in read_metrics(trunk))
    # The dense update was compiled once more, for this run, and what the trunk compiled is not counted again.
    compiled = [line["compile_seconds"] for line in read_metrics(tmp_path / "forked")]
    assert compiled[0] > 0 and compiled[1:END] == [0.0] * (END - 1)
    assert forked["method"] == "pruning after training" and 4 < forked["conv_compression"] < 4.5
    share = zeros(restore(tmp_path / "forked").state.params)
    assert share.pop("Conv_0") == 0 and min(share.values()) > 0.75


@pytest.mark.parametrize(("config", "after"), [(REWIND, [False, True]), (ADMM, [False, False, False, True])])
def test_mixup_after_the_dense_run_is_that_of_the_schedules_tail(config, after):
    assert config.mixup_epoch == 4
    assert [mixes(config, epoch) for epoch in range(config.total_epochs)] == [*[False] * 4, True, *after]


def test_one_shot_prunes_at_the_very_end(trunk, tiny_dataset, tmp_path):
    config = dataclasses.replace(REWIND, name="one-shot", method=AfterConfig(AFTER, RetrainConfig(0)))
    trainer = Trainer(config, tiny_dataset)
    last = END * trainer.steps_per_epoch - 1
    assert (trainer.schedule.select_step, trainer.schedule.prune_step) == (last - 1, last)
    summary = forks.train_forked(config, tmp_path / "run", trunk, trainer=trainer)
    assert summary["epochs"] == END and 4 < summary["conv_compression"] < 4.5
    assert zeros(restore(tmp_path / "run").state.params)["Conv_1"] > 0.75


@pytest.mark.parametrize(
    "method", ["gradual", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "gradual")]
)
def test_sparse_training_reaches_its_compression(method, trunk, tiny_dataset, tmp_path):
    config = dataclasses.replace(DENSE, name=method, method=METHODS[method])
    trainer = Trainer(config, tiny_dataset)
    summary = forks.train_forked(config, tmp_path / "run", trunk, trainer=trainer)
    assert summary["method"] == method and summary["masks_sha256"] is not None
    if method.startswith("n_of_m"):
        assert summary["conv_retained"] == 72 + (summary["conv_weights"] - 72) // 2  # all but the first layer
    else:
        assert summary["conv_retained"] == round(summary["conv_weights"] / 4)
    found = restore(tmp_path / "run")
    masks, params = found.masks.kernel, found.variables["params"]
    for name in ("Conv_1", "Conv_2", "Conv_3"):
        np.testing.assert_array_equal(params[name]["kernel"][~masks[name]["kernel"]], 0)
    kept = sum(int(leaf.sum()) for leaf in jax.tree.leaves(masks))
    assert kept + 72 == summary["conv_retained"]
    # What the net is evaluated with is what is exported.
    assert found.trainer.evaluate(found.state)[1] == summary["final_top1"]
    if method in ("rigl", "set", "random"):  # each run draws its own first masks
        first, second = (jax.tree.leaves(trainer.init(seed).opt_state.masks)[0] for seed in (0, 1))
        assert (np.asarray(first) != np.asarray(second)).any()
    if method in ("gradual", "magnitude", "n_of_m_once"):
        assert forks.fork_epoch(config, trainer.steps_per_epoch) == 2
        shared = [[line["train_loss"] for line in read_metrics(path)] for path in (tmp_path / "run", trunk)]
        assert shared[0][:2] == shared[1][:2]


@pytest.mark.slow
def test_prunetrain_gets_narrower_and_goes_on_after_a_kill(tiny_dataset, tmp_path, monkeypatch):
    config = dataclasses.replace(
        # A threshold that finds dead channels after so few updates.
        DENSE,
        name="prunetrain",
        width=0.5,
        method=ChannelConfig(0.9, every_epochs=2, threshold=0.25),
    )
    trainer = Trainer(config, tiny_dataset)
    whole = loop.train(config, tmp_path / "whole", trainer=trainer)
    lines = read_metrics(tmp_path / "whole")
    assert [line["epoch"] for line in lines if "channels" in line] == [2, 4]
    dense = loop.train(dataclasses.replace(config, method=None, name="dense"), tmp_path / "dense")
    assert whole["conv_weights"] < dense["conv_weights"] and whole["multiply_adds"] < dense["multiply_adds"]
    assert lines[-1]["training_multiply_adds"] < lines[0]["training_multiply_adds"]

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "summarise", kill)
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "killed", trainer=trainer)
    resumed = loop.train(config, tmp_path / "killed", trainer=Trainer(config, tiny_dataset))
    assert resumed["params_sha256"] == whole["params_sha256"] and resumed["conv_weights"] == whole["conv_weights"]
    found = restore(tmp_path / "killed")
    assert found.trainer.evaluate(found.state)[1] == whole["final_top1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": AfterConfig(tiny.CONFIG.prune, RetrainConfig(2))}, "expected both 5, where the dense epochs"),
        ({"method": AfterConfig(AFTER, RetrainConfig(6))}, "expected at most the dense run's 5"),
        ({"method": dataclasses.replace(SPARSE, end_epoch=9)}, "gradual.end_epoch=9 is after the last"),
        ({"method": RiglConfig(4.0, end_epoch=9)}, "rigl.end_epoch=9 is after the last"),
        ({"method": SetConfig(4.0, end_epoch=9)}, "set.end_epoch=9 is after the last"),
        ({"method": MagnitudeConfig(4.0, prune_epoch=5)}, "magnitude.prune_epoch=5: expected less than epochs=5"),
        ({"method": NOfMOnceConfig(prune_epoch=5)}, "n_of_m_once.prune_epoch=5: expected less than epochs=5"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(REWIND, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetrainConfig(2, "cosine"), "which needs it"),
        (lambda: RetrainConfig(2, "rewind", 0.1), "it is for 'cosine'"),
        (lambda: RetrainConfig(-1), "retrain.epochs=-1"),
        (lambda: AdmmConfig(2, rho=0.0), "admm.rho=0.0: expected a positive number"),
        (lambda: RiglConfig(4.0, drop_fraction=1.5), "rigl.drop_fraction=1.5: expected 0 to 1"),
        (lambda: RandomConfig(0.5), "random.compression=0.5: expected 1 or more"),
        (lambda: MagnitudeConfig(2.0, prune_epoch=-1), "magnitude.prune_epoch=-1"),
        (lambda: NOfMConfig(-1.0), "n_of_m.decay=-1.0"),
        (lambda: GradualConfig(0.5), "gradual.compression=0.5: expected 1 or more"),
        (lambda: GradualConfig(2.0, begin_epoch=3, end_epoch=3), "expected 0 <= begin < end"),
        (lambda: ChannelConfig(1.0), "channels.ratio=1.0"),
    ],
)
def test_method_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_compression_out_of_reach_is_told(tiny_dataset):
    config = dataclasses.replace(DENSE, method=dataclasses.replace(SPARSE, compression=1e4))
    with pytest.raises(ValueError, match="gradual.compression=10000.0: the layers that stay dense hold 72"):
        Trainer(config, tiny_dataset)
