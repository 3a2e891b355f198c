"""The command line: what a user gets wrong ends in one clear sentence and exit code 2."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from experiments import configs
from experiments.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny_config(monkeypatch):
    """The tiny config under a name of its own on the command line."""
    dense = tiny.changed(method=None, epochs=1, mixup_epoch=None)
    known = configs.all_configs() | {"tiny": tiny.CONFIG, "tiny-dense": dense}
    monkeypatch.setattr(configs, "all_configs", lambda: known)


def run(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # the argument parser's way of refusing
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ""),
        (["fly"], "unknown command 'fly'"),
        (["train"], "train needs a config NAME first"),
        (["train", "vgg99"], "unknown config 'vgg99'"),
        (["train", "tiny", "--colour", "3"], "--colour"),
        (["train", "tiny", "--epochs", "many"], "epochs"),
        (["train", "tiny", "--precision", "float8"], "precision"),
        (["train", "tiny", "--net", "vgg99"], "unknown net 'vgg99'"),
        (["train", "tiny", "--data.name", "mnist"], "mnist"),
        (["train", "tiny", "--method.fractions", "1.5"], "outside"),
        (["train", "tiny", "--method.fractions", "0.5", "0.5"], "has 2 values"),
        (["train", "tiny", "--method.select-epoch", "4"], "expected 0 <= select_epoch <= prune_epoch"),
        (["train", "tiny", "--dropout", "0.5"], "small has no dropout"),
        (["evaluate", "nowhere"], "nowhere is no run folder"),
        (["bench", "nothing"], "nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(tiny_config, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(arguments, capsys)
    assert code == 2
    # Long messages are wrapped in a box.
    assert message in " ".join((out + err).replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_said_at_once(tiny_config, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))
    code, _, err = run(["train", "vgg13-cifar10-9.0x", "--data.dir", str(tmp_path)], capsys)
    assert code == 2 and "data.dir" in err


def test_train_then_evaluate_then_refuse_another_config(tiny_config, capsys, tmp_path):
    folder = str(tmp_path / "run")
    code, out, err = run(["train", "tiny-dense", "--workdir", folder, "--seed", "3"], capsys)
    assert code == 0, err
    final = out.split("final ")[1].split(",")[0]
    code, out, err = run(["evaluate", folder], capsys)
    assert code == 0 and f"top-1 {final}" in out, err
    code, _, err = run(["train", "tiny-dense", "--workdir", folder, "--seed", "4"], capsys)
    assert code == 2 and "another config: seed is 3 there and 4 here" in err


def test_list_names_every_config(capsys):
    code, out, _ = run(["list"], capsys)
    assert code == 0
    assert all(name in out for name in configs.all_configs())


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )
    assert done.returncode == 0 and "train NAME" in done.stdout


def test_help_names_every_field(tiny_config, capsys):
    code, out, _ = run(["train", "tiny", "--help"], capsys)
    assert code == 0
    for field in dataclasses.fields(configs.TrainConfig):
        assert field.name.replace("_", "-") in out
