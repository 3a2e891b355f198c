"""The native kernels on drawn cases without Python: under sanitizers, by both compilers, on another processor.

`native/driver.cc` draws convolutions, normalisations and chains of layers, runs them with several threads and compares
with the definition.
"""

import pathlib
import platform
import shutil
import subprocess

import pytest

from pallas_kernels.native import build

pytestmark = pytest.mark.slow

DRIVER = pathlib.Path(__file__).parent / "native" / "driver.cc"
SOURCES = (*(build.HERE / name for name in ("plain.cc", "support.cc", "kernels.cc", "norm.cc", "chain.cc")), DRIVER)
FLAGS = ("-std=c++17", "-ffp-contract=fast", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{build.HERE}")
# Scratch memory is as large as asked for and not used again, so that what is read beyond its end, or before it is
# written, is seen.
MEMORY = ("-O1", "-g1", "-DCLICKTRAIN_CHECKED", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREADS = ("-O1", "-g1", "-fsanitize=thread")
HERE = build.instruction_sets_here()


def compiled(folder, compiler, *flags):
    """The driver; skips where there is no such compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    program = folder / "driver"
    command = [compiler, *FLAGS, *flags, *SOURCES, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " 0 of " in done.stdout
    return done.stdout


def flags_of(instructions):
    return build.instruction_sets()[instructions]


@pytest.mark.parametrize("instructions", HERE)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_drawn_convolutions(tmp_path, instructions, compiler):
    program = compiled(tmp_path, compiler, "-O2", *flags_of(instructions))
    assert run(program, "small", "1", "1000").startswith(instructions)
    run(program, "large", "1", "5")
    run(program, "norms", "1", "1000")
    run(program, "chains", "1", "1000")


@pytest.mark.parametrize("instructions", HERE)
def test_addresses_and_undefined_behaviour(tmp_path, instructions):
    program = compiled(tmp_path, "g++", *MEMORY, *flags_of(instructions))
    run(program, "small", "1", "300")
    run(program, "large", "1", "2")
    run(program, "norms", "1", "200")
    run(program, "chains", "1", "300")


@pytest.mark.parametrize("instructions", HERE)
def test_threads(tmp_path, instructions):
    program = compiled(tmp_path, "g++", *THREADS, *flags_of(instructions))
    # Shadow memory wants addresses that are not drawn.
    run("setarch", "-R", program, "small", "1", "60")
    run("setarch", "-R", program, "norms", "1", "60")
    run("setarch", "-R", program, "chains", "1", "100")


def test_on_aarch64(tmp_path):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this is such a processor: the other tests are of it")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64 here")
    program = compiled(tmp_path, "aarch64-linux-gnu-g++", "-O2", "-static")
    assert run("qemu-aarch64", program, "small", "1", "120").startswith("neon")
    run("qemu-aarch64", program, "norms", "1", "60")
    run("qemu-aarch64", program, "chains", "1", "60")
