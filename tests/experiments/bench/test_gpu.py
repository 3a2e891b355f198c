"""What spends a GPU's time: its order, going on, and everything once at a tiny size."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.bench import gpu as bench_gpu
from experiments.bench import gpu_measures
from experiments.bench.device_time import read_trace
from experiments.configs import price, to_dict
from experiments.configs.work import conv_work
from experiments.records import RUNS, keep
from experiments.report import gpu

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).resolve().parents[3]


def names(kind, seed=0):
    return [item.name for item in bench_gpu.items(seed) if item.kind == kind]


def test_the_most_worthwhile_comes_first():
    kinds = list(dict.fromkeys(item.kind for item in bench_gpu.items()))
    assert kinds == ["steps", "runs", "convolutions", "measures"]
    assert names("steps") == ["steps-512-64x64", "steps-128-64x64", "steps-512-64x16"]
    assert names("runs", 3)[0] == "price-vgg13-dense-seed3" and names("runs")[-1] == "vgg13-cifar10-own-9.0x-seed0"
    assert names("measures") == list(gpu_measures.MEASURES)


def test_kernels_of_a_trace_by_hand():
    def event(name, pid, tid, dur):
        return {"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": dur}

    def named(kind, pid, name, tid=0):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    events = [
        named("process_name", 1, "/device:GPU:0"),
        named("thread_name", 1, "Stream #13(Compute)", 7),
        named("thread_name", 1, "XLA Ops", 8),
        named("process_name", 2, "/host:CPU"),
        named("thread_name", 2, "Stream of thoughts", 7),
        event("conv", 1, 7, 30.0),
        event("conv", 1, 7, 10.0),
        event("add", 1, 7, 4.0),
        event("conv", 1, 8, 99.0),
        event("conv", 2, 7, 99.0),
    ]
    found = read_trace(events, 4)
    assert found.micros == {"conv": 10.0, "add": 1.0} and found.counts == {"conv": 0.5, "add": 0.25}
    assert found.record(1) == {"device_ms": 0.011, "kernels": 0.75, "longest": [["conv", 10.0, 0.5]]}
    assert read_trace([], 1).milliseconds is None


def test_narrow_nets_have_as_much_as_they_are_asked_for():
    for which, what in enumerate(("weights", "multiply-adds")):
        whole = conv_work("vgg13", 1.0)[which]
        for share in (1.0, 0.24, 1 / 9):
            config = price.narrow(what, round(share * whole))
            # A width's step of a 64th changes this net by so much at most.
            assert conv_work("vgg13", config.width)[which] == pytest.approx(share * whole, rel=0.06)
    with pytest.raises(ValueError, match="what='filters'; expected one of"):
        price.narrow("filters", 1)
    with pytest.raises(ValueError, match="amount=0 weights; expected 1 to 9402048"):
        price.narrow("weights", 0)


def test_what_has_a_record_is_skipped_and_what_is_not_reached_is_named(tmp_path, capsys):
    for name in names("steps")[:2]:
        (tmp_path / f"{name}.json").write_text(json.dumps({"ok": True}))
    assert main(["bench", "gpu", "--out", str(tmp_path), "--only", "^steps-", "--seconds", "1"]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 items are done already" in out and "not reached: steps-512-64x16;" in out
    with tarfile.open(tmp_path / bench_gpu.ARCHIVE) as tar:
        assert sorted(tar.getnames()) == sorted(f"{name}.json" for name in names("steps")[:2])


def test_a_run_without_images_is_recorded_as_failed(tmp_path, capsys):
    item = next(item for item in bench_gpu.items() if item.name == "price-vgg13-dense-seed0")
    assert bench_gpu.main(["--out", str(tmp_path), "--here", item.name]) == 1
    assert "give --data.dir an archive" in json.loads((tmp_path / f"{item.name}.json").read_text())["error"]
    assert not bench_gpu.is_done(item, tmp_path)
    with pytest.raises(ValueError, match="no item 'nothing'; expected one of steps-512-64x64"):
        bench_gpu.main(["--out", str(tmp_path), "--here", "nothing"])


def test_tables_of_runs_that_ended_and_that_did_not(tmp_path):
    assert gpu.price_section(tmp_path) == "" and gpu.benchmarks(tmp_path) == ""
    setting = {
        "date": "2026-11-27T10:00:00+00:00",
        "device": {"kind": "A card"},
        "driver": "1.2",
        "commit": "abc",
        "versions": {"jax": "0.11.2"},
        "python": "3.12.3",
        "runs_at_once": 2,
    }
    summary = {
        "net": "vgg13",
        "dataset": "cifar10",
        "encoding": "png",
        "epochs": 60,
        "eval_split": "test",
        "retained_multiply_adds": 228_261_888,
        "conv_retained": 9_402_048,
        "train_seconds": 50.0,
        "compile_seconds": 9.0,
        "pruned_convolution": None,
    }
    dense, *_, narrow = price.configs()
    for config, seed, epochs in ((dense, 0, 60), (dense, 1, 60), (narrow, 0, 50)):
        lines = [{"epoch": epoch - 1, "eval_top1": 0.9 + seed / 100} for epoch in (40, 50, 60) if epoch <= epochs]
        keep(
            tmp_path / RUNS,
            [
                {
                    "name": config.name,
                    "seed": seed,
                    "config": to_dict(config),
                    "setting": setting,
                    "metrics": lines,
                    "summary": summary if epochs == 60 else None,
                }
            ],
        )
    text = gpu.price_section(tmp_path)
    assert "Up to 2 runs shared the card" in text and "A card, driver 1.2" in text
    lines = [line for line in text.splitlines() if line.startswith("| price")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["price-vgg13-dense", "2", *["90.50 ± 0.71"] * 2, "1.00x", "50 ± 0"]
    assert rows[1][:5] == ["price-vgg13-narrow-weights, width 0.328", "1", "90.00", "", "9.42x"]
    wide = list(csv.DictReader(io.StringIO(gpu.price_csv(tmp_path))))
    assert [row["after 40 epochs"] for row in wide] == ["90.50 ± 0.71", "90.00"] and wide[0]["compiling s"] == "9 ± 0"


def smoke(tmp_path, only, *, seconds, at_once="2"):
    """The command in a process that has nothing but what it may count on."""
    block = tmp_path / "block"
    block.mkdir(exist_ok=True)
    missing = ("tyro", "tensorflow_datasets", "array_record", "matplotlib")
    (block / "sitecustomize.py").write_text(f"import sys\nfor name in {missing}:\n    sys.modules[name] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{block}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments", "bench", "gpu", "--out", str(tmp_path), "--smoke", "--only", only]
    return subprocess.run(
        [*command, "--seconds", str(seconds), "--at-once", at_once],
        env=environment,
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_run_and_the_narrow_net_that_waits_for_it(tmp_path):
    only = "^price-vgg13-(own-9.0x-1x1|narrow-multiply)"
    done = smoke(tmp_path, only, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    pruned, narrow = (
        tmp_path / "runs" / f"{name}-seed0" for name in ("price-vgg13-own-9.0x-1x1", "price-vgg13-narrow-multiply-adds")
    )
    assert json.loads((pruned / "setting.json").read_text())["runs_at_once"] == 2
    assert json.loads((pruned / "summary.json").read_text())["conv_compression"] > 3.5
    with tarfile.open(tmp_path / bench_gpu.ARCHIVE) as tar:
        lines = tar.extractfile(RUNS).read().decode().splitlines()
    assert {json.loads(line)["name"] + "-seed0" for line in lines} == {pruned.name, narrow.name}
    assert "2 of 2 items are done already" in smoke(tmp_path, only, seconds=300).stdout


@pytest.mark.slow
def test_steps_and_convolutions_at_a_tiny_size(tmp_path):
    done = smoke(tmp_path, "^steps-|^conv-device", seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "steps-512-64x64.json").read_text())["steps"]
    assert [row["way"] for row in rows] == ["pattern", "dense"] and all(row["ms"] > 0 for row in rows)
    # No profiler sees a GPU here.
    assert all(row["device_ms"] is None for row in rows)
