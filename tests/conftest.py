import contextlib
import gc
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import pytest

# The interpreter of the Hopper kernels runs each warpgroup on a thread of XLA's CPU client and blocks it at barriers:
# with no more threads than a small machine has cores (one is taken by the launch itself) the last warpgroup never
# starts, and the test hangs. XLA reads this once, when its CPU client is made, so it must stand before any test does
# anything with jax. Results of other tests do not depend on it, to the bit.
os.environ.setdefault("NPROC", "16")

# A test's program is small and runs a few times: most of its time would go into optimising it. What users run is
# compiled as theirs in the slow layer (`make test-slow`), on the newest jax in .ci/run, and where a test asks for the
# fixture `optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# What is measured while a net runs is kept in the user's folder, and a test neither reads nor writes there. In the
# environment, so that it holds in the tests' processes too.
_CACHE = tempfile.TemporaryDirectory(prefix="clicktrain-tests-")
os.environ["CLICKTRAIN_CACHE"] = _CACHE.name
# But for the native kernels, which are built once for all processes and runs; the first one to want them builds them
# and the others wait.
_ROOT = Path(__file__).parents[1]
_NATIVE = _ROOT / ".native"
_NATIVE.mkdir(exist_ok=True)
os.symlink(_NATIVE, Path(_CACHE.name) / "native")
# And for XLA's programs, small ones too: two thirds of the tests' time is compiling, and a second run compiles nothing
# but what changed. jax's key tells programs, options and versions apart, and not processors; the folder is begun anew
# when it is large.
_CPU = Path("/proc/cpuinfo")
_FLAGS = re.search("^flags.*", _CPU.read_text() if _CPU.exists() else "", re.MULTILINE)
_PROGRAMS = _ROOT / ".programs" / f"{zlib.crc32(_FLAGS[0].encode() if _FLAGS else b''):08x}"
if "PYTEST_XDIST_WORKER" not in os.environ and _PROGRAMS.exists():
    with contextlib.suppress(FileNotFoundError):  # another run takes them away
        if sum(file.stat().st_size for file in _PROGRAMS.iterdir()) > 2 << 30:
            shutil.rmtree(_PROGRAMS, ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Under --import-mode=importlib a test cannot import its neighbours by name: load what many share once, here.
_SPEC = importlib.util.spec_from_file_location("drawn", Path(__file__).parent / "drawn.py")
sys.modules["drawn"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sys.modules["drawn"])


# The longest files, by which workers begin, so that none is alone with one at the end.
_LONG = (
    *("several_devices", "two_processes", "killed", "data_parallel", "gpu_measures", "streaming", "loop", "methods"),
    *("nets", "targets", "layout", "accelerate", "pattern_conv", "mosaic_gpu", "native_driver", "examples", "readme"),
)


# "1/2" and "2/2": one half of each test function's cases, by chance, and the other. Two runs on two versions of jax
# then have every function twice and every case at least once; a function of one case is in both, and what may be
# skipped is all in the last one, which is for the newest version.
_CASES = os.environ.get("CLICKTRAIN_CASES") or "1/1"


@pytest.hookimpl(trylast=True)  # of what -m and -k leave
def pytest_collection_modifyitems(config, items):
    place = {f"test_{name}": number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_LONG)))
    share, of = map(int, _CASES.split("/"))
    functions = {}
    for item in items:
        functions.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    kept = set()
    for cases in functions.values():
        drawn = [case for case in cases if _drawn(case.name, of) == share or (share == of and _may_skip(case))]
        kept |= {id(case) for case in drawn or cases[:1]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
    os.environ.pop("CLICKTRAIN_CASES", None)  # a test that starts pytest itself counts on all cases


def pytest_collection_finish():
    # Half a million objects of jax and the tests live to the end: collections need not walk them each time.
    gc.collect()
    gc.freeze()


def _drawn(name, of):
    return (zlib.crc32(name.encode()) * 2654435761 >> 16) % of + 1  # mixed: a checksum's low bits follow single letters


def _may_skip(case):
    return any(case.iter_markers("skipif"))


@pytest.fixture(scope="session", autouse=True)
def _native():
    """Loaded before a test names a cache folder of its own: another one would be built there, which jax refuses beside
    the first."""
    from pallas_kernels import native

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native.why_not()


@contextlib.contextmanager
def _compiling(quickly):
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    if before == quickly:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", quickly)
    jax.clear_caches()  # what was compiled the other way
    # For the tests' own processes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quickly)))
        yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimised():
    """Has the module's programs compiled as users' are: for what must hold to the bit."""
    with _compiling(quickly=False):
        yield


@pytest.fixture(scope="module")
def quick():
    """Has the module's programs compiled quickly always: where what they compute, or measure, is not of programs."""
    with _compiling(quickly=True):
        yield
