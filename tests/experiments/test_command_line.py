"""The command line: what a user gets wrong ends in one clear sentence and exit code 2."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import clicktrain_jax
from experiments import configs
from experiments.__main__ import main
from experiments.commands import COMMANDS, runs
from experiments.commands.arguments import PROGRAM
from experiments.records import RunFolder
from experiments.report import results

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


BENCHES = "steps step loop selection conv gpu deploy dtypes sizes torch collectives latency input"
HELP = [*([name] for name in COMMANDS), *(["bench", what] for what in BENCHES.split()), ["train", "digits-dense"]]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_works_behind_every_command(command, capsys):
    code, out, err = run([*command, "--help"], capsys)
    assert not code and not err
    # The command's own, not that of the program.
    assert out.startswith(f"usage: {PROGRAM} {' '.join(command)}")


def test_the_overview_names_every_command_and_bench(capsys):
    _, out, _ = run(["--help"], capsys)
    assert all(f"\n  {name}" in out for name in COMMANDS)
    _, benches, _ = run(["bench", "--help"], capsys)
    assert all(f"\n  {what[1]} " in benches for what in HELP if len(what) == 2 and what[0] == "bench")


def test_the_usage_of_what_reads_images_names_where_they_are(capsys):
    _, out, _ = run(["--help"], capsys)
    for command in ("evaluate PATH", "export RUN", "train NAME", "bench dtypes RUN"):
        line = next(line for line in out.splitlines() if line.strip().startswith(command))
        assert "--data.dir" in line


def test_the_version(capsys):
    assert run(["--version"], capsys)[:2] == (0, f"clicktrain-jax {clicktrain_jax.__version__}\n")


def test_a_missing_package_names_its_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, _, err = run(["train", "digits-dense", "--width", "0.125", "--loop.tensorboard"], capsys)
    assert (code, err) == (2, "error: tensorboardX is not installed: pip install 'clicktrain-jax[tensorboard]'\n")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, err = run(["train", "digits-dense"], capsys)
    assert code == 2 and "pip install 'clicktrain-jax[experiments]'" in err
    monkeypatch.setitem(sys.modules, "tyro", None)
    for module in [name for name in sys.modules if name.startswith("experiments.commands")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("experiments.commands")
    code, _, err = run(["list"], capsys)
    assert (code, err) == (2, "error: tyro is not installed: pip install 'clicktrain-jax[experiments]'\n")


def test_a_long_run_says_so_before_it_starts(capsys):
    runs._say_if_long(configs.get("digits-dense"), done=0)
    assert capsys.readouterr().err == ""
    long = configs.get("vgg16-cifar10-8.8x")
    runs._say_if_long(long, done=0)
    found = re.match(rf"{long.name} takes about ([\d,.]+) h on this machine \(", capsys.readouterr().err)
    runs._say_if_long(long, done=long.epochs // 2)
    half = re.search(r"about ([\d,.]+) h", capsys.readouterr().err)
    whole, rest = (float(one[1].replace(",", "")) for one in (found, half))
    assert whole > 10 and rest == pytest.approx(whole / 2, rel=0.01)


def test_a_budget_shows_its_plan_on_any_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(["table", "--budget", "gpu-30min", "--dry-run"], capsys)
    assert code == 0, err
    assert "vgg13-cifar10-9.0x" in out and "runs done" in out and "30 minutes would be spent" in out
    assert not list(tmp_path.iterdir())
    code, _, err = run(["table", "--dry-run"], capsys)
    assert code == 2 and "--dry-run are for --budget" in err


def test_tables_without_records_say_where_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RECORDS", tmp_path / "nowhere")
    code, _, err = run(["table"], capsys)
    assert code == 2 and "checkout" in err


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
    assert "epoch 1/1" not in err  # the tiny config asks for no progress
    code, _, err = run(["train", "tiny-dense", "--workdir", folder, "--seed", "4"], capsys)
    assert code == 2 and "another config: seed is 3 there and 4 here" in err
    asked = ["train", "tiny-dense", "--workdir", folder, "--seed", "3"]
    code, out, _ = run(asked, capsys)
    assert code == 0 and "is finished: all 1 epochs were trained before" in out
    code, _, err = run([*asked, "--epochs", "2"], capsys)
    assert code == 2 and "--lengthen gives it more epochs" in err
    code, out, err = run([*asked, "--epochs", "2", "--lengthen", "--loop.progress"], capsys)
    assert code == 0 and "is finished" not in out and "epoch 2/2" in err
    # What was there is kept, and giving the command again changes nothing.
    assert (Path(folder) / "before-1-epochs" / "summary.json").exists()
    code, out, _ = run([*asked, "--epochs", "2", "--lengthen"], capsys)
    assert code == 0 and "is finished: all 2 epochs" in out
    # A broken checkpoint is one warning, and nobody else's traceback.
    for path in (Path(folder) / "checkpoints" / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:100])
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "evaluate", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "after 1 of 2 epochs" in done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("warning: checkpoint 2 in ")


def test_list_names_every_config_with_the_time_that_it_takes(capsys):
    code, out, _ = run(["list"], capsys)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name in configs.all_configs():
        assert re.search(r" ~?[\d.,]+ (h|min) ", lines[name]), lines[name]
    # Seconds of the digits, days of ImageNet's nets.
    assert "min" in lines["digits-dense"] and " h " in lines["vgg16-cifar10-8.8x"]
    assert "of this machine" in lines["Time"]


def test_list_takes_a_word(capsys):
    code, out, _ = run(["list", "resnet32"], capsys)
    names = [line.split()[0] for line in out.splitlines()[1:-2]]
    assert code == 0 and names and all("resnet32" in name for name in names)
    code, _, err = run(["list", "mobilenet"], capsys)
    assert code == 2 and "no recipe has 'mobilenet'" in err


def test_images_are_found_where_the_run_found_them(tmp_path, monkeypatch):
    there, folder = tmp_path / "images", RunFolder(tmp_path / "run")
    there.mkdir()
    config = configs.get("vgg13-cifar10-9.0x")
    monkeypatch.setenv("TFDS_DATA_DIR", str(there))
    folder.open(config, "fingerprint")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert folder.data(config).dir == str(there)
    assert str(there) not in (folder.path / "setting.json").read_text()
    # A relative folder, asked for from another one.
    monkeypatch.chdir(tmp_path)
    near = dataclasses.replace(config, data=dataclasses.replace(config.data, dir="images"))
    folder.open(near, "fingerprint")
    monkeypatch.chdir(there)
    assert folder.data(near).dir == str(there)
    # Gone: where the config looks for them.
    there.rmdir()
    assert folder.data(near).dir == "images"


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0 and "train NAME" in done.stdout


def test_help_names_every_field(tiny_config, capsys):
    code, out, _ = run(["train", "tiny", "--help"], capsys)
    assert code == 0
    for field in dataclasses.fields(configs.TrainConfig):
        assert field.name.replace("_", "-") in out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_a_sentence_in_any_encoding(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "export"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    said = "error: Missing from python -m experiments export: RUN the run folder. (required) (all fields: "
    assert done.returncode == 2 and done.stderr.startswith(said), done.stderr
