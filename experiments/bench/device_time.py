"""What a GPU itself spends on a call, kernel by kernel, read from a profiler's trace.

A host's clock sees launches and waits: a call of 5 us on a GPU takes 50 to 130 us by it.
"""

import collections
import dataclasses
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """One call on the device.

    Attributes:
        micros: microseconds by kernel name; empty where the profiler sees no GPU.
        counts: launches by kernel name.
    """

    micros: dict[str, float]
    counts: dict[str, float]

    @property
    def milliseconds(self) -> float | None:
        """Of all kernels; None where the profiler sees no GPU."""
        return sum(self.micros.values()) / 1e3 if self.micros else None

    def record(self, longest: int) -> dict[str, Any]:
        """As plain data, ``[name, microseconds, launches]`` of so many kernels, the longest first."""
        names = sorted(self.micros, key=self.micros.get, reverse=True)[:longest]
        return {
            "device_ms": self.milliseconds,
            "kernels": sum(self.counts.values()),
            "longest": [[name[:80], round(self.micros[name], 1), self.counts[name]] for name in names],
        }


def device_time(run: Callable[[], Any], calls: int, *, of_each: int = 1) -> DeviceTime:
    """Trace some calls of what is compiled and warm.

    Args:
        run: dispatches work and returns its arrays.
        calls: how many.
        of_each: how many units of work one call does; figures are for one of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = run()
            jax.block_until_ready(result)
        traces = list(Path(folder).rglob("*.trace.json.gz"))
        with gzip.open(traces[0]) as file:
            events = json.load(file)["traceEvents"]
    return read_trace(events, calls * of_each)


def read_trace(events: list[dict[str, Any]], units: int) -> DeviceTime:
    """Kernels of the streams of all GPUs in Chrome's trace events, for one of so many units of work."""
    named = {kind: {} for kind in ("process_name", "thread_name")}
    for event in events:
        if event.get("ph") == "M" and event["name"] in named:
            named[event["name"]][event["pid"], event.get("tid", 0)] = event["args"]["name"]
    gpus = {pid for (pid, _), name in named["process_name"].items() if "GPU" in name.upper()}
    streams = {place for place, name in named["thread_name"].items() if name.startswith("Stream")}
    micros, counts = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and event["pid"] in gpus and (event["pid"], event["tid"]) in streams:
            micros[event["name"]] += event["dur"]
            counts[event["name"]] += 1
    return DeviceTime(*({name: value / units for name, value in found.items()} for found in (micros, counts)))
