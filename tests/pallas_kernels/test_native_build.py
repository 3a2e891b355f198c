"""Building and loading the native kernels: once, whole, by any number of processes, and never a crash.

What is built here is tiny: one source in place of the kernels'.
"""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pallas_kernels import native
from pallas_kernels.native import build

ROOT = Path(build.__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "units", lambda: (build.Unit("tiny.cc"), build.Unit("more.cc", ("-DNUMBER=42",))))
    (tmp_path / "tiny.cc").write_text(
        '#define OUT extern "C" __attribute__((visibility("default")))\nOUT int one() { return 1; }\n'
    )
    (tmp_path / "more.cc").write_text(
        'extern "C" __attribute__((visibility("default"))) int number() { return NUMBER; }\n'
    )
    return tmp_path / "cache"


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not asked yet."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_reason", None)


def test_it_is_built_once_for_each_state_of_its_sources(cache, tmp_path):
    path, is_new = build.built()
    assert is_new and ctypes.CDLL(str(path)).number() == 42 and ctypes.CDLL(str(path)).one() == 1
    assert build.built() == (path, False)
    (tmp_path / "more.cc").write_text((tmp_path / "more.cc").read_text().replace("NUMBER", "NUMBER + 1"))
    other, is_new = build.built()
    assert is_new and other != path and ctypes.CDLL(str(other)).number() == 43
    # No scratch is left.
    assert all(len(entry.stem) == 24 for entry in (cache / "native").iterdir())


@pytest.mark.parametrize("harm", ["truncated", "empty", "no checksum", "a file in its place"])
def test_a_broken_cache_is_built_anew(cache, harm):
    path, _ = build.built()
    if harm == "no checksum":
        (path.parent / "sha256").unlink()
    elif harm == "a file in its place":
        path.unlink(), (path.parent / "sha256").unlink(), path.parent.rmdir()
        path.parent.write_text("not a folder")
    else:
        os.truncate(path, 0 if harm == "empty" else path.stat().st_size // 2)
    again, is_new = build.built()
    assert again == path and is_new and ctypes.CDLL(str(path)).one() == 1
    assert build.built() == (path, False)


def test_many_at_once_build_one(cache):
    results = []
    threads = [threading.Thread(target=lambda: results.append(build.built())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path for path, _ in results}) == 1 and sum(is_new for _, is_new in results) == 1


def unavailable(match):
    with pytest.warns(UserWarning, match=match) as warned:
        reason = native.why_not()
    assert "Convolutions run in their portable form" in str(warned[0].message)
    # Said once.
    assert native.why_not() == reason
    with pytest.raises(RuntimeError, match="not available"):
        native.library()
    assert not native.is_fast()


def test_without_a_compiler_it_says_so_once(cache, fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    unavailable("there is no C\\+\\+ compiler: none of c\\+\\+, g\\+\\+, clang\\+\\+ is found; install one or set CXX")


def test_a_named_compiler_is_used_or_refused(cache, fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    unavailable("there is no compiler 'no-such-compiler', which CXX names")


def test_a_compiler_that_fails_is_quoted(cache, fresh, tmp_path):
    (tmp_path / "tiny.cc").write_text("int one() { return nothing; }\n")
    unavailable("the compiler failed .*error: .nothing. was not declared|undeclared identifier 'nothing'")
    assert not any(entry.is_dir() for entry in (cache / "native").iterdir())


def test_a_cache_that_cannot_be_written(cache, fresh):
    # A file where the folder would be: as root, permissions do not stop anybody.
    cache.write_text("")
    unavailable("Not a directory|File exists")


def test_turned_off(fresh, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    assert native.why_not() == "the native kernels are turned off by CLICKTRAIN_NATIVE=0"


def test_a_library_of_something_else_is_refused(cache, fresh):
    unavailable("is of another version of this package")


def test_one_for_a_newer_jaxlib_is_refused_before_jax_hears_of_it(monkeypatch):
    path, _ = build.built()
    monkeypatch.setattr(build, "ffi_version", lambda: 1)
    monkeypatch.setattr(native.jax.ffi, "register_ffi_target", lambda *args, **how: pytest.fail("registered"))
    with pytest.raises(
        RuntimeError, match=r"built for another version of XLA's FFI than this jaxlib's, 0\.\d+ against 0\.1"
    ):
        native._register(path)


def test_the_wheels_library_is_taken_if_it_can_be_used(fresh, monkeypatch, tmp_path):
    path, _ = build.built()
    monkeypatch.setattr(build, "built", lambda again=False: pytest.fail("built"))
    monkeypatch.setattr(build, "prebuilt", lambda instructions: path)
    assert native.why_not() is None


def test_else_one_is_built(fresh, monkeypatch, tmp_path):
    (tmp_path / "prebuilt.so").write_bytes(b"not a library")
    monkeypatch.setattr(build, "prebuilt", lambda instructions: tmp_path / "prebuilt.so")
    assert native.why_not() is None


@pytest.mark.slow
def test_two_processes_that_build_at_once(tmp_path):
    program = "from pallas_kernels import native; print(native.why_not(), native.instruction_set())"
    environment = {**os.environ, "CLICKTRAIN_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", program]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and out.startswith("None "), err
    assert len([entry for entry in (tmp_path / "native").iterdir() if entry.is_dir()]) == 1
