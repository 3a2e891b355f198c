"""Building the native kernels with the system's C++ compiler, once for each state of sources, compiler and jaxlib.

A finished library is kept in ``native/KEY`` below the cache folder, with its checksum beside it. The folder is made
elsewhere and moved there in one step: a reader, another process that builds, or one that is killed, sees all or
nothing of it.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

from pallas_kernels.tuning.cache import cache_folder

try:
    import fcntl
except ImportError:  # Not a POSIX system: two processes may both build, and either's is kept.
    fcntl = None

HERE = pathlib.Path(__file__).parent
LIBRARY = "libclicktrain_native.so"
ENVIRONMENT = "CLICKTRAIN_ISA"
# One library for each set of instructions, the fastest first: what of the C++ library is compiled along with kernels
# is then of the same set, and no machine runs what it does not know. By what `platform.machine` says: the compiler's
# flags, and what the processor must say of itself.
_INSTRUCTION_SETS = {
    "x86_64": {
        "avx512": (
            ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx2", "-mfma", "-mprefer-vector-width=512"),
            {"avx512f", "avx512vl", "avx512dq", "avx512bw", "avx2", "fma"},
        ),
        "avx2": (("-mavx2", "-mfma"), {"avx2", "fma"}),
    },
    "aarch64": {"neon": ((), set())},
    "arm64": {"neon": ((), set())},
}
_CHECKSUM = "sha256"
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 600
# No -ffast-math: a NaN must stay one. No -march=native: a wheel, or a home that machines share, runs elsewhere too.
_COMPILE = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-pthread")
_LINK = ("-shared", "-pthread")
# In the library itself: a process may have loaded an older C++ runtime than the compiler's, as conda's.
_LINK_RUNTIME = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,-s")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One compilation: a source, and what is added to the flags of all. A source may be in several, one a target."""

    source: str
    flags: tuple[str, ...] = ()


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The sets that a library can be built for on such a machine, the fastest first, with the compiler's flags."""
    known = {name: flags for name, (flags, _) in _INSTRUCTION_SETS.get(platform.machine(), {}).items()}
    return {**known, "portable": ()}


def instruction_set() -> str:
    """The fastest set that this processor knows; ``CLICKTRAIN_ISA`` in the environment names another.

    Raises:
        RuntimeError: it names none that can be built here.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if named not in instruction_sets():
            raise RuntimeError(f"{ENVIRONMENT}={named!r}; expected one of {', '.join(instruction_sets())}")
        return named
    return instruction_sets_here()[0]


def instruction_sets_here() -> tuple[str, ...]:
    """The sets that this processor knows, the fastest first."""
    knows = processor_flags()
    sets = _INSTRUCTION_SETS.get(platform.machine(), {})
    return *(name for name, (_, needs) in sets.items() if needs <= knows), "portable"


def prebuilt(instructions: str) -> pathlib.Path:
    """Where a wheel has the library for a set of instructions."""
    return HERE / f"{LIBRARY.removesuffix('.so')}-{instructions}.so"


def units(instructions: str | None = None) -> tuple[Unit, ...]:
    """What a library is made of: for a set of instructions, `instruction_set`'s when None, or "reference"."""
    instructions = instruction_set() if instructions is None else instructions
    common = ("ffi.cc", "norm_ffi.cc", "chain_ffi.cc", "plain.cc", "support.cc", "norm.cc", "chain.cc", "resize.cc")
    if instructions == "reference":
        return tuple(map(Unit, (*common, "reference.cc")))
    flags = instruction_sets()[instructions]
    sources = (*common, "kernels.cc")
    return tuple(Unit(source, flags) for source in sources)


def processor_flags() -> set[str]:
    """What Linux says that the processor knows; empty where nothing is said."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def built(again: bool = False) -> tuple[pathlib.Path, bool]:
    """The library for the running jaxlib, from the cache or new.

    Args:
        again: whether to build it even if there is one.

    Returns:
        (its path, whether it was built by this call).

    Raises:
        RuntimeError: no compiler, or the compiler fails; its own words are in the message.
        OSError: the cache folder cannot be written.
    """
    compiler = _compiler()
    folder = cache_folder() / "native" / _key(compiler)
    if not again and _is_whole(folder):
        return folder / LIBRARY, False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not again and _is_whole(folder):  # by another process, meanwhile
            return folder / LIBRARY, False
        with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent) as scratch:
            made = pathlib.Path(scratch) / "made"
            made.mkdir()
            build_library(made / LIBRARY, compiler=compiler)
            (made / _CHECKSUM).write_text(_checksum(made / LIBRARY), encoding="ascii")
            _replace(made, folder, pathlib.Path(scratch) / "before")
    return folder / LIBRARY, True


def build_library(
    path: pathlib.Path,
    *,
    instructions: str | None = None,
    compiler: Sequence[str] | None = None,
    include: str | None = None,
    more: Sequence[str] = (),
) -> None:
    """Compile all units side by side and link them into one shared library.

    Args:
        path: of the library.
        instructions: as `units` takes them.
        compiler: the command, `_compiler`'s when None.
        include: the folder of XLA's FFI headers, the running jaxlib's when None.
        more: further flags for every unit and for the link, as those of sanitizers.

    Raises:
        RuntimeError: no compiler, or the compiler fails.
        OSError: the library's folder cannot be written.
    """
    compiler = _compiler() if compiler is None else compiler
    if include is None:
        import jax

        include = jax.ffi.include_dir()
    # Beside the library, so that it is on a disk with room and goes with it.
    with tempfile.TemporaryDirectory(prefix="objects-", dir=path.parent) as objects:
        commands, files = [], []
        for index, unit in enumerate(units() if instructions is None else units(instructions)):
            file = os.path.join(objects, f"{index}.o")
            source = os.fspath(HERE / unit.source)
            commands.append([*compiler, *_COMPILE, *unit.flags, *more, "-isystem", include, "-c", source, "-o", file])
            files.append(file)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(_run, commands):
                pass
        link = [*compiler, *_LINK, *more, *files, "-o", os.fspath(path)]
        if sys.platform == "linux" and not more:
            with contextlib.suppress(RuntimeError):  # Not every system has the static runtime.
                _run([*link, *_LINK_RUNTIME])
                return
        _run(link)


def ffi_version() -> int:
    """Of XLA's FFI in the running jaxlib: 1000 * major + minor.

    Raises:
        RuntimeError: its headers do not say.
    """
    import jax

    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    try:
        text = header.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RuntimeError(f"the headers of this jaxlib's FFI cannot be read: {error}") from error
    major, minor = (re.search(rf"^#define XLA_FFI_API_{part} (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise RuntimeError(f"{header} does not say which version of XLA's FFI it is")
    return int(major[1]) * 1000 + int(minor[1])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        said = "; ".join(errors[:3]) or f"exit status {done.returncode}"
        raise RuntimeError(f"the compiler failed ({shlex.join(command[:1])}): {said}")


def _compiler() -> list[str]:
    """The command that ``CXX`` names, which is used or refused, else the first that is found."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    if named:
        raise RuntimeError(f"there is no compiler {named[0]!r}, which CXX names")
    raise RuntimeError(f"there is no C++ compiler: none of {', '.join(_COMPILERS)} is found; install one or set CXX")


def _key(compiler: Sequence[str]) -> str:
    """Of all that decides what the library does and whether it can be loaded."""
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
        version = done.stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{compiler[0]} could not be run: {error}") from error
    facts = hashlib.sha256()
    jaxlib = importlib.metadata.version("jaxlib")
    for fact in (*compiler, version, jaxlib, platform.machine(), platform.system(), repr(platform.libc_ver())):
        facts.update(fact.encode() + b"\0")
    facts.update(repr((units(), _COMPILE, _LINK, _LINK_RUNTIME, sources())).encode())
    return facts.hexdigest()[:24]


def sources() -> str:
    """Tells one state of the kernels' sources from another."""
    digest = hashlib.sha256()
    for source in sorted(HERE.iterdir()):
        if source.suffix in (".h", ".cc"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _checksum(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether it holds what was built: loading a library that is cut short can end the process."""
    try:
        return (folder / _CHECKSUM).read_text(encoding="ascii") == _checksum(folder / LIBRARY)
    except (OSError, ValueError):
        return False


def _replace(made: pathlib.Path, folder: pathlib.Path, before: pathlib.Path) -> None:
    """Move a finished folder to its place, out of which a broken one goes first."""
    if os.path.lexists(folder):
        os.rename(folder, before)
    try:
        os.rename(made, folder)
    except OSError:
        if not _is_whole(folder):  # else another process was faster
            raise


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with open(path, "a", encoding="ascii") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
