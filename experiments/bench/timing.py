"""Functions side by side; an exported net against its own dense form on this machine, whole and layer by layer."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.deploy import InferenceNet, PortableNet
from clicktrain_jax.deploy.inference import Site
from experiments.records import setting
from pallas_kernels import native
from pallas_kernels.tuning import time_together

DENSE, NATIVE, OURS = "dense (XLA)", "dense (native)", "this net"
BATCHES = (1, 8)
_ROUNDS = 15
_BUDGET_S = 20.0


def measure(net: InferenceNet | PortableNet, batches: Sequence[int] = BATCHES) -> dict[str, Any] | None:
    """Tune the net for each batch size, and time it.

    Args:
        net: of `clicktrain_jax.load`.
        batches: numbers of images a call.

    Returns:
        Plain data, as `experiments.report.page.render` takes it; None for a net that cannot be dense.
    """
    if isinstance(net, PortableNet):
        return None
    found = {}
    for batch in batches:
        net = net.tuned(batch)
        images = jnp.asarray(images_of(batch, net.folded.image_shape))
        functions = {DENSE: bound(net.dense(batch, "xla"), images), OURS: bound(net, images)}
        if native.is_fast():
            functions[NATIVE] = bound(net.dense(batch, "cpu"), images)
        found[str(batch)] = seconds_of(functions)
    here = setting()
    return {
        "device": here["cpu"]["model"] if here["device"]["platform"] == "cpu" else here["device"]["kind"],
        "cores": len(os.sched_getaffinity(0)),
        "versions": here["versions"],
        "date": here["date"],
        "batches": found,
        "layers": layers(net, min(batches)),
    }


def images_of(batch: int, shape: Sequence[int]) -> np.ndarray:
    """Pixels in [0, 1], always the same, that 8 bits can tell: float32 (batch, height, width, channels)."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8)
    return pixels.astype(np.float32) / np.float32(255)


def bound(net: InferenceNet, images: Any) -> Callable[[], Any]:
    """The net on these images, compiled."""
    function, prepared = net.program(images.shape[0])
    return lambda: function(prepared, images)


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turns, each once before for compiling; results are waited for."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def seconds_of(functions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of a call in seconds, of functions timed side by side."""
    timings = time_together(functions, rounds=_ROUNDS, budget_s=_BUDGET_S)
    return {
        name: {"median_s": timing.median_s, "low_s": timing.low_s, "high_s": timing.high_s}
        for name, timing in timings.items()
    }


def layers(net: InferenceNet, batch: int) -> list[dict[str, Any]]:
    """Each convolution alone, dense and as its pattern allows: seconds of a call, and how it runs in the net.

    Weights of one layer stay in a core's cache here; in the net they do not, and patterns gain more.
    """
    chosen = {site.step.name: site for site in net.convolutions(batch)}
    dense = {site.step.name: site for site in net.dense(batch).convolutions(batch)}
    everywhere = {name: "NHWC" for name, site in chosen.items() if site.structure is not None}
    pattern = {site.step.name: site for site in net.with_choice(batch, everywhere).convolutions(batch)}
    rows = []
    for name, site in chosen.items():
        functions = {"dense": _alone(net, dense[name], batch)}
        if name in everywhere:
            functions["pattern"] = _alone(net, pattern[name], batch)
        timings = seconds_of(functions)
        rows.append(
            {
                "name": site.step.leaf or name,
                "dense_s": timings["dense"]["median_s"],
                "pattern_s": timings["pattern"]["median_s"] if "pattern" in timings else None,
                "runs": "dense" if site.plan.run == "dense" else "pattern",
                "why": site.plan.why,
            }
        )
    return rows


def _alone(net: InferenceNet, site: Site, batch: int) -> Callable[[], Any]:
    name = site.step.name
    prepared = net.prepared({name: site})
    weights, structure = jax.device_put((prepared["arrays"][name], prepared["structures"].get(name)))
    shape = site.step.images.aval.shape
    images = jnp.asarray(images_of(batch, shape[1:]), site.step.images.aval.dtype)
    function = jax.jit(site.run)
    return lambda: function(images, weights, structure)
