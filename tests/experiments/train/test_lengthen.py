"""More epochs for a run folder."""

import dataclasses
import json

import pytest
import tiny

from experiments.records import RunFolder
from experiments.train import loop
from experiments.train.lengthen import lengthen

SHORT = tiny.changed(method=None, mixup_epoch=None, epochs=1, lr_schedule="step")
LONG = dataclasses.replace(SHORT, epochs=2)


@pytest.fixture(scope="module")
def short(tiny_dataset, tmp_path_factory):
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("short") / "run"
    loop.train(SHORT, folder, dataset=tiny_dataset)
    return folder


def copy(folder, target):
    import shutil

    return RunFolder(shutil.copytree(folder, target))


def test_a_lengthened_run_ends_as_one_that_was_never_short(short, tiny_dataset, tmp_path):
    folder = copy(short, tmp_path / "run")
    assert lengthen(folder, LONG)
    summary = loop.train(LONG, folder.path, dataset=tiny_dataset)
    # A step schedule whose milestones do not depend on the length.
    assert summary["params_sha256"] == loop.train(LONG, tmp_path / "whole", dataset=tiny_dataset)["params_sha256"]
    kept = folder.path / "before-1-epochs"
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        assert (kept / name).read_bytes() == (short / name).read_bytes()
    marks = json.loads((folder.path / "setting.json").read_text())["lengthened"]
    assert marks == [{"from_epochs": 1, "after_epochs": 1}]
    assert not lengthen(folder, LONG) and folder.summary() == summary


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(LONG, learning_rate=0.2), "learning_rate is 0.1, not 0.2"),
        (dataclasses.replace(LONG, seed=4), "seed is 0, not 4"),
        (dataclasses.replace(SHORT, lr_milestones=(3,)), "expected more of them, not 1"),
    ],
    ids=["another rate", "another seed", "no more epochs"],
)
def test_nothing_else_may_change(short, tmp_path, config, message):
    folder = copy(short, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.path.glob("*.json*")}
    with pytest.raises(ValueError, match=message):
        lengthen(folder, config)
    assert {path.name: path.read_bytes() for path in folder.path.glob("*.json*")} == before


def test_milestones_of_epochs_that_are_trained_stay(tiny_dataset, tmp_path):
    config = dataclasses.replace(SHORT, epochs=3, lr_milestones=(1,))
    loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the 3 epochs that are trained had \(1,\)"):
        lengthen(folder, dataclasses.replace(config, epochs=4, lr_milestones=(2,)))
    assert lengthen(folder, dataclasses.replace(config, epochs=4, lr_milestones=(1, 3)))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        lengthen(RunFolder(tmp_path), LONG)


def test_a_run_that_ended_with_averaged_weights_cannot_go_on(tiny_dataset, tmp_path):
    config = dataclasses.replace(SHORT, ema_epochs=1)
    loop.train(config, tmp_path / "run", dataset=tiny_dataset)
    with pytest.raises(ValueError, match="ended with averaged weights"):
        lengthen(RunFolder(tmp_path / "run"), dataclasses.replace(config, epochs=2))
