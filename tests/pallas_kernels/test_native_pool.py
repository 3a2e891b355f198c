"""The pool's helpers, shared by several callers, under the thread sanitizer."""

import pathlib
import shutil
import subprocess

import pytest

from pallas_kernels.native import build

SOURCE = pathlib.Path(__file__).parent / "native" / "pool.cc"


def test_helpers_do_everything_once(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    flags = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wall", "-Wextra", "-Werror")
    program = tmp_path / "pool"
    command = ["g++", *flags, f"-I{build.HERE}", SOURCE, "-o", program]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    # Shadow memory wants addresses that are not drawn.
    done = subprocess.run(["setarch", "-R", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), (done.stdout + done.stderr)[-4000:]
