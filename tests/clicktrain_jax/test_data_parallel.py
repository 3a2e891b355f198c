"""Several devices choose the masks that one device chooses, and hold the same zeros."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def script(name):
    return ["-W", "error", str(HERE / f"{name}.py")]


# One optimizer on every mesh, the others on one each.
CASES = "devices and (momentum or (adamw and 2) or (multi and 4 and not auto))"
CONTRACT = ["-m", "pytest", "-q", "-k", CASES, str(HERE / "test_transform_contract.py")]


@pytest.mark.parametrize(
    ("arguments", "devices", "says"),
    [
        (script("two_devices"), 2, "two devices agree"),
        pytest.param(script("meshes"), 4, "all meshes agree", marks=pytest.mark.slow),
        (script("reductions"), 4, "what is retained travels"),
        (CONTRACT, 4, "30 passed"),
    ],
    ids=["two devices", "meshes", "reductions", "contract"],
)
def test_devices(arguments, devices, says):
    # The number of CPU devices is fixed when jax starts: a process of its own.
    settings = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert says in done.stdout
