"""The native kernels on drawn cases without Python: under sanitizers, by both compilers, on another processor.

`native/driver.cc` draws convolutions, normalisations and chains of layers, runs them with several threads and compares
with the definition.
"""

import os
import pathlib
import platform
import shutil
import subprocess

import pytest

from pallas_kernels.native import build

pytestmark = pytest.mark.slow

DRIVER = pathlib.Path(__file__).parent / "native" / "driver.cc"
SOURCES = tuple(build.HERE / name for name in ("plain.cc", "support.cc", "kernels.cc", "norm.cc", "chain.cc"))
FLAGS = ("-std=c++17", "-ffp-contract=fast", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{build.HERE}")
# Scratch memory is as large as asked for and not used again, so that what is read beyond its end, or before it is
# written, is seen.
MEMORY = ("-O1", "-g1", "-DCLICKTRAIN_CHECKED", "-fsanitize=address")
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
THREADS = ("-O1", "-g1", "-fsanitize=thread")
HERE = build.instruction_sets_here()


def compiled(program, compiler, *flags):
    """The program; skips where there is no such compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    command = [compiler, *FLAGS, *flags, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """What draws and judges, compiled once: it is of no instruction set, and no sanitizer's business."""
    return compiled(tmp_path_factory.mktemp("driver") / "driver.o", "g++", "-O2", "-c", DRIVER)


def run(*command, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " 0 of " in done.stdout
    return done.stdout


def flags_of(instructions):
    return build.instruction_sets()[instructions]


def draw_all(*program):
    run(*program, "large", "1", "5")
    run(*program, "norms", "1", "1000")
    run(*program, "chains", "1", "1000")
    return run(*program, "small", "1", "1000")


@pytest.mark.parametrize("instructions", HERE)
def test_drawn_convolutions(tmp_path, instructions, driver, monkeypatch):
    """By the very library that is loaded."""
    monkeypatch.setenv(build.ENVIRONMENT, instructions)
    library = build.built()[0]
    program = compiled(tmp_path / "driver", "g++", driver, library, f"-Wl,-rpath,{library.parent}")
    assert draw_all(program).startswith(instructions)


@pytest.mark.parametrize("instructions", HERE)
def test_drawn_convolutions_by_clang(tmp_path, instructions):
    program = compiled(tmp_path / "driver", "clang++", "-O2", *flags_of(instructions), *SOURCES, DRIVER)
    assert draw_all(program).startswith(instructions)


# What is undefined is so in any vector's length, but for addresses that are no multiples: the longest asks for most.
@pytest.mark.parametrize("instructions", HERE)
def test_addresses_and_undefined_behaviour(tmp_path, instructions, driver):
    sanitizers = (*MEMORY, *UNDEFINED) if instructions == HERE[0] else MEMORY
    program = compiled(tmp_path / "driver", "g++", *sanitizers, *flags_of(instructions), *SOURCES, driver)
    run(program, "small", "1", "300")
    run(program, "large", "1", "2")
    run(program, "norms", "1", "200")
    run(program, "chains", "1", "300")


# The longest vectors and the shortest: what two threads write lies as far apart as the vectors are long.
@pytest.mark.parametrize("instructions", dict.fromkeys((HERE[0], HERE[-1])))
def test_threads(tmp_path, instructions):
    program = compiled(tmp_path / "driver", "g++", *THREADS, *flags_of(instructions), *SOURCES, DRIVER)
    # Shadow memory wants addresses that are not drawn.
    run("setarch", "-R", program, "small", "1", "60")
    run("setarch", "-R", program, "norms", "1", "60")
    run("setarch", "-R", program, "chains", "1", "100")


def test_on_aarch64(tmp_path):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this is such a processor: the other tests are of it")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("there is no qemu-aarch64 here")
    program = compiled(tmp_path / "driver", "aarch64-linux-gnu-g++", "-O2", "-static", *SOURCES, DRIVER)
    assert run("qemu-aarch64", program, "small", "1", "120").startswith("neon")
    run("qemu-aarch64", program, "norms", "1", "60")
    run("qemu-aarch64", program, "chains", "1", "60")
