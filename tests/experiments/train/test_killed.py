"""kill -9 at random points over all phases: the run resumes and ends with the bits of an uninterrupted one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.records import read_metrics

_HERE = Path(__file__).parent
_KILLS = 21


def _run(folder, cache, *arguments):
    environment = os.environ | {
        "PYTHONPATH": f"{_HERE.parents[2]}{os.pathsep}{_HERE.parent}",
        # Compiled programs are shared between the processes: two dozen of them would compile for minutes.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(_HERE / "killed_run.py"), str(folder), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.slow
def test_killed_at_random_points_a_run_ends_with_the_same_bits(tmp_path):
    cache = tmp_path / "cache"
    uninterrupted = _run(tmp_path / "whole", cache)
    assert uninterrupted.returncode == 0, uninterrupted.stderr[-2000:]
    rng = np.random.default_rng()  # random on purpose: every run of this test tries other points
    fractions = rng.uniform(0, 1.2, _KILLS)
    # The select epoch, 14, and the prune epoch, 26, are among them.
    epochs = (*range(0, 28, 2), 29, 30, 31, 32, 33, 34, 36)
    kills = [f"{epoch}:{fraction}" for epoch, fraction in zip(epochs, fractions, strict=True)]
    killed = _run(tmp_path / "killed", cache, *kills)
    assert killed.returncode == 0, killed.stderr[-2000:]
    phases = set()
    for kill, said in zip(kills, killed.stdout.splitlines(), strict=True):
        code, whole_epochs = map(int, said.split())
        assert code == -signal.SIGKILL, f"{kill}: {killed.stderr[-2000:]}"
        phases.add("dense" if whole_epochs < 14 else "regularize" if whole_epochs < 26 else "pruned")
    assert len(kills) >= 20 and phases == {"dense", "regularize", "pruned"}
    resumed = _run(tmp_path / "killed", cache)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stdout == uninterrupted.stdout, f"kill points: {fractions.tolist()}"
    assert [line["epoch"] for line in read_metrics(tmp_path / "killed")] == list(range(64))
