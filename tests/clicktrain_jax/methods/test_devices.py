"""Several devices choose the masks that one device chooses, whatever the method."""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_two_devices():
    # The number of CPU devices is fixed when jax starts: a process of its own.
    settings = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[2]),
    }
    command = [sys.executable, "-W", "error", str(HERE / "devices.py")]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all methods agree"
