"""What the page knows of a run, read with care: every part of the data may be missing or broken."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report.page.writing import times

# More than any number that means something, and few enough digits to be written.
_MOST = 1e18
DENSE, NET = "dense (XLA)", "this net"
# Ratios closer to 1 than this are called "as fast": medians of two runs of the same program differ as much.
_ALIKE = 1.05
# The files that every export has, and that a net is loaded from.
MANIFEST, WEIGHTS, PAGE = "manifest.json", "weights.safetensors", "report.html"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution; None stands for what is not known."""

    name: str  # without "params/" and "/kernel"
    shape: tuple[int, ...] | None  # (kh, kw, cin, cout)
    retained: int | None  # weights that are kept
    stored: float | None  # bytes in the export
    dense_s: float | None
    pattern_s: float | None
    runs: str | None  # "dense", "pattern", or in the words of who timed it
    why: str
    patterns: dict[str, int] | None  # how many of its kept kernels use each
    tile: tuple[int, int] | None  # (filters, channels) that share a pattern; None where the plan's tile prunes nothing
    removal_tile: tuple[int, int] | None  # (filters, channels) that are removed together

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

    @property
    def tile_words(self) -> str:
        """(filters, channels) that share a pattern and a removal."""
        if self.tile is None:
            return "not pruned" if self.share == 1 else "–"
        return f"{self.tile}{'' if self.removal_tile in (None, self.tile) else f', removal {self.removal_tile}'}"

    @property
    def smaller(self) -> float | None:
        """How many times smaller than dense float32 it is stored; None for what is stored as it is."""
        found = ratio(4 * (self.weights or 0), self.stored)
        return found if found is not None and found > 1.005 else None

    @property
    def comparison(self) -> "Comparison | None":
        """By pattern against dense."""
        if not self.dense_s or not self.pattern_s:
            return None
        return compare(*(Timed(seconds, seconds, seconds) for seconds in (self.dense_s, self.pattern_s)))


def pick(data: Any, *keys: str) -> Any:
    """``data[key][key]...``, None as soon as something is missing."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def items(data: Any) -> dict[str, Any]:
    """A mapping's entries; none if it is no mapping."""
    return dict(data) if isinstance(data, Mapping) else {}


def records(data: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; none if it is no list."""
    return [entry for entry in data if isinstance(entry, Mapping)] if isinstance(data, list | tuple) else []


def number(value: Any) -> float | None:
    """A finite number, 0 or more, as are all that the page shows; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 <= value < _MOST else None


def ratio(above: Any, below: Any) -> float | None:
    """A quotient of two positive numbers, or None."""
    above, below = number(above), number(below)
    return above / below if above and below else None


class Epoch(NamedTuple):
    """What metrics.jsonl says of an epoch, from 0; None stands for what is not known."""

    epoch: float
    phases: tuple[str, ...]
    eval_top1: float | None
    train_top1: float | None
    eval_loss: float | None
    train_loss: float | None
    train_seconds: float | None


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

    Attributes:
        name: of the run, else of its net.
        net: its name.
        config: of the run, from its folder or from the export.
        prune: the config's pruning part; empty for a dense run, and when it is not known.
        superset: taps that a block shares, of which every kernel's own pattern is a part.
        is_dense: whether the run is known to have pruned nothing.
        epochs: lines of metrics.jsonl, in order.
        files: bytes of each file of the export; this page is none of them.
        other_files: of these, the ones that a net is not loaded from.
        loaded_bytes: of what a net is loaded from: weights and manifest.
        batches: ``{batch size: {engine: seconds}}``, small batches first, the dense net and this one first.
        device: where it was timed.
        layers: the convolutions, in the net's order.
        shared_filters: `Layer.shared_filters` of the layers where it is known.
        patterns: how many kept kernels of the whole net use each pattern.
        normalises: whether the export takes pixels, and not what the net's own function takes.
        image_sizes: of an image, as numbers where they are known.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        names = ("summary", "setting", "manifest", "config", "sizes", "timing")
        self._data = {name: items(data.get(name)) for name in names}
        self._data["exported"] = self.items("manifest.facts")
        self.config = self._data["config"] = self._data["config"] or self.items("exported.run.config")
        self.net = self.first("summary.net", "config.net", "exported.net.name")
        self.name = self.first("summary.name", "config.name", "exported.run.name") or self.net or "an exported net"
        method = self.items("config.method")
        # Exports from before there was one field for the method have it at the top.
        self.prune = (
            method if method.get("kind") == "clicktrain" else (items(method.get("prune")) or self.items("config.prune"))
        )
        self.superset = number(self.prune.get("superset"))
        self.is_dense = self.first("summary.method") == "dense" or any(
            key in self.config and self.config[key] is None for key in ("method", "prune")
        )
        self.epochs = tuple(sorted(_epochs(data.get("metrics")), key=lambda line: line.epoch))
        files = self.items("sizes.files").items()
        self.files = {str(name): count for name, count in files if number(count) is not None and name != PAGE}
        self.other_files = {name: count for name, count in self.files.items() if name not in (MANIFEST, WEIGHTS)}
        self.loaded_bytes = self.files[WEIGHTS] + self.files.get(MANIFEST, 0) if WEIGHTS in self.files else None
        timed = {str(text): _timed(engines) for text, engines in self.items("timing.batches").items()}
        self.batches = dict(sorted((int(text), read) for text, read in timed.items() if text.isdecimal() and read))
        cores = self.number("timing.cores")
        self.device = str(self.first("timing.device") or "a device that is not recorded")
        self.device += f", {cores:g} {'core' if cores == 1 else 'cores'}" if cores else ""
        self.layers = self._layers()
        self.shared_filters = [layer.shared_filters for layer in self.layers if layer.shared_filters is not None]
        self.patterns = collections.Counter()
        for layer in self.layers:
            self.patterns.update(layer.patterns or {})
        shape = self.first("exported.image_shape")
        known = isinstance(shape, list | tuple) and len(shape) == 3
        self.normalises = self.items("exported").get("normalise", True) is not None
        self.image_sizes = ", ".join(map(str, shape)) if known else "rows, columns, channels"

    def _each(self, paths: Sequence[str]) -> Iterable[Any]:
        return (pick(self._data, *path.split(".")) for path in paths)

    def first(self, *paths: str) -> Any:
        """The first that is known; a path is as ``summary.net``, ``exported`` being the manifest's facts."""
        return next((value for value in self._each(paths) if value not in (None, "", [], {})), None)

    def number(self, *paths: str) -> float | None:
        """Likewise, of those that are numbers."""
        return next((value for value in map(number, self._each(paths)) if value is not None), None)

    def items(self, path: str) -> dict[str, Any]:
        """A mapping's entries; none if it is no mapping."""
        return items(self.first(path))

    def against(self, batch: int, engine: str = DENSE) -> Comparison | None:
        """This net against another engine; None where one of them was not timed."""
        timed = self.batches.get(batch, {})
        return compare(timed[engine], timed[NET]) if engine in timed and NET in timed else None

    def _layers(self) -> list[Layer]:
        counted = {_short(layer.get("name")): layer for layer in records(self.first("summary.layers"))}
        counted = counted or _stored_convolutions(self.items("manifest.leaves"))
        timed = {_short(layer.get("name")): layer for layer in records(self.first("timing.layers"))}
        stored = {_short(name): count for name, count in self.items("sizes.layers").items()}
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


def _epochs(lines: Any) -> Iterable[Epoch]:
    for line in records(lines):
        epoch, *values = (number(line.get(key)) for key in Epoch._fields if key != "phases")
        phases = line.get("phases")
        known = phases if isinstance(phases, list | tuple) else ()
        if epoch is not None:
            # A share of more than all is no accuracy.
            shares = (value if value is not None and value <= 1 else None for value in values[:2])
            yield Epoch(epoch, tuple(phase for phase in known if isinstance(phase, str)), *shares, *values[2:])


def _timed(engines: Any) -> dict[str, Timed]:
    read = {}
    for name, seconds in items(engines).items():
        median, low, high = (number(pick(seconds, key)) for key in ("median_s", "low_s", "high_s"))
        if median:
            read[str(name)] = Timed(median, median if low is None else low, median if high is None else high)
    first = [name for name in (DENSE, NET) if name in read]
    return {name: read[name] for name in (*first, *(name for name in read if name not in first))}


def _stored_convolutions(leaves: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What an export says of its convolutions, for nets that were not trained by a run."""
    found = {}
    for name, leaf in leaves.items():
        if (shape := _shape(pick(leaf, "shape"))) is not None:
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
