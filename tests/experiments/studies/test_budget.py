"""The plan of full runs: its order, its estimates, its budget, and going on where it stopped."""

import dataclasses
import json
import os
import signal
import time

import pytest
import tiny

from experiments import configs
from experiments.__main__ import main
from experiments.configs import to_dict
from experiments.records import RUNS, RunFolder, kept, setting
from experiments.report import pace
from experiments.studies import budget as budgets
from experiments.train import loop
from experiments.train.signals import heeded
from experiments.train.step import Trainer

H200 = {"device": {"platform": "gpu", "kind": "NVIDIA H200", "count": 1}, "cpu": {"model": "A CPU", "cores": 16}}
HERE = {"device": {"platform": "cpu", "kind": "cpu", "count": 1}, "cpu": {"model": "A CPU", "cores": 2}}


def summary_of(config, seconds=10.0):
    return {
        "name": config.name,
        "net": config.net,
        "seed": config.seed,
        "epochs": config.total_epochs,
        "final_top1": 0.9,
        "train_examples": 100,
        "train_seconds": seconds,
        "train_and_compile_seconds": seconds,
        "eval_seconds": 0.0,
    }


def record_of(config, seconds=10.0, where=H200):
    plain = json.loads(json.dumps(to_dict(config)))
    return summary_of(config, seconds) | {"setting": where, "config": plain, "group": "published"}


class Trained:
    """Stands in for the loop: leaves a finished run's files, and counts."""

    def __init__(self, error=None):
        self.names, self.error = [], error

    def __call__(self, config, folder):
        self.names.append(folder.name)
        if self.error is not None and len(self.names) == 1:
            raise self.error
        run = RunFolder(folder)
        run.open(config, "no images")
        run.append_metrics({"epoch": 0})
        run.write_summary(summary_of(config))
        return run.summary()


@pytest.fixture
def entries():
    return [budgets.Entry(tiny.changed(seed=seed), "tiny-group") for seed in (0, 1)]


def run(entries, tmp_path, budget="cpu-1min", **options):
    lines = []
    options = {"margin_s": 0.0, "records": tmp_path / "records", "say": lines.append} | options
    return budgets.run(budget, tmp_path / "runs", entries=entries, **options), lines


def test_the_order_of_worth():
    entries = budgets.plan("gpu")
    names = [entry.config.name for entry in entries if entry.config.seed == 0]
    places = [
        names.index(name)
        for name in (
            "vgg13-cifar10-dense",
            "compare-vgg13-narrow-0.5",
            "vgg13-cifar10-4.0x",
            "vgg13-cifar10-6.2x",
            "vgg13-cifar10-9.0x",
            "vgg11-cifar10-dense",
            "vgg11-cifar10-8.7x",
            "vgg11-cifar10-10.3x",
            "compare-vgg13-rewind-60",
            "compare-vgg13-prunetrain-0.2",
            "vgg16-cifar10-dense",
            "resnet32_wide-cifar10-dense",
            "resnet50_cifar-cifar10-dense",
        )
    ]
    assert places == sorted(places) and len(set(names)) == len(names)
    assert all(entry.config.epochs == 190 and entry.config.precision == "bfloat16" for entry in entries)
    assert len({entry.name for entry in entries}) == len(entries)
    assert [entry.config.seed for entry in entries] == sorted(entry.config.seed for entry in entries)


def test_the_cpu_plan_pairs_seeds():
    names = [entry.name for entry in budgets.plan("cpu")]
    assert names[:2] == ["slim-vgg11-cifar10-dense-seed0", "slim-vgg11-cifar10-8.6x-seed0"] and len(names) == 10
    with pytest.raises(ValueError, match="kind='tpu'"):
        budgets.plan("tpu")


@pytest.mark.parametrize("budget", ["30", "gpu-30", "tpu-30min", "gpu-0min", "gpu--3min", ""])
def test_budgets_of_another_form_are_refused(budget):
    with pytest.raises(ValueError, match="expected KIND-Nmin"):
        budgets.parse(budget)


def test_budgets():
    assert budgets.parse("gpu-30min") == ("gpu", 30.0) and budgets.parse("cpu-0.5min") == ("cpu", 0.5)


def test_an_estimate_from_multiply_adds_by_hand():
    config = configs.get("vgg13-cifar10-dense")
    work = budgets.planned_multiply_adds(config)
    # Per image: 1.8 M of the first layer and the rest as 3x3 convolutions of halving sizes; known to be 228 M.
    assert work == 3 * 50_000 * 190 * 228_261_888
    seconds = budgets.estimate_seconds(config, "gpu", "NVIDIA H200", [], 16)
    assert seconds == pytest.approx(2 * work / (0.15 * 989e12) + pace.COMPILE_S)
    assert budgets.estimate_seconds(config, "gpu", "A card", [], 16) > seconds
    assert budgets.estimate_seconds(config, "cpu", "cpu", [], 2) == pytest.approx(work / 4e10 + pace.COMPILE_S)


def test_records_take_the_place_of_assumptions():
    dense, pruned, other = (
        configs.get(f"{name}") for name in ("vgg13-cifar10-dense", "vgg13-cifar10-9.0x", "vgg11-cifar10-dense")
    )
    found = [record_of(dense, 80.0)]
    assert budgets.estimate_seconds(dense, "gpu", "NVIDIA H200", found, 16) == 80.0
    assert budgets.estimate_seconds(pruned, "gpu", "NVIDIA H200", found, 16) == pytest.approx(80.0)
    share = budgets.planned_multiply_adds(other) / budgets.planned_multiply_adds(dense)
    assert budgets.estimate_seconds(other, "gpu", "NVIDIA H200", found, 16) == pytest.approx(80.0 * share)


def test_what_is_done_and_missing_is_said(tmp_path):
    entries = budgets.plan("gpu")[:3]
    dense, narrow, _ = (entry.config for entry in entries)
    begun = tmp_path / entries[1].name
    begun.mkdir()
    (begun / "metrics.jsonl").write_text("".join(f'{{"epoch": {epoch}}}\n' for epoch in range(95)))
    found = [record_of(dense), record_of(entries[2].config, where=HERE)]
    standing = budgets.standings("gpu", entries, tmp_path, found, H200)
    # A CPU's record does not do for a GPU's.
    assert [one.finished for one in standing] == [True, False, False]
    assert [one.epochs_done for one in standing] == [190, 95, 0]
    assert standing[1].seconds_left == pytest.approx(
        budgets.estimate_seconds(narrow, "gpu", "NVIDIA H200", found[:1], 16) / 2
    )
    text = budgets.describe(standing)
    assert "done: top-1 90.00" in text and "95 of 190 epochs" in text and "missing" in text
    assert "1 of 3 runs done" in text


def test_what_is_missing_is_trained_once_and_collected(entries, tmp_path):
    train = Trained()
    result, lines = run(entries, tmp_path, train=train)
    assert train.names == ["tiny-seed0", "tiny-seed1"]
    assert result == {"finished": 2, "missing": 0, "failed": {}, "collected": 2}
    assert [run["seed"] for run in kept(tmp_path / "records" / "tiny-group" / RUNS)] == [0, 1]
    assert "0 of 2 runs done" in lines[0]
    again, _ = run(entries, tmp_path, train=train)
    assert len(train.names) == 2 and again["finished"] == 2


def test_a_run_that_fails_does_not_stop_the_others(entries, tmp_path):
    train = Trained(ValueError("no images here"))
    result, lines = run(entries, tmp_path, train=train)
    assert train.names == ["tiny-seed0", "tiny-seed1"]
    assert result["failed"] == {"tiny-seed0": "no images here"} and result["finished"] == 1 and result["missing"] == 0
    assert any("failed: no images here" in line for line in lines)


def test_no_run_is_begun_when_the_budget_is_over(entries, tmp_path):
    train = Trained()
    result, _ = run(entries, tmp_path, "cpu-0.1min", train=train, margin_s=6.0)
    assert train.names == [] and result["missing"] == 2 and result["collected"] == 0


def test_the_deadline_is_heard_by_a_loop_that_listens_late():
    """The loop takes signals only once it trains; the deadline comes before, and again after."""
    deadline = budgets._Deadline()
    before = signal.getsignal(signal.SIGTERM)
    with deadline.after(0.01):
        while not deadline.passed:
            time.sleep(0.01)
        with heeded() as stop:
            for _ in range(500):
                if stop.signal_number is not None:
                    break
                time.sleep(0.01)
    assert stop.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_of_somebody_else_is_theirs():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        deadline = budgets._Deadline()
        with deadline.after(600.0):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert heard == [signal.SIGTERM] and not deadline.passed
    finally:
        signal.signal(signal.SIGTERM, before)


def test_interrupted_by_somebody_else_it_stops(entries, tmp_path):
    with pytest.raises(loop.Interrupted):
        run(entries, tmp_path, train=Trained(loop.Interrupted(signal.SIGINT, 3)))


def test_a_run_of_which_no_epoch_fits_is_given_up(entries, tmp_path):
    names = []

    def train(config, folder):
        names.append(folder.name)
        if folder.name == "tiny-seed1":
            return Trained()(config, folder)
        time.sleep(0.1)
        raise loop.Interrupted(signal.SIGTERM, 0)

    result, _ = run(entries, tmp_path, train=train, piece_s=0.05)
    assert names == ["tiny-seed0", "tiny-seed0", "tiny-seed1"] and result["finished"] == 1
    assert "no epoch of it fits" in result["failed"]["tiny-seed0"]


@pytest.mark.slow
def test_a_run_cut_into_pieces_ends_with_the_bits_of_a_whole_one(tiny_dataset, tmp_path, monkeypatch):
    """The real loop: every piece ends in its first epoch, is saved, and the next goes on."""
    monkeypatch.setattr(budgets, "_AGAIN_S", 0.02)
    config = tiny.changed(method=None, epochs=3, mixup_epoch=None)
    trainer = Trainer(config, tiny_dataset)
    whole = loop.train(config, tmp_path / "whole", trainer=trainer)
    pieces = []

    def train(config, folder):
        class Slow:
            """The trainer, an epoch of it being one program, in the middle of which the deadline comes."""

            def __getattr__(self, name):
                return getattr(trainer, name)

            def run_epoch(self, state, epoch, seed, on_step):
                ended = trainer.run_epoch(state, epoch, seed)
                time.sleep(0.3)
                return ended

        pieces.append(folder)
        return loop.train(config, folder, trainer=Slow())

    entry = budgets.Entry(config, "tiny-group")
    result, lines = run([entry], tmp_path, "cpu-100min", train=train, piece_s=0.2)
    assert result["finished"] == 1 and len(pieces) == 3
    saved = [line for line in lines if "saved" in line]
    assert saved == [f"tiny-seed0: {epochs} of 3 epochs saved" for epochs in (1, 2, 3)]
    [collected] = kept(tmp_path / "records" / "tiny-group" / RUNS)
    assert collected["summary"]["params_sha256"] == whole["params_sha256"]


@pytest.mark.skipif(setting()["device"]["platform"] != "cpu", reason="this machine has a GPU, which is not refused")
def test_a_gpu_budget_without_a_gpu_is_refused_in_a_sentence(tmp_path, capsys):
    code = main(["table", "--budget", "gpu-30min", "--workdir", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: --budget gpu-30min: jax sees no GPU") and "cpu-30min" in said
    assert not (tmp_path / "runs").exists()


def test_the_command_hands_everything_on(monkeypatch, tmp_path, capsys):
    asked = []

    def stand_in(*arguments, **options):
        asked.append((arguments, options))
        return {"finished": 1, "missing": 2, "failed": {}, "collected": 1}

    monkeypatch.setattr(budgets, "run", stand_in)
    code = main(["table", "--budget", "cpu-10min", "--data.dir", "here", "--workdir", str(tmp_path)])
    assert code == 0 and asked == [(("cpu-10min", tmp_path), {"data_dir": "here"})]
    assert "1 runs finished, 2 to do; 1 records collected" in capsys.readouterr().out
    assert main(["table", "--data.dir", "here"]) == 2
    assert "are for --budget" in capsys.readouterr().err


def test_places_of_images_are_not_part_of_a_run(entries, tmp_path):
    seen = []

    def train(config, folder):
        seen.append(config.data.dir)
        return Trained()(dataclasses.replace(config, data=tiny.CONFIG.data), folder)

    run(entries, tmp_path, train=train, data_dir="somewhere")
    assert seen == ["somewhere"] * 2
