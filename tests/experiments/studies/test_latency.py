"""Nets of finished runs timed side by side: the very arrays of the run, checked before they are timed."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
import tiny

import clicktrain_jax as ct
from clicktrain_jax.masks import combine
from experiments.configs.methods import ChannelConfig, GradualConfig, NOfMConfig
from experiments.records import RunFolder, read_json, write_json
from experiments.studies import export, latency
from experiments.train import loop
from experiments.train.checkpoints import Checkpoints, digest
from experiments.train.step import Trainer

TILES = dataclasses.replace(tiny.CONFIG.prune, tile=(8, 1))
CONFIGS = {
    "pruned": tiny.changed(name="pruned", width=0.25, method=TILES),
    "narrow": tiny.changed(name="narrow", method=None),
}


def drawn(trainer, seed):
    """What `Trainer.init` returns, not compiled: that takes longer than all tests here."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim > 1 and leaf.dtype == np.float32:
            return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(leaf.dtype)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(trainer.fresh, jax.random.key(seed)))


@pytest.fixture(scope="module", autouse=True)
def quick_init():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "init", drawn)
        yield


def finish(config, dataset, path):
    """A run folder as a run leaves it, without training: of the first weights, masked."""
    trainer = Trainer(config, dataset)
    state = trainer.init(config.seed)
    if trainer.updates is not None:
        _, held = jax.jit(trainer.updates.select)(state.params, state.opt_state, state.params)
        state = state._replace(params=ct.apply_masks(state.params, ct.masks_of(held)), opt_state=held)
    folder = RunFolder(path)
    folder.open(config, dataset.fingerprint)
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.save(config.epochs, state)
    checkpoints.close()
    loss, top1 = trainer.evaluate(state)
    line = {"epoch": config.epochs, "eval_loss": loss, "eval_top1": top1, "train_seconds": 1.0, "compile_seconds": 1.0}
    folder.write_summary(loop.summarise(trainer, config, state, [line]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_dataset, quick_init):
    folder = tmp_path_factory.mktemp("finished")
    for name, config in CONFIGS.items():
        finish(config, tiny_dataset, folder / name)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture
def by_pattern(monkeypatch):
    """Tuning takes long: here every pruned layer runs by its pattern."""

    def tuned(net, batch):
        names = [site.step.name for site in net.convolutions(batch) if site.structure is not None]
        return net.with_choice(batch, dict.fromkeys(names, "NHWC"))

    monkeypatch.setattr(latency.InferenceNet, "tuned", tuned)


def judge(measured, runs, sizes):
    assert measured["seed"] == 0 and "versions" in measured["setting"]
    assert list(measured["batches"]) == sizes
    for found in measured["batches"].values():
        assert found.keys() == runs.keys()
        assert all(0 < net["low_s"] <= net["median_s"] <= net["high_s"] for net in found.values())
    for cell, net in measured["nets"].items():
        summary = read_json(runs[cell] / "summary.json")
        for what in ("params_sha256", "masks_sha256"):
            assert net[what] == summary[what]
        assert net["layers"] == len(summary["layers"])
        assert abs(net["top1"] - summary["final_top1"]) <= latency.TOP1_TOLERANCE
        assert net["pattern_layers"] == net["pattern_layers_by_batch"][sizes[0]] <= net["layers"]
    assert measured["nets"]["narrow"]["masks_sha256"] is None
    assert measured["nets"]["narrow"]["pattern_layers_by_batch"] == dict.fromkeys(sizes, 0)


def test_the_record(runs, by_pattern):
    measured = latency.measure(runs, batches=(32, 1), rounds=3)
    judge(measured, runs, ["32", "1"])
    pruned = measured["nets"]["pruned"]
    layers = read_json(runs["pruned"] / "summary.json")["layers"]
    removed = [layer for layer in layers if layer["retained"] < np.prod(layer["shape"])]
    assert pruned["pattern_layers_by_batch"] == dict.fromkeys(("32", "1"), len(removed)) and removed


@pytest.mark.slow
def test_tuned(runs):
    judge(latency.measure(runs, batches=(1, 32), rounds=3), runs, ["1", "32"])


METHODS = {
    "gradual": {"method": GradualConfig(2.0, every_updates=2)},
    "2:4": {"method": NOfMConfig()},
    "prunetrain": {"method": ChannelConfig(every_epochs=1, threshold=0.2, multiple=1), "width": 0.25},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_trained_by_other_methods(name, tmp_path, tiny_dataset):
    """From the loop's own run folder, as `compare` does it."""
    settings = {"name": "other", "epochs": 2, "mixup_epoch": None}
    config = tiny.changed(**settings, **METHODS[name])
    summary = loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    found = latency.measure({name: tmp_path / "run"}, batches=(8,), rounds=1)["nets"][name]
    assert found["params_sha256"] == summary["params_sha256"]
    assert found["masks_sha256"] == summary["masks_sha256"]
    assert (found["masks_sha256"] is None) == (name == "prunetrain")
    assert found["pattern_layers"] == 0
    if name == "prunetrain":
        dense = Trainer(dataclasses.replace(config, method=None), tiny_dataset).abstract_params
        assert summary["conv_weights"] < sum(leaf.size for leaf in jax.tree.leaves(dense) if leaf.ndim == 4)
    else:
        assert summary["conv_retained"] < summary["conv_weights"]


def test_masks_without_patterns_are_those_of_a_dense_net(runs):
    """As a sparse training method has them: no selection of ClickTrain's, masks of single weights all the same."""
    found = export.restore(runs["pruned"])
    held, masks = latency._masks(found)
    assert digest(held) == read_json(runs["pruned"] / "summary.json")["masks_sha256"]
    assert not all(mask.all() for mask in jax.tree.leaves(combine(masks)))
    sparse = types.SimpleNamespace(trainer=types.SimpleNamespace(updates=None), masks=masks)
    assert latency._masks(sparse) == (masks, None)
    assert latency._masks(export.restore(runs["narrow"])) == (None, None)


def test_weights_that_are_not_masked_are_not_timed(runs, by_pattern, monkeypatch):
    """A layer that runs by its pattern leaves them out; the trainer's model does not."""
    found = export.restore(runs["pruned"])
    params = jax.tree.map(lambda leaf: leaf + 0.1, found.state.params)
    summary = read_json(runs["pruned"] / "summary.json") | {"params_sha256": digest(params)}
    monkeypatch.setattr(latency.RunFolder, "summary", lambda _: summary)
    changed = dataclasses.replace(found, state=found.state._replace(params=params))
    monkeypatch.setattr(latency, "restore", lambda *_: changed)
    with pytest.raises(ValueError, match="differ from the trainer's by"):
        latency.measure({"pruned": runs["pruned"]}, batches=(8,), rounds=1)


def test_another_accuracy_is_not_timed(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs["narrow"], other)
    summary = read_json(other / "summary.json")
    write_json(other / "summary.json", summary | {"final_top1": summary["final_top1"] + 0.01})
    with pytest.raises(ValueError, match="top-1 of the net that is timed"):
        latency.measure({"narrow": other}, batches=(8,), rounds=1)


def test_what_cannot_be_timed(runs, tmp_path):
    unfinished, other = tmp_path / "unfinished", tmp_path / "other"
    for copy in (unfinished, other):
        shutil.copytree(runs["narrow"], copy)
    (unfinished / "summary.json").unlink()
    write_json(other / "summary.json", read_json(other / "summary.json") | {"params_sha256": "0"})
    for found, options, message in (
        ({}, {}, "runs is empty"),
        (runs, {"batches": ()}, r"batches=\(\)"),
        (runs, {"batches": (1, 0)}, "each 1 or more"),
        (runs, {"batches": (8, 8)}, "different numbers"),
        ({"narrow": unfinished}, {}, "only a finished run is timed"),
        ({"narrow": other}, {}, "params_sha256 of the newest checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            latency.measure(found, **options)


@pytest.mark.parametrize(("what", "others"), [("seed", ((8, 8, 1), 1)), ("image_shape", ((4, 4, 1), 0))])
def test_nets_that_do_not_belong_together(what, others, monkeypatch, tmp_path):
    made = iter([latency._Ready({}, {}, (8, 8, 1), 0), latency._Ready({}, {}, *others)])
    monkeypatch.setattr(latency, "_make_ready", lambda *_: next(made))
    with pytest.raises(ValueError, match=f"different values of {what}"):
        latency.measure({"a": tmp_path, "b": tmp_path})


def test_the_last_batch_is_filled_up():
    shapes = []

    def program(pixels):
        shapes.append(pixels.shape)
        return pixels.sum(axis=(1, 2, 3))[:, None]

    images = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 1), np.uint8)
    found = latency._classifier(program, 3)(images)
    np.testing.assert_allclose(found[:, 0], images.sum(axis=(1, 2, 3)) / 255, rtol=1e-6)
    assert shapes == [(3, 2, 2, 1)] * 3
