"""Programs that are compiled once: by whoever needs one, or ahead of that in the background."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from experiments.train.costs import bytes_of
from pallas_kernels.native.build import processor_flags
from pallas_kernels.tuning import cache_folder


class Programs:
    """Compiled programs by key. What two threads ask for is compiled once, and the second one waits.

    Args:
        options: for the compiler.
        everywhere: where all results lie; None to leave it to jax.

    Attributes:
        seconds: what the run has waited for tracing and compiling so far.
        bytes: memory that the largest update compiled so far asks for.
        large: keys of the programs compiled so far that hold a net's backward pass.
    """

    def __init__(self, options: dict[str, str], everywhere: jax.sharding.Sharding | None = None) -> None:
        self.options = options
        self._places = {} if everywhere is None else {"out_shardings": everywhere}
        self.seconds, self.bytes = 0.0, 0
        self.large: list[Any] = []
        self._futures: dict[Any, Future] = {}
        self._lock = threading.Lock()

    def __contains__(self, key: Any) -> bool:
        return key in self._futures

    def get(
        self,
        key: Any,
        build: Callable[[], Callable[..., Any]],
        args: tuple,
        donate: tuple[int, ...] = (),
        *,
        counts: bool = True,
        large: bool = False,
        beside: int = 0,
        ahead: bool = False,
        runs_once: bool = False,
    ) -> Callable[..., Any]:
        """The program of a key.

        Args:
            key: that tells it from all others.
            build: makes the function that is compiled.
            args: what it is compiled for, arrays or `jax.ShapeDtypeStruct`.
            donate: which of them it may overwrite.
            counts: whether it belongs to an update, for ``bytes``.
            large: whether it holds a net's backward pass.
            beside: bytes that live while it runs and are none of its arguments.
            ahead: called where nobody waits for it.
            runs_once: on a CPU: compiled for a short wait rather than a short run, to the same bits.

        Raises:
            Whatever compiling it raised, in whichever thread.
        """
        start = time.perf_counter()
        with self._lock:
            future = self._futures.get(key)
            is_mine = future is None
            if is_mine:
                future = self._futures[key] = Future()
        if is_mine:
            try:
                options = self.options | (_soon() if runs_once else {})
                program = jax.jit(build(), donate_argnums=donate, **self._places).lower(*args).compile(options)
            except BaseException as error:
                with self._lock:
                    # Who waits for it hears of it; who asks later, after a Ctrl-C say, has it compiled again.
                    del self._futures[key]
                future.set_exception(error)
                raise
            if counts:
                self.bytes = max(self.bytes, bytes_of(program) + beside)
            if large:
                self.large.append(key)
            future.set_result(program)
        waits = not future.done() or is_mine
        program = future.result()
        if waits and not ahead:
            self.seconds += time.perf_counter() - start
        return program


def _soon() -> dict[str, str]:
    """Options for a program that runs once.

    A net's first weights are random numbers in one program of many long expressions, for which LLVM's later passes take
    half a minute (ResNet-18). They reorder no floating-point operation: the weights are the same to the bit without
    them. Not so at level 0, which fuses no product with a sum.
    """
    hurries = jax.config.read("jax_disable_most_optimizations")
    return {} if hurries or jax.default_backend() != "cpu" else {"xla_backend_optimization_level": "1"}


def shapes_of(tree: Any) -> Any:
    """What stands for arrays where a program is compiled; divided over a mesh as they are."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, "sharding", None)
        place = place if isinstance(place, jax.sharding.NamedSharding) else None
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=place)

    return jax.tree.map(shape, tree)


def in_background(work: Callable[[], None], name: str) -> threading.Thread | None:
    """Do it beside the run; at once, and without a thread, on one core, where nothing is won beside training."""
    if len(os.sched_getaffinity(0)) == 1:
        work()
        return None
    thread = threading.Thread(target=work, name=name)
    thread.start()
    return thread


def keep_on_disk() -> None:
    """Have jax keep what it compiles, and XLA what it tunes, in the project's cache folder for the next process.

    A folder that jax was told of before stays.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = "programs"
    if jax.default_backend() == "cpu":
        # jax's key does not tell processors apart, and a home directory may serve several.
        folder += f"-{hashlib.sha256(' '.join(sorted(processor_flags())).encode()).hexdigest()[:8]}"
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / folder))
    # Small programs are many: together they take longer than a run should need to begin.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")
