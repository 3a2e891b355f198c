"""The C++ kernels for CPUs, behind XLA's FFI: loaded, or built, when they are first asked for.

The library inside the wheel is taken if there is one that this jaxlib accepts; else it is built once with the system's
compiler and kept in the cache folder (`pallas_kernels.native.build`). Where neither can be had there is a reason in
words and one warning, and whoever asked does without. ``CLICKTRAIN_NATIVE=0`` in the environment turns all of it off.
"""

import contextlib
import ctypes
import os
import pathlib
import threading
import warnings

import jax

from pallas_kernels.native import build

ENVIRONMENT = "CLICKTRAIN_NATIVE"
# Handlers of XLA's FFI, by the names under which jax knows them.
TARGETS = (
    "clicktrain_conv",
    "clicktrain_conv_packed",
    "clicktrain_conv_input_gradient",
    "clicktrain_conv_weight_gradient",
    "clicktrain_batch_norm",
    "clicktrain_batch_norm_gradient",
    "clicktrain_chain",
)
_LOCK = threading.RLock()
# Known to jax: what was traced without it is traced anew within.
_is_portable = jax.make_user_context(default_value=False)
_loaded: ctypes.CDLL | None = None
_reason: str | None = None


def why_not() -> str | None:
    """Why there are no native kernels in this process; None if there are. The first call may build them."""
    global _loaded, _reason
    if os.environ.get(ENVIRONMENT, "1") == "0":
        return f"the native kernels are turned off by {ENVIRONMENT}=0"
    with _LOCK:
        if _loaded is None and _reason is None:
            try:
                _loaded = _load()
            except (OSError, RuntimeError) as error:
                _reason = f"the native kernels are not available: {error}"
                warnings.warn(
                    f"{_reason}. Convolutions run in their portable form, which is slower; {ENVIRONMENT}=0 says so "
                    "without this warning",
                    stacklevel=2,
                )
        return _reason


def library() -> ctypes.CDLL:
    """The loaded library, its handlers registered with jax.

    Raises:
        RuntimeError: there is none; the message says why.
    """
    reason = why_not()
    if reason is not None or _loaded is None:
        raise RuntimeError(reason)
    return _loaded


def instruction_set() -> str:
    """What the kernels were compiled for: "avx512", "avx2", "neon", "portable", or "reference" for plain loops.

    Raises:
        RuntimeError: there is no library.
    """
    return library().clicktrain_instruction_set().decode()


def is_fast() -> bool:
    """Whether there are native kernels that are worth choosing; never within `portable`."""
    return not _is_portable.value and why_not() is None and instruction_set() != "reference"


def state() -> str:
    """Which kernels would run and how they are written, for keys of what was measured; empty where none are chosen."""
    return f"{instruction_set()} {build.sources()}" if is_fast() else ""


def portable() -> contextlib.AbstractContextManager:
    """Functions traced within take the native kernels only where these are named, never where it is left open.

    For programs that other machines run, and for whoever reads a traced program and looks for its convolutions.
    """
    return _is_portable(True)


def _load() -> ctypes.CDLL:
    """The wheel's library if it can be used, else the cache's, else a new one.

    Raises:
        OSError, RuntimeError: none can be had.
    """
    refused = None
    prebuilt = build.prebuilt(build.instruction_set())
    if prebuilt.exists():
        try:
            return _register(prebuilt)
        except (OSError, RuntimeError) as error:
            refused = error
    try:
        path, is_new = build.built()
        try:
            return _register(path)
        except OSError:
            if is_new:
                raise
            # Kept from before and whole, but not for this system any more.
            return _register(build.built(again=True)[0])
    except (OSError, RuntimeError) as error:
        if refused is None:
            raise
        message = f"the wheel's library cannot be used ({refused}), and none could be built: {error}"
        raise RuntimeError(message) from error


def _register(path: pathlib.Path) -> ctypes.CDLL:
    """Load a library and make its handlers known to jax.

    Raises:
        OSError: it cannot be loaded.
        RuntimeError: this jaxlib refuses it, as one does that is older than the headers it was built with.
    """
    loaded = ctypes.CDLL(os.fspath(path))
    try:
        loaded.clicktrain_instruction_set.restype = ctypes.c_char_p
        loaded.clicktrain_packed_bytes.restype = ctypes.c_int64
        loaded.clicktrain_ffi_version.restype = ctypes.c_int64
        loaded.clicktrain_resize.restype = None
        needs, has = loaded.clicktrain_ffi_version(), build.ffi_version()
        handlers = {name: jax.ffi.pycapsule(getattr(loaded, name)) for name in TARGETS}
    except AttributeError as error:
        raise OSError(f"{path} is of another version of this package: {error}") from error
    # Asked before: jax registers handlers when its CPU backend starts, which a refused one would keep from starting.
    if needs > has or needs // 1000 != has // 1000:
        versions = " against ".join(f"{number // 1000}.{number % 1000}" for number in (needs, has))
        raise RuntimeError(f"{path} was built for another version of XLA's FFI than this jaxlib's, {versions}")
    for name, handler in handlers.items():
        try:
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        except Exception as error:  # Of jaxlib's own kinds, which change from version to version.
            raise RuntimeError(f"jaxlib refuses {name} of {path}: {error}") from error
    return loaded
