"""Two real processes on loopback are one run; whatever is wrong with one is said by both, and nobody waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from experiments.configs import to_dict
from experiments.data import DataConfig, load
from experiments.records import read_metrics
from experiments.train import processes

ROOT = Path(__file__).parents[3]
FIELDS = (
    "train digits-clicktrain --width 0.125 --data.train-examples 70 --batch-size 32 --epochs 4 --loop.no-progress "
    "--method.select-epoch 1 --method.prune-epoch 2 --loop.checkpoint-every-epochs 1"
).split()


class Both:
    """Two processes of a command; their fields differ by what ``second`` adds to the second's."""

    def __init__(self, folder, cache, *fields, second=(), only=(0, 1)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        settings = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": ""}
        whole = [sys.executable, "-m", "experiments", *FIELDS, "--workdir", str(folder), *fields]
        whole += ["--loop.coordinator", f"localhost:{port}", "--loop.processes", "2", "--loop.process-id"]
        self.running = [
            subprocess.Popen(
                [*whole, str(process), *(second if process else ())],
                env=os.environ | settings,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for process in only
        ]

    def ended(self, seconds=500):
        """``(exit code, what it said)`` of each."""
        try:
            said = [process.communicate(timeout=seconds)[0] for process in self.running]
        finally:
            for process in self.running:
                process.kill()
        return [(process.returncode, text) for process, text in zip(self.running, said)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, for all processes."""
    return tmp_path_factory.mktemp("programs")


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_a_kill(tmp_path, cache):
    for code, text in Both(tmp_path / "two", cache).ended():
        assert code == 0, text[-3000:]
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "experiments", *FIELDS, "--workdir", str(tmp_path / "one")]
    subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, timeout=500)
    one, two = ([line["train_loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)
    masks = [json.loads((tmp_path / name / "summary.json").read_text())["masks_sha256"] for name in ("one", "two")]
    assert masks[0] == masks[1]

    longer, folder = ("--epochs", "30", "--method.prune-epoch", "3"), tmp_path / "killed"
    both = Both(folder, cache, *longer)
    while len(read_metrics(folder)) < 5 and both.running[0].poll() is None:
        time.sleep(0.1)
    os.kill(both.running[1].pid, signal.SIGKILL)
    start = time.monotonic()
    (code, text), _ = both.ended()
    assert code not in (0, None) and time.monotonic() - start < 60, text[-3000:]
    assert "another process of the run is gone" in text
    before = read_metrics(folder)[:4]
    for code, text in Both(folder, cache, *longer).ended():
        assert code == 0, text[-3000:]
    lines = read_metrics(folder)
    assert lines[:4] == before and [line["epoch"] for line in lines] == list(range(30))


@pytest.mark.slow
def test_killed_within_an_epoch_two_processes_that_stream_go_on_from_there(tmp_path, cache):
    files = tiny.as_files(tmp_path / "files", load(DataConfig("digits", train_examples=280)), 32)
    streamed = f"--data.name own --data.train-examples None --data.dir {files} --data.image-size 8".split()
    streamed += "--batch-size 4 --loop.checkpoint-every-steps 7".split()
    for code, text in Both(tmp_path / "whole", cache, *streamed).ended():
        assert code == 0, text[-3000:]
    # In the second epoch, of 70 updates.
    both, within = Both(tmp_path / "killed", cache, *streamed), tmp_path / "killed/within"
    while both.running[0].poll() is None and not any(int(path.name) > 90 for path in within.glob("[0-9]*[0-9]")):
        time.sleep(0.02)
    os.kill(both.running[1].pid, signal.SIGKILL)
    both.running[0].kill()
    both.ended()
    assert len(read_metrics(tmp_path / "killed")) == 1 and list(within.iterdir())
    for code, text in Both(tmp_path / "killed", cache, *streamed).ended():
        assert code == 0, text[-3000:]
    one, other = (read_metrics(tmp_path / name) for name in ("whole", "killed"))
    assert [line["train_loss"] for line in one] == [line["train_loss"] for line in other]
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert all(one[key] == other[key] for key in ("params_sha256", "masks_sha256"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "second", "says"),
    [
        (
            (),
            ("--learning-rate", "0.2"),
            "process 1 asks for another run than process 0: learning_rate is 0.2, not 0.1",
        ),
        (("--batch-size", "33"), (), "batch_size=33 cannot be divided over 2 devices"),
        (("--loop.devices", "1"), (), "loop.devices=1: 2 processes use all of their 2 devices"),
    ],
)
def test_what_cannot_be_is_refused_by_both(tmp_path, cache, fields, second, says):
    for code, text in Both(tmp_path / "run", cache, *fields, second=second).ended(120):
        assert code == 2 and says in text, text[-3000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_that_does_not_come_is_missed_within_a_minute(tmp_path, cache):
    start = time.monotonic()
    # Two runs, of which either process is missing, wait side by side.
    for run in [Both(tmp_path / str(process), cache, only=(process,)) for process in (0, 1)]:
        ((code, text),) = run.ended(120)
        assert code != 0 and time.monotonic() - start < 75, text[-3000:]


@pytest.fixture
def two(monkeypatch):
    """This process as the second of two; what the first one says is put into the list."""
    first = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "_exchange", lambda mine, seconds: [first.pop(0), mine])
    return first


def told(config):
    return {
        "config": json.loads(json.dumps(to_dict(config))),
        "jax": jax.__version__,
        "devices": 1,
        "--lengthen": False,
    }


def test_processes_ask_for_the_same_run(two, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    two += [told(tiny.CONFIG), told(tiny.changed(seed=3)), told(tiny.CONFIG) | {"jax": "0.0"}, told(tiny.CONFIG)]
    processes.check_config(tiny.CONFIG)
    with pytest.raises(ValueError, match="process 1 asks for another run than process 0: seed is 0, not 3"):
        processes.check_config(tiny.CONFIG)
    with pytest.raises(ValueError, match="process 1 has jax .*, process 0 has 0.0"):
        processes.check_config(tiny.CONFIG)
    with pytest.raises(ValueError, match="process 1 has --lengthen True, process 0 has False"):
        processes.check_config(tiny.CONFIG, lengthen=True)


def test_what_one_process_cannot_do_none_does(two):
    def missing():
        raise ValueError("no images here")

    two += [{"problem": None, "same": "a"}, {"problem": "gone", "same": None}, {"problem": None, "same": "a"}]
    with pytest.raises(ValueError, match="no images here"):
        processes.together(missing)
    with pytest.raises(ValueError, match="process 0: gone"):
        processes.together(lambda: "found", lambda found: "a")
    with pytest.raises(ValueError, match="process 1 has other images than process 0 .fingerprint b, not a"):
        processes.together(lambda: "found", lambda found: "b")


@pytest.mark.parametrize(
    "fields",
    [
        dict(coordinator="here:1"),
        dict(coordinator="here:1", processes=2, process_id=2),
        dict(coordinator="here", processes=2, process_id=0),
        dict(coordinator="auto", processes=2),
        dict(processes=2, process_id=0),
    ],
)
def test_half_an_address_is_refused(fields):
    with pytest.raises(ValueError, match="loop.coordinator=.* expected HOST:PORT"):
        type(tiny.CONFIG.loop)(**fields)
