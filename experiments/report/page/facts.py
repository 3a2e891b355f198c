"""What the page knows of a run, read with care: every part of the data may be missing or broken."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.report.page.markup import items, number, pick, records, times

DENSE, NET = "dense (XLA)", "this net"
# Ratios closer to 1 than this are called "as fast": medians of two runs of the same program differ as much.
_ALIKE = 1.05
# The files that every export has, and that a net is loaded from.
MANIFEST, WEIGHTS, PAGE = "manifest.json", "weights.safetensors", "report.html"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution; None stands for what is not known.

    Attributes:
        name: without "params/" and "/kernel".
        shape: (kh, kw, cin, cout).
        retained: weights that are kept.
        stored: bytes in the export.
        dense_s: seconds of its dense form.
        pattern_s: seconds by its pattern.
        runs: "dense", "pattern", or in the words of who timed it.
        why: in words.
        patterns: how many of its kept kernels use each pattern.
        tile: (filters, channels) that share a pattern; None where nothing is pruned by the plan's tile.
        removal_tile: (filters, channels) that are removed together.
    """

    name: str
    shape: tuple[int, ...] | None
    retained: int | None
    stored: float | None
    dense_s: float | None
    pattern_s: float | None
    runs: str | None
    why: str
    patterns: dict[str, int] | None
    tile: tuple[int, int] | None
    removal_tile: tuple[int, int] | None

    @property
    def weights(self) -> int | None:
        """All of its weights, kept or not."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def share(self) -> float | None:
        """Of the weights, those kept."""
        return None if not self.weights or self.retained is None else self.retained / self.weights

    @property
    def shared_filters(self) -> int | None:
        """How many filters have their whole mask in common."""
        return None if self.tile is None or self.removal_tile is None else min(self.tile[0], self.removal_tile[0])


class Timed(NamedTuple):
    """Seconds of a call: median, 20th and 80th percentile (the median where they are not known)."""

    median: float
    low: float
    high: float


class Comparison(NamedTuple):
    """This net against another engine.

    Attributes:
        speedup: how many times this net's time the other one takes, by medians.
        word: "faster", "slower", "as fast", or "unclear" where a median lies within the other one's spread.
    """

    speedup: float
    word: str

    @property
    def text(self) -> str:
        """``3.10× faster``, ``1.35× slower``, ``as fast (1.01×)``."""
        if self.word == "unclear":
            return f"no clear difference ({times(self.speedup)} by medians, within the spread)"
        if self.word == "as fast":
            return f"as fast ({times(self.speedup)})"
        return f"{times(max(self.speedup, 1 / self.speedup))} {self.word}"


def compare(other: Timed, net: Timed) -> Comparison:
    """Judge two timings that were taken side by side."""
    speedup = other.median / net.median
    if 1 / _ALIKE < speedup < _ALIKE:
        return Comparison(speedup, "as fast")
    if other.low <= net.median <= other.high or net.low <= other.median <= net.high:
        return Comparison(speedup, "unclear")
    return Comparison(speedup, "faster" if speedup > 1 else "slower")


class Facts:
    """The data of `experiments.report.page.render`, with names.

    Args:
        data: see there.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = items(data)
        self.summary = items(data.get("summary"))
        self.setting = items(data.get("setting"))
        self.manifest = items(data.get("manifest"))
        self.exported = items(self.manifest.get("facts"))
        self.config = items(data.get("config")) or items(pick(self.exported, "run", "config"))
        self.sizes = items(data.get("sizes"))
        self.timing = items(data.get("timing"))
        self.lines = sorted(
            (line for line in records(data.get("metrics")) if number(line.get("epoch")) is not None),
            key=lambda line: line["epoch"],
        )

    @property
    def name(self) -> str:
        """Of the run, else of its net."""
        known = (self.summary.get("name"), self.config.get("name"), pick(self.exported, "run", "name"), self.net)
        return str(next((name for name in known if name), "an exported net"))

    @property
    def net(self) -> str | None:
        """Name of the net."""
        known = (self.summary.get("net"), self.config.get("net"), pick(self.exported, "net", "name"))
        return next((str(name) for name in known if name), None)

    def anywhere(self, *keys: str) -> Any:
        """The first of these fields in the summary, the config or the export's run."""
        places = (self.summary, self.config, items(self.exported.get("run")))
        return next((place[key] for place in places for key in keys if place.get(key) is not None), None)

    @property
    def prune(self) -> dict[str, Any]:
        """The config's pruning part; empty for a dense run, and when it is not known."""
        method = items(self.config.get("method"))
        # Exports from before there was one field for the method have it at the top.
        found = method if method.get("kind") == "clicktrain" else method.get("prune") or self.config.get("prune")
        return items(found)

    @property
    def is_dense(self) -> bool:
        """Whether the run is known to have pruned nothing."""
        if self.summary.get("method") == "dense":
            return True
        return any(key in self.config and self.config[key] is None for key in ("method", "prune"))

    @property
    def files(self) -> dict[str, float]:
        """Bytes of each file of the export; this page is none of them."""
        files = items(self.sizes.get("files"))
        return {str(name): count for name, count in files.items() if number(count) is not None and name != PAGE}

    @property
    def loaded_bytes(self) -> float | None:
        """Bytes of what a net is loaded from: weights and manifest."""
        if WEIGHTS not in self.files:
            return None
        return self.files[WEIGHTS] + self.files.get(MANIFEST, 0)

    @property
    def device(self) -> str:
        """Where it was timed."""
        device = str(self.timing.get("device") or "a device that is not recorded")
        cores = number(self.timing.get("cores"))
        return device if not cores else f"{device}, {cores:g} {'core' if cores == 1 else 'cores'}"

    @functools.cached_property
    def batches(self) -> dict[int, dict[str, Timed]]:
        """``{batch size: {engine: seconds}}``, small batches first, the dense net and this one first."""
        found = {}
        for text, engines in items(self.timing.get("batches")).items():
            if str(text).isdecimal() and (read := _timed(engines)):
                found[int(text)] = read
        return dict(sorted(found.items()))

    def against(self, batch: int, engine: str = DENSE) -> Comparison | None:
        """This net against another engine; None where one of them was not timed."""
        timed = self.batches.get(batch, {})
        return compare(timed[engine], timed[NET]) if engine in timed and NET in timed else None

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """The convolutions, in the net's order."""
        counted = {_short(layer.get("name")): layer for layer in records(self.summary.get("layers"))}
        counted = counted or _stored_convolutions(self.manifest)
        timed = {_short(layer.get("name")): layer for layer in records(self.timing.get("layers"))}
        stored = {_short(name): count for name, count in items(self.sizes.get("layers")).items()}
        # Else the names come from what was timed: a file's other leaves are no convolutions.
        names = counted or timed or {name: {} for name in stored}
        return [self._layer(name, counted.get(name, {}), timed.get(name, {}), stored.get(name)) for name in names]

    def _layer(self, name: str, counted: Mapping[str, Any], timed: Mapping[str, Any], stored: Any) -> Layer:
        shape = _shape(counted.get("shape"))
        retained = number(counted.get("retained"))
        pruned = shape is not None and retained is not None and retained < math.prod(shape)
        tile = self.prune.get("tile", (1, 1)) if self.prune and pruned else None
        return Layer(
            name=name,
            shape=shape,
            retained=None if retained is None else int(retained),
            stored=number(stored),
            dense_s=number(timed.get("dense_s")),
            pattern_s=number(timed.get("pattern_s")),
            runs=str(timed["runs"]) if timed.get("runs") else None,
            why=str(timed.get("why") or ""),
            patterns=_counts(counted.get("pattern_counts")),
            tile=None if tile is None else _tile(tile, shape),
            removal_tile=None if tile is None else _tile(self.prune.get("removal_tile") or tile, shape),
        )


def _timed(engines: Any) -> dict[str, Timed]:
    read = {}
    for name, seconds in items(engines).items():
        median, low, high = (number(pick(seconds, key)) for key in ("median_s", "low_s", "high_s"))
        if median:
            read[str(name)] = Timed(median, median if low is None else low, median if high is None else high)
    first = [name for name in (DENSE, NET) if name in read]
    return {name: read[name] for name in (*first, *(name for name in read if name not in first))}


def _stored_convolutions(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What an export says of its convolutions, for nets that were not trained by a run."""
    found = {}
    for name, leaf in items(manifest.get("leaves")).items():
        shape = _shape(pick(leaf, "shape"))
        if shape is not None:
            kept = number(pick(leaf, "mask", "kept"))
            found[_short(name)] = {"shape": shape, "retained": math.prod(shape) if kept is None else kept}
    return found


def _short(name: Any) -> str:
    return str(name).removeprefix("params/").removesuffix("/kernel")


def _shape(sizes: Any) -> tuple[int, ...] | None:
    good = isinstance(sizes, list | tuple) and len(sizes) == 4 and all(map(number, sizes))
    return tuple(int(size) for size in sizes) if good else None


def _counts(counts: Any) -> dict[str, int] | None:
    read = {str(text): int(count) for text, count in items(counts).items() if number(count) is not None}
    return read or None


def _tile(tile: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(filters, channels) with what is "all" of this layer, or more than it has, replaced by all it has."""
    if not isinstance(tile, list | tuple) or len(tile) != 2:
        return None
    if any(size is not None and (number(size) is None or size < 1) for size in tile):
        return None
    _, _, cin, cout = shape
    return tuple(int(min(size or most, most)) for size, most in zip(tile, (cout, cin)))
