"""What a run tells while it trains, and the hook that is told."""

import dataclasses
import re
import sys

import pytest
import tiny

from experiments.records import read_metrics
from experiments.train import loop
from experiments.train.step import Trainer


def changed_loop(**fields):
    return dataclasses.replace(tiny.CONFIG, loop=dataclasses.replace(tiny.CONFIG.loop, **fields))


@pytest.fixture(scope="module")
def told(tiny_trainer, tmp_path_factory):
    """A whole run that a hook listens to: its folder, summary and what the hook was told."""
    folder, lines = tmp_path_factory.mktemp("hooked") / "run", []
    return folder, loop.train(tiny.CONFIG, folder, trainer=tiny_trainer, on_epoch=lines.append), lines


def test_a_hook_is_told_every_epoch(told):
    folder, summary, lines = told
    assert [{**line, "layers": None} for line in lines] == [line | {"layers": None} for line in read_metrics(folder)]
    assert [line["phases"][-1] for line in lines] == ["dense", "regularize", "regularize", "pruned", "pruned"]
    # Cosine to zero: the rate of an epoch's last update.
    rates = [line["learning_rate"] for line in lines]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.01 < rates[0]
    assert [round(line["sparsity"], 2) for line in lines[:3]] == [0, 0, 0]
    assert lines[-1]["sparsity"] == pytest.approx(1 - 1 / summary["conv_compression"])
    layers = {layer["name"]: layer for layer in summary["layers"]}
    for name, share in lines[-1]["layers"].items():
        height, width, cin, cout = layers[name]["shape"]
        assert share == pytest.approx(1 - layers[name]["retained"] / (height * width * cin * cout))


def test_a_hook_stops_a_run_which_is_saved_and_goes_on(told, tiny_trainer, tmp_path):
    folder = tmp_path / "run"
    config = changed_loop(checkpoint_every_epochs=5)
    trainer = tiny_trainer
    summary = loop.train(config, folder, trainer=trainer, on_epoch=lambda line: line["epoch"] == 1)
    assert summary["stopped_after_epochs"] == 2 and not (folder / "summary.json").exists()
    assert summary["final_top1"] == told[2][1]["eval_top1"]
    assert loop.train(config, folder, trainer=trainer)["params_sha256"] == told[1]["params_sha256"]


def test_what_a_hook_raises_comes_through_after_the_epoch_is_saved(told, tiny_trainer, tmp_path):
    class Pruned(Exception):
        """As Optuna's TrialPruned."""

    def hook(line):
        if line["epoch"] == 2:
            raise Pruned

    config = changed_loop(checkpoint_every_epochs=5)
    with pytest.raises(Pruned):
        loop.train(config, tmp_path / "run", trainer=tiny_trainer, on_epoch=hook)
    seen = []
    loop.train(config, tmp_path / "run", trainer=tiny_trainer, on_epoch=lambda line: seen.append(line["epoch"]))
    assert seen == [3, 4]


def test_a_line_an_epoch_where_nobody_sees_a_bar(told, tiny_trainer, tmp_path, capsys):
    loop.train(changed_loop(progress=True), tmp_path / "run", trainer=tiny_trainer)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    form = r"tiny seed 0: epoch 4/5, prune\+pruned, loss \d\.\d{4}, top-1 \d+\.\d\d, sparsity (\S+)%, [\d,]+ images/s, "
    found = re.match(form + r"\d+:\d\d left", lines[3])
    assert found and float(found[1]) == pytest.approx(100 * told[2][3]["sparsity"], abs=0.1)
    assert lines[-1].endswith(" 0:00 left")


def test_a_bar_names_epoch_and_phase(tiny_trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    loop.train(changed_loop(progress=True), tmp_path / "run", trainer=tiny_trainer)
    said = capsys.readouterr().err
    assert "tiny seed 0, epoch 1/5, dense" in said and "tiny seed 0, epoch 2/5, select" in said
    assert "images/s" not in said and "25/25" in said


def test_tensorboard_gets_phase_rate_and_sparsity_by_layer(tiny_dataset, tmp_path, monkeypatch):
    tensorboardX = pytest.importorskip("tensorboardX")  # noqa: N806  (its name)
    written = {}
    monkeypatch.setattr(
        tensorboardX.SummaryWriter,
        "add_scalar",
        lambda self, key, value, step: written.setdefault(key, []).append((step, value)),
    )
    config = dataclasses.replace(changed_loop(tensorboard=True), method=None, mixup_epoch=None, epochs=2)
    loop.train(config, tmp_path / "run", trainer=Trainer(config, tiny_dataset))
    assert written["phase"] == [(0, 0.0), (1, 0.0)]
    assert {"learning_rate", "sparsity", "train_loss", "sparsity/Conv_1/kernel"} <= written.keys()
