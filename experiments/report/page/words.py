"""What the page says in words that follow from the facts: its head, its verdicts, where the run comes from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.data import is_lossy
from experiments.report.page.facts import DENSE, NET, Facts, Layer, ratio
from experiments.report.page.writing import count_of, milliseconds, percent, size, times

NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
COMMANDS = {"evaluate": "python -m experiments evaluate EXPORT", "bench": "python -m experiments bench deploy EXPORT"}
# Where things lay on the machine of the run says nothing about the run.
_LOCAL = ("data.dir", "data.cache_dir")


class Card(NamedTuple):
    """One of the big figures; ``big`` is None where it is not known, and ``otherwise`` says so."""

    what: str
    big: str | None
    more: Sequence[str]
    otherwise: str = NOT_MEASURED


class Bar(NamedTuple):
    """A bar of file sizes: (name, kind, bytes) of its parts; the kind is the colour."""

    name: str
    parts: Sequence[tuple[str, str, float]]
    words: str = ""

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(count for _, _, count in self.parts)


def head(facts: Facts) -> dict[str, Any]:
    """What was run."""
    date = facts.first("setting.date")
    return {
        "net": _net(facts),
        "data": _data(facts),
        "seed": facts.first("summary.seed", "config.seed", "exported.run.seed"),
        "epochs": facts.first("summary.epochs", "config.epochs", "exported.run.epochs"),
        "trained": None if date is None else str(date).replace("T", " ").replace("+00:00", " UTC"),
    }


def _net(facts: Facts) -> str | None:
    if facts.net is None:
        return "a net of the user's own" if "net" in facts.items("exported") else None
    width = facts.number("summary.width", "config.width", "exported.run.width", "exported.net.width")
    width_words = "" if width in (None, 1) else f", {width:g} of its full width"
    kept = facts.first("manifest.dtype")
    return f"{facts.net}{width_words}{f', stored as {kept}' if kept else ''}"


def _data(facts: Facts) -> str | None:
    name = facts.first("summary.dataset", "exported.data.name", "config.data.name")
    encoding = facts.first("summary.encoding", "exported.data.encoding")
    if name is None:
        return None
    if encoding is None:
        return f"{name}, encoding {NOT_RECORDED}"
    if not is_lossy(str(encoding)):
        return f"{name}, {encoding} pixels" if encoding == "raw" else f"{name}, {str(encoding).upper()}-coded"
    lossy = ": lossy, accuracies do not compare with published ones" if str(name).startswith("cifar") else ""
    return f"{name}, {str(encoding).upper()}-coded{lossy}"


def cards(facts: Facts) -> list[Card]:
    """The figures that most people want to know."""
    return [_accuracy_card(facts), _conv_card(facts), _file_card(facts), _speed_card(facts)]


def _accuracy_card(facts: Facts) -> Card:
    top1 = facts.number("exported.accuracy.top1")
    trained = facts.number("summary.final_top1", "exported.accuracy.run_top1")
    split = facts.first("exported.accuracy.split", "summary.eval_split")
    examples = facts.number("exported.accuracy.examples", "summary.eval_examples")
    on = "" if split is None else f"{split} set" + ("" if not examples else f" of {count_of(int(examples), 'image')}")
    masked = f"masked net in training: {NOT_RECORDED if trained is None else percent(trained)}"
    if None not in (trained, top1):
        masked += ", the same" if percent(top1) == percent(trained) else f", {100 * (top1 - trained):+.2f} points"
    return Card("Top-1 accuracy at export", None if top1 is None else percent(top1), [on, masked])


def _conv_card(facts: Facts) -> Card:
    dense, stored = facts.number("sizes.conv_dense_bytes"), facts.number("sizes.conv_bytes")
    # Headers count in full: what tells where the convolutions are belongs to them.
    stored = None if stored is None else stored + (facts.number("sizes.header_bytes") or 0)
    smaller, fewer = ratio(dense, stored), _fewer_weights(facts)
    if smaller is None:
        more = ["fewer weights", f"bytes {NOT_RECORDED}"] if fewer else []
        return Card("Convolutions", times(fewer) if fewer else None, more, NOT_RECORDED)
    big, word = against_dense(smaller)
    words = f"{word} dense float32: {size(dense)} in {size(stored)}, indices and headers included"
    return Card("Convolutions", big, [words, f"{times(fewer)} fewer weights" if fewer else ""])


def _fewer_weights(facts: Facts) -> float | None:
    known = facts.number("summary.conv_compression", "exported.conv_compression")
    share = retained(facts.layers)
    return known or (1 / share if share else None)


def retained(layers: Sequence[Layer]) -> float | None:
    """The share of all weights that is kept."""
    counted = [layer for layer in layers if layer.share is not None]
    return ratio(sum(layer.retained for layer in counted), sum(layer.weights for layer in counted))


def _file_card(facts: Facts) -> Card:
    dense, loaded = facts.number("sizes.dense_bytes"), facts.loaded_bytes
    smaller = ratio(dense, loaded)
    if smaller is None:
        return Card("File", None, [], NOT_RECORDED)
    big, word = against_dense(smaller)
    return Card("File", big, [f"{word} dense float32: {size(dense)} in {size(loaded)}, manifest included"])


def against_dense(smaller: float) -> tuple[str, str]:
    """A ratio of sizes as a figure and words; what is stored as it is grows by its headers."""
    if 0.99 < smaller < 1.01:
        return times(smaller), "as large as"
    return times(max(smaller, 1 / smaller)), "smaller than" if smaller > 1 else "larger than"


def _speed_card(facts: Facts) -> Card:
    what, found = "Time for one image (N = 1)", facts.against(1)
    if found is None:
        return Card(what, None, [])
    ours, dense = (milliseconds(facts.batches[1][engine].median) for engine in (NET, DENSE))
    if found.word == "unclear":
        # A ratio would be read as a result.
        big, words = ours, f"no clear difference to dense XLA's {dense}: within the spread"
    else:
        big = times(1 / found.speedup if found.word == "slower" else found.speedup)
        words = f"{found.word} {'as' if found.word == 'as fast' else 'than'} dense XLA ({ours}, dense {dense})"
    return Card(what, big, [words, f"on {facts.device}"])


def sizes(facts: Facts) -> list[Bar]:
    """What lies on the disk, and what of it is what; this export is the bar of that name."""
    dense, loaded = facts.number("sizes.dense_bytes"), facts.loaded_bytes
    bars = [] if dense is None else [Bar("dense float32", [("dense", "dense", dense)], "the whole net, unpruned")]
    if loaded is not None:
        smaller = ratio(dense, loaded)
        words = " ".join(against_dense(smaller)).removesuffix(" than").removesuffix(" as") if smaller else ""
        bars.append(Bar("this export", _parts(facts, loaded), words))
    return bars + [Bar(name, [(name, "file", count)]) for name, count in facts.other_files.items()]


def _parts(facts: Facts, loaded: float) -> list[tuple[str, str, float]]:
    """The export's bytes: convolutions' weights and indices, other arrays, header and manifest."""
    convs, indices, header = (facts.number(f"sizes.{key}_bytes") for key in ("conv", "conv_index", "header"))
    rest = loaded - (convs or 0) - (header or 0)
    if convs is None or rest < 0:
        return [("weights, indices and header (not told apart)", "net", loaded)]
    parts = (
        ("convolutions: weights", "net", convs - (indices or 0)),
        ("convolutions: which are kept (indices)", "index", indices or 0),
        ("other arrays (BatchNorm, classifier)", "rest", rest),
        ("headers: names, shapes, manifest", "header", header or 0),
    )
    return [part for part in parts if part[2] > 0]


def verdict(facts: Facts, batch: int) -> str | None:
    """This net against dense XLA, and against the fastest other engine."""
    others = {name: timed.median for name, timed in facts.batches[batch].items() if name not in (NET, DENSE)}
    words = [f"against {DENSE}: {found.text}"] if (found := facts.against(batch)) else []
    if others and (found := facts.against(batch, best := min(others, key=others.__getitem__))):
        words.append(f"against {best}, the fastest other engine here: {found.text}")
    return f"This net {'; '.join(words)}." if words else None


def runs(layers: Sequence[Layer]) -> str:
    """How so many layers run, as far as it is known."""
    known = [layer.runs for layer in layers if layer.runs is not None]
    dense = known.count("dense")
    counts = {"by pattern": len(known) - dense, "dense": dense}
    if len(known) == len(layers) > 1 and not all(counts.values()):
        return f"all run {max(counts, key=counts.__getitem__)}"
    return " and ".join(f"{count} run{'s' if count == 1 else ''} {how}" for how, count in counts.items() if count)


def measured(facts: Facts) -> list[str]:
    """How fast the net is, for whatever shape; empty if it was not timed."""
    found = {batch: comparison for batch in facts.batches if (comparison := facts.against(batch)) is not None}
    if not found:
        return []
    words = "; ".join(f"N = {batch}: {comparison.text}" for batch, comparison in found.items())
    said = [f"Measured on {facts.device}, this net against dense XLA: {words}."]
    ran = [layer for layer in facts.layers if layer.runs is not None]
    if ran:
        said.append(f"Of {count_of(len(ran), 'convolution')}, {runs(ran)}.")
    judged = {comparison.word for comparison in found.values()}
    if "faster" in judged:
        if ran and all(layer.runs == "dense" for layer in ran):
            said.append("No convolution runs by its pattern, so that gain comes from elsewhere.")
    elif "unclear" in judged:
        said.append("So the masks make this net smaller; that they make it faster here is not shown.")
    else:
        said.append("So the masks make this net smaller here, not faster.")
    return said


def spread(shared: Sequence[int]) -> str:
    """How many layers have blocks of which size."""
    counts = {filters: shared.count(filters) for filters in sorted(set(shared), reverse=True)}
    return ", ".join(f"{count_of(count, 'layer')} by {filters}" for filters, count in counts.items())


def used(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Patterns by their use; equally used ones stay in the order of their set."""
    return sorted(((text, count) for text, count in counts.items() if count > 0), key=lambda entry: -entry[1])


def provenance(facts: Facts) -> dict[str, Any]:
    """Where it comes from."""
    manifest = facts.items("manifest")
    form = f"{manifest.get('format')}, version {manifest.get('version')}, weights {manifest.get('dtype')}"
    normalise = facts.items("exported.normalise")
    normalised = ", ".join(f"{key} {value}" for key, value in normalise.items()) or "none"
    return {
        "commit": facts.first("setting.commit"),
        "trained on": _device(facts),
        "versions": versions({"python": facts.first("setting.python"), **facts.items("setting.versions")}),
        "exported with": versions(facts.items("manifest.software")),
        "images' fingerprint": facts.first("setting.data_fingerprint", "exported.data.fingerprint"),
        "masks' digest": facts.first("manifest.masks.sha256"),
        "manifest's digest": manifest.get("digest"),
        "format": None if manifest.get("format") is None else form,
        "normalisation": normalised if "normalise" in facts.items("exported") else None,
    }


def _device(facts: Facts) -> str | None:
    device, cpu = facts.items("setting.device"), facts.items("setting.cpu")
    if not device and not cpu:
        return None
    kind = cpu.get("model") if device.get("platform") in (None, "cpu") else device.get("kind")
    cores = cpu.get("cores")
    return f"{kind or NOT_RECORDED}" + (f", {cores} {'core' if cores == 1 else 'cores'}" if cores else "")


def versions(found: Mapping[str, Any]) -> str | None:
    """Packages and their versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version is not None) or None


def settings(facts: Facts) -> dict[str, Any]:
    """The config, flat."""
    return {name: value for name, value in _flat(facts.config) if name not in _LOCAL}


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else value


def rows(text: str) -> list[str] | None:
    """A pattern's rows of 0 and 1, which stand parted by "/"; None if the text is no pattern."""
    found = text.split("/")
    is_pattern = found[0] and all(len(row) == len(found[0]) and not set(row) - {"0", "1"} for row in found)
    return found if is_pattern else None
