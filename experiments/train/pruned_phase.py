"""How the pruned phase's convolutions are run: dense under masks, or by `pallas_kernels.pattern_conv`.

The loop hands structures to its nets rather than accelerating them, because they are arguments here, dealt to a GPU
beforehand: what `clicktrain_jax.accelerate` compiles holds its masks as constants, each layer in the layout that it
finds. Which layers gain is decided by the planner's own estimate, `clicktrain_jax.deploy.layers.gains`.

The masks are known from the selection on, so the programs of the pruned phase are compiled in the background while
the regularize phase trains. At the first pruned update the ways are timed side by side on whole updates of copies of
the state, and the fastest is kept; what was found is cached for this kind of device.
"""

import dataclasses
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax.deploy.structures import gaining_structures
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import path_keys
from experiments.train.programs import in_background
from pallas_kernels import native
from pallas_kernels.tuning import Cache

Way = Literal["dense", "pattern", "pattern_hwnc"]
# Two of the pruned updates in a hundred must be saved by a way before it is taken over dense ones.
_MARGIN = 0.02
_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for one set of masks.

    Attributes:
        way: how the pruned phase is run.
        structures: the variables of `clicktrain_jax.models.PatternConv`; empty when dense.
        seconds: median of one timed run by way, an update or a few of them, where it was measured.
        source: "asked for", "measured", "cached", or "estimated" where no layer gains by its structure.
    """

    way: Way
    structures: dict[str, Any]
    seconds: dict[str, float]
    source: str

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {"way": self.way, "source": self.source, "seconds": self.seconds, "layers": self.layers}

    @property
    def layers(self) -> list[str]:
        """Names of the kernels that have a structure."""
        return structure_names(self.structures)


def structure_names(structures: dict[str, Any]) -> list[str]:
    """Names of the kernels that have a structure."""
    leaves = jax.tree_util.tree_flatten_with_path(structures, is_leaf=lambda x: isinstance(x, pk.Structure))[0]
    return ["/".join(path_keys(path)) for path, _ in leaves]


def scheduled(net: nn.Module, images: tuple[int, ...], structures: dict[str, Any]) -> dict[str, Any]:
    """The structures with the worklists of a GPU's kernels, where the net convolves by them.

    Args:
        net: of the way "pattern_hwnc".
        images: shape of a batch.
        structures: of `gaining_structures`.
    """

    def run(held: dict[str, Any]) -> Any:
        return net.apply(
            {"structures": held},
            jax.numpy.zeros(images),
            train=False,
            mutable=["params", "batch_stats"],
            rngs={"params": jax.random.key(0)},
        )

    return jax.tree.map(jax.numpy.asarray, pk.scheduled(run, structures))


class PrunedPhase:
    """The choice of a way, made once for each set of masks.

    Args:
        asked: a way, or "auto" to measure.
        plan: the run's.
        facts: what the measurement depends on, beside the masks: the key of the cache.
        hwnc: whether the layout with the batch inside is tried.
        portable: whether the portable form is, on a GPU: it loses to cuDNN wherever Hopper's kernels serve, and is long
            to compile.
        deal: makes the structures' work even for the device; what `scheduled` does, or nothing.
    """

    def __init__(
        self,
        asked: str,
        plan: Plan | None,
        facts: Mapping[str, Any],
        *,
        hwnc: bool,
        portable: bool = True,
        deal: Callable[[dict[str, Any]], dict[str, Any]] = lambda structures: structures,
    ) -> None:
        self._deal = deal
        self.configured, self.asked, self.plan, self.facts = asked, asked, plan, dict(facts)
        self.ways: tuple[Way, ...] = ("dense", *(("pattern",) * portable), *(("pattern_hwnc",) * hwnc))
        self.waited_seconds = 0.0
        self._known: Any = None
        self.choice: Choice | None = None
        self._candidates: tuple[Way, ...] = ()
        self._structures: dict[str, Any] = {}
        self._compiling: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, way: Way | None = None) -> None:
        """Start a run; a resumed one says how it was run before."""
        if self._compiling is not None:
            self._compiling.join()
        self._compiling, self._failure = None, None
        self.asked, self._known, self.choice = way or self.configured, None, None

    def prepare(self, known: Any, masks: ct.Masks, compile_way: Callable[[Way, dict[str, Any]], None]) -> None:
        """Start compiling what may be needed, for these masks; does nothing when they are known.

        Args:
            known: what tells these masks from those of other runs and selections.
            masks: of the run.
            compile_way: compiles the pruned update of a way; is called from another thread.
        """
        if known == self._known:
            return
        start = time.perf_counter()
        self._wait()
        self._known, self.choice = known, None
        if self.asked == "dense":
            self.choice = Choice("dense", {}, {}, "asked for")
            return
        known = self.asked if self.asked != "auto" else (Cache().get(self.facts) or {}).get("way")
        self._candidates = (known,) if known in (*self.ways, self.asked) else self.ways
        masks = jax.device_get(masks)  # the arrays themselves are donated meanwhile

        def work() -> None:
            try:
                self._structures = self._deal(gaining_structures(masks, self.plan))
                if not self._structures:
                    self.choice = Choice("dense", {}, {}, "estimated")
                    return
                for way in self._candidates:
                    compile_way(way, {} if way == "dense" else self._structures)
            except BaseException as error:  # handed to the thread that waits
                self._failure = error

        self._compiling = in_background(work, "compile the pruned phase")
        self.waited_seconds += time.perf_counter() - start

    def choose(self, ready: Callable[[Way, dict[str, Any]], Callable[[], object]]) -> Choice:
        """The way for the masks of the last `prepare`.

        Args:
            ready: makes one call of a way's compiled program ready, on a copy of the state; what it returns makes the
                call and waits for its end, and that alone is measured.
        """
        if self.choice is not None:
            return self.choice
        start = time.perf_counter()
        self._wait()
        if self.choice is None and len(self._candidates) == 1:
            source = "asked for" if self.asked != "auto" else "cached"
            self.choice = self._as_choice(self._candidates[0], {}, source)
        elif self.choice is None:
            seconds = self._measure(ready)
            best = min(seconds, key=seconds.__getitem__)
            way = best if seconds[best] < (1 - _MARGIN) * seconds["dense"] else "dense"
            Cache().put(self.facts, {"way": way, "seconds": seconds})
            self.choice = self._as_choice(way, seconds, "measured")
        self.waited_seconds += time.perf_counter() - start
        return self.choice

    def _as_choice(self, way: Way, seconds: dict[str, float], source: str) -> Choice:
        return Choice(way, {} if way == "dense" else self._structures, seconds, source)

    def _measure(self, ready: Callable[[Way, dict[str, Any]], Callable[[], object]]) -> dict[str, float]:
        times: dict[Way, list[float]] = {way: [] for way in self._candidates}
        clock = _clock()
        for turn in range(_ROUNDS + 1):
            for way in self._candidates:
                call = ready(way, {} if way == "dense" else self._structures)
                start = clock()
                call()
                if turn:  # the first one of each warms up
                    times[way].append(clock() - start)
        return {way: float(np.median(seconds)) for way, seconds in times.items()}

    def _wait(self) -> None:
        if self._compiling is not None:
            self._compiling.join()
            self._compiling = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure


def way_asked(config: Any, devices: Any, *, on_cpu: bool) -> str:
    """The way that a config asks for, where several devices can run it; else "dense", and a warning if it was named.

    Args:
        config: of the run.
        devices: `experiments.train.devices.Devices`.
        on_cpu: whether they are CPUs.
    """
    asked = config.loop.pruned_convolution
    if asked == "auto":
        # What was measured is another thing for each process, and may be for each number of devices.
        measured = jax.process_count() == 1 and not config.loop.ordered and (on_cpu or devices.mesh is None)
        return asked if measured else "dense"
    if asked != "dense" and not on_cpu and devices.mesh is not None:
        warnings.warn(
            f"loop.pruned_convolution={asked!r}: no partitioner divides a GPU's kernels by pattern; the pruned phase "
            "is run dense, under masks",
            stacklevel=2,
        )
        return "dense"
    return asked


def facts_of(config: Any, plan: Plan | None) -> dict[str, Any]:
    """What decides the speed of a run's pruned updates."""
    return {
        "a call of the pruned phase": config.net,
        "width": config.width,
        "batch": config.batch_size,
        **({"parts": parts} if (parts := [config.accumulate, config.shards]) != [1, 1] else {}),
        "precision": config.precision,
        "plan": f"{plan.layers} {plan.target}" if plan is not None else "",
        **({"native": native.state(), "cores": len(os.sched_getaffinity(0))} if jax.default_backend() == "cpu" else {}),
    }


def _clock() -> Callable[[], float]:
    """Seconds; on one core of a CPU the process's own, which do not pass while the core does another one's work."""
    alone = jax.default_backend() == "cpu" and len(os.sched_getaffinity(0)) == 1
    return time.process_time if alone else time.perf_counter
