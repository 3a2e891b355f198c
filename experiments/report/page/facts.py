"""What the page knows of a run, read with care: every part of the data may be missing or broken."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
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
        self.epochs = tuple(sorted(_epochs(data.get("metrics")), key=lambda line: line.epoch))

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
    def superset(self) -> float | None:
        """Taps that a block shares, of which every kernel's own pattern is a part."""
        return number(self.prune.get("superset"))

    @property
    def compression(self) -> float | None:
        """All weights of the convolutions over the kept ones, as the run counted them."""
        return number(self.summary.get("conv_compression"))

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
    def other_files(self) -> dict[str, float]:
        """Of these, the ones that a net is not loaded from."""
        return {name: count for name, count in self.files.items() if name not in (MANIFEST, WEIGHTS)}

    @property
    def loaded_bytes(self) -> float | None:
        """Bytes of what a net is loaded from: weights and manifest."""
        if WEIGHTS not in self.files:
            return None
        return self.files[WEIGHTS] + self.files.get(MANIFEST, 0)

    @property
    def versions(self) -> dict[str, Any]:
        """Of the packages it was timed with."""
        return items(self.timing.get("versions"))

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

    @property
    def shared_filters(self) -> list[int]:
        """`Layer.shared_filters` of the layers where it is known."""
        return [layer.shared_filters for layer in self.layers if layer.shared_filters is not None]

    @property
    def pattern_filters(self) -> int:
        """How many filters share a pattern, whatever they share else."""
        return next((layer.tile[0] for layer in self.layers if layer.tile), 1)

    @property
    def patterns(self) -> dict[str, int]:
        """How many kept kernels of the whole net use each pattern."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            for text, count in (layer.patterns or {}).items():
                counts[text] = counts.get(text, 0) + count
        return counts

    @property
    def image_sizes(self) -> str:
        """Of an image, as numbers where they are known."""
        shape = self.exported.get("image_shape")
        known = isinstance(shape, list | tuple) and len(shape) == 3
        return ", ".join(map(str, shape)) if known else "rows, columns, channels"

    @property
    def normalises(self) -> bool:
        """Whether the export takes pixels, and not what the net's own function takes."""
        return self.exported.get("normalise", True) is not None

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
