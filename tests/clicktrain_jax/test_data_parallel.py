"""Several devices choose the masks that one device chooses, and hold the same zeros."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "devices", "says"),
    [
        ("two_devices", 2, "two devices agree"),
        ("meshes", 4, "all meshes agree"),
        ("reductions", 4, "what is retained travels"),
    ],
)
def test_devices(script, devices, says):
    # The number of CPU devices is fixed when jax starts: a process of its own.
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, "-W", "error", str(HERE / f"{script}.py")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == says
