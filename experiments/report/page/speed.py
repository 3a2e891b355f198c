"""How fast the net is: latency bars, a table of its layers, and in words what its shape means."""

from experiments.report.page.charts import Segment, bar, mini_bar
from experiments.report.page.facts import DENSE, NET, Facts, Layer, Timed, compare
from experiments.report.page.markup import (
    Html,
    count_of,
    el,
    figures,
    items,
    join,
    milliseconds,
    number,
    percent,
    ratio,
    size,
    times,
)
from experiments.report.page.overview import NOT_MEASURED, NOT_RECORDED, missing

BENCH = "python -m experiments bench deploy EXPORT"
# Filters that share a mask: from so many on a block fills a vector or matrix unit.
_WIDE = 64


def latency(facts: Facts) -> Html:
    """Bars for each batch size."""
    if not facts.batches:
        return join([
            missing(f"Speed: {NOT_MEASURED} for this export."),
            el("p", "To measure it on this machine: ", el("code", BENCH), "."),
        ])
    versions = ", ".join(f"{name} {version}" for name, version in items(facts.timing.get("versions")).items())
    date = facts.timing.get("date")
    words = (
        f"Milliseconds for a batch of N images, median, on {facts.device}; the line over each bar, and what stands in "
        "brackets, is the 20th to the 80th percentile. Shorter is better. "
        f"Versions: {versions or NOT_RECORDED}; measured on: {NOT_RECORDED if date is None else str(date)[:10]}."
    )
    return join([el("p", words), *(_batch(facts, batch, timed) for batch, timed in facts.batches.items())])


def _batch(facts: Facts, batch: int, timed: dict[str, Timed]) -> Html:
    scale = max(max(entry.median, entry.high) for entry in timed.values())
    bars = []
    for name, entry in timed.items():
        against = None if name == NET else facts.against(batch, name)
        bars.append(_engine(name, entry, batch, scale, against and against.speedup))
    title = f"N = {batch}" + (": one image" if batch == 1 else "")
    return el("figure", el("h3", title), _verdict(facts, batch, timed), el("ul", *bars, class_="bars"))


def _engine(name: str, entry: Timed, batch: int, scale: float, speedup: float | None) -> Html:
    kind = {NET: "net", DENSE: "dense"}.get(name, "other")
    spread = f"{figures(1e3 * entry.low)} to {figures(1e3 * entry.high)}"
    more = [f"{figures(batch / entry.median)} images/s"] if batch > 1 else []
    more += [f"{times(speedup)} this net's time"] if speedup is not None else []
    title = "; ".join([f"{name}: {milliseconds(entry.median)} ({spread})", *more])
    drawn = bar(title, [Segment(name, kind, entry.median)], scale, whisker=(entry.low, entry.high))
    below = join([el("br"), ", ".join(more)]) if more else None
    text = join([el("b", milliseconds(entry.median)), el("span", f" ({spread})", below, class_="soft")])
    ours = "ours" if name == NET else None
    cells = (("name", name), ("drawn", drawn), ("figures", text))
    return el("li", *(el("span", cell, class_=css) for css, cell in cells), class_=ours)


def _verdict(facts: Facts, batch: int, timed: dict[str, Timed]) -> Html | None:
    """This net against dense XLA, and against the fastest other engine."""
    if NET not in timed:
        return missing(f"This net: {NOT_MEASURED}.")
    others = {name: entry.median for name, entry in timed.items() if name not in (NET, DENSE)}
    against = [DENSE] if DENSE in timed else []
    words = [f"against {name}: {facts.against(batch, name).text}" for name in against]
    if others:
        best = min(others, key=others.__getitem__)
        words.append(f"against {best}, the fastest other engine here: {facts.against(batch, best).text}")
    return el("p", f"This net {'; '.join(words)}.") if words else None


def layers(facts: Facts) -> Html:
    """A row for each convolution."""
    found = facts.layers
    if not found:
        return missing(f"Layers: {NOT_RECORDED}.")
    notes = [
        "Convolutions in the order of the net. Shape: rows × columns, input → output channels. Tile: "
        "(filters, channels) that share a pattern and a removal."
    ]
    has_bytes, has_times = any(layer.stored for layer in found), any(layer.dense_s for layer in found)
    slowest = max((max(layer.dense_s or 0, layer.pattern_s or 0) for layer in found), default=0)
    if not has_bytes:
        notes.append(f"Bytes in the file: {NOT_RECORDED}.")
    if has_times:
        batch = f" for N = {min(facts.batches)}" if facts.batches else ""
        notes.append(
            f"Times are of each layer alone{batch}, on {facts.device}: its weights then stay in the cache, as they do "
            "not in the net. Upper bar dense, lower bar by its pattern."
        )
    else:
        notes.append(f"Time of each layer: {NOT_MEASURED}.")
    names = ["layer", "shape", "tile", "weights kept"]
    names += ["in the file"] if has_bytes else []
    names += ["dense, ms", "by pattern, ms", "runs", "why"] if has_times else []
    numeric = {"weights kept", "in the file", "dense, ms", "by pattern, ms"}
    header = (el("th", name, scope="col", class_="num" if name in numeric else None) for name in names)
    rows = (_row(layer, has_bytes, has_times, slowest) for layer in found)
    foot = _totals(found, has_bytes, has_times)
    table = el("table", el("thead", el("tr", *header)), el("tbody", *rows), el("tfoot", foot), class_="layers")
    box = el("div", table, class_="scroll", tabindex="0", role="region", aria_label="Table of the layers")
    return join([el("p", " ".join(notes)), box])


def _row(layer: Layer, has_bytes: bool, has_times: bool, slowest: float) -> Html:
    cells = [
        el("th", el("span", layer.name, class_="name"), scope="row"),
        el("td", _shape(layer), class_="tight"),
        el("td", _shared(layer), class_="tight"),
        el("td", percent(layer.share, 1), mini_bar([(layer.share, "net")]), class_="num")
        if layer.share is not None
        else el("td", NOT_RECORDED),
    ]
    if has_bytes:
        cells.append(_bytes_cell(layer))
    if has_times:
        cells += _time_cells(layer, slowest)
    return el("tr", *cells)


def _shape(layer: Layer) -> str:
    if layer.shape is None:
        return NOT_RECORDED
    rows, columns, cin, cout = layer.shape
    return f"{rows}×{columns}, {cin} → {cout}"


def _shared(layer: Layer) -> str:
    """(filters, channels) that share a pattern and a removal."""
    if layer.tile is None:
        return "not pruned" if layer.share == 1 else "–"
    words = str(layer.tile)
    return words if layer.removal_tile in (None, layer.tile) else f"{words}, removal {layer.removal_tile}"


def _bytes_cell(layer: Layer) -> Html:
    if layer.stored is None:
        return el("td", NOT_RECORDED, class_="num")
    smaller = ratio(4 * layer.weights, layer.stored) if layer.weights else None
    # A layer that is stored as it is: nothing is smaller.
    shown = smaller is not None and smaller > 1.005
    more = join([el("br"), el("span", f"{times(smaller)} smaller", class_="soft")]) if shown else None
    return el("td", size(layer.stored), more, class_="num")


def _time_cells(layer: Layer, slowest: float) -> list[Html]:
    bars = mini_bar([((layer.dense_s or 0) / slowest, "dense"), ((layer.pattern_s or 0) / slowest, "net")])
    more = None
    if layer.dense_s and layer.pattern_s:
        dense, by_pattern = (Timed(seconds, seconds, seconds) for seconds in (layer.dense_s, layer.pattern_s))
        more = join([el("br"), el("span", compare(dense, by_pattern).text, class_="soft")])
    by_pattern = "–" if layer.pattern_s is None else figures(1e3 * layer.pattern_s)
    mark = "mark" if layer.runs in (None, "dense") else "mark pattern"
    return [
        el("td", NOT_MEASURED, class_="num")
        if layer.dense_s is None
        else el("td", figures(1e3 * layer.dense_s), bars, class_="num"),
        el("td", by_pattern, more, class_="num"),
        el("td", el("span", layer.runs or NOT_RECORDED, class_=mark)),
        el("td", layer.why or "–", class_="why"),
    ]


def _totals(found: list[Layer], has_bytes: bool, has_times: bool) -> Html:
    counted = [layer for layer in found if layer.share is not None]
    share = ratio(sum(layer.retained for layer in counted), sum(layer.weights for layer in counted))
    cells = [el("th", f"all {len(found)}", scope="row"), el("td"), el("td")]
    cells.append(el("td", "–" if share is None else percent(share, 1), class_="num"))
    if has_bytes:
        cells.append(el("td", size(sum(layer.stored or 0 for layer in found)), class_="num"))
    if has_times:
        dense = sum(layer.dense_s or 0 for layer in found)
        cells += [el("td", figures(1e3 * dense), class_="num"), el("td"), el("td", _runs(found), colspan="2")]
    return el("tr", *cells)


def _runs(found: list[Layer]) -> str:
    """How so many layers run, as far as it is known."""
    known = [layer.runs for layer in found if layer.runs is not None]
    dense = known.count("dense")
    counts = {"by pattern": len(known) - dense, "dense": dense}
    if len(known) == len(found) > 1 and not all(counts.values()):
        return f"all run {max(counts, key=counts.__getitem__)}"
    return " and ".join(f"{count} run{'s' if count == 1 else ''} {how}" for how, count in counts.items() if count)


def meaning(facts: Facts) -> Html:
    """What the masks' shape means for speed: words that follow from the config and from what was measured."""
    shared = [layer.shared_filters for layer in facts.layers if layer.shared_filters is not None]
    if facts.is_dense:
        said = ["This run pruned nothing: there is no pattern to run by, the net is dense."]
    elif not shared:
        said = [f"In which shape this net was pruned is {NOT_RECORDED}, so nothing is said here about its speed."]
    elif max(shared) == 1:
        said = _alone(facts)
    elif max(shared) >= _WIDE:
        said = _wide(facts, shared)
    else:
        said = _narrow(facts, shared)
    return el("div", *(el("p", sentence) for sentence in [*said, *_measured(facts)]), class_="words")


def _alone(facts: Facts) -> list[str | Html]:
    prune, filters = facts.prune, next((layer.tile[0] for layer in facts.layers if layer.tile), 1)
    if prune.get("quads"):
        shape = (
            "The patterns of 4 neighbouring input channels were chosen jointly, 2:4 sparse at every tap. Sparse tensor "
            f"cores are made for that; their speed with this net is {NOT_MEASURED} here."
        )
    elif filters > 1:
        shape = (
            f"Patterns are shared by up to {filters} filters, but kernels are removed one at a time (removal tile "
            "(1, 1)), so neighbouring filters still read different inputs."
        )
    else:
        shape = (
            "Every kernel chose its own pattern and was kept or removed alone: tile (1, 1), the paper's form. The file "
            "is small and the results are correct, but neighbouring filters read different inputs."
        )
    instead = join([
        "When speed is wanted, choose ", el("code", "tile=(64, 1)"), " (", el("code", "--method.tile 64 1"),
        "): 64 filters share each pattern and each removal, and a block of them is a smaller dense convolution. "
        "What that costs in accuracy stands in RESULTS.md; another way to prune means training again.",
    ])
    general = (
        "Such a convolution has no block of work to leave out as a whole: tensor cores and XLA cannot run it fast. The "
        "native kernels for CPUs (backend cpu) leave out its work kernel by kernel, and gain less by it than in tiles."
    )
    return [shape, general, instead]


def _wide(facts: Facts, shared: list[int]) -> list[str | Html]:
    kept = number(facts.summary.get("conv_compression"))
    work = f", here 1/{figures(kept)} of the weights" if kept else ""
    if facts.prune.get("superset"):
        how = "which does the share of the work that the blocks' taps retain"
    else:
        how = f"which does the retained share of the work{work}"
    return [f"{_blocks(facts, shared)} so a block is a smaller dense convolution: it can be run by its pattern, {how}."]


def _narrow(facts: Facts, shared: list[int]) -> list[str | Html]:
    return [
        f"{_blocks(facts, shared)} so a block is a smaller dense convolution, but a narrow one: vector and matrix "
        "units are filled only in part.",
        join(["Wider blocks gain more: ", el("code", "tile=(64, 1)"), " is the shape to choose when speed is wanted."]),
    ]


def _blocks(facts: Facts, shared: list[int]) -> str:
    """What a block of filters has in common; the sentence goes on."""
    taps = number(facts.prune.get("superset"))
    blocks, spread = f"Blocks of up to {max(shared)} filters share", _spread(shared)
    if taps:
        return (
            f"{blocks} {taps:g} taps and each removal ({spread}); every kernel has its own pattern among those taps. "
            f"All filters of a block read the same inputs at {taps:g} taps,"
        )
    return f"{blocks} each pattern and each removal ({spread}). All filters of a block read the same inputs and taps,"


def _spread(shared: list[int]) -> str:
    counts = {filters: shared.count(filters) for filters in sorted(set(shared), reverse=True)}
    return ", ".join(f"{count_of(count, 'layer')} by {filters}" for filters, count in counts.items())


def _measured(facts: Facts) -> list[str | Html]:
    """What was measured, for whatever shape."""
    found = {batch: facts.against(batch) for batch in facts.batches}
    found = {batch: comparison for batch, comparison in found.items() if comparison is not None}
    if not found:
        return [join([f"How fast this net is against the dense one is {NOT_MEASURED}: ", el("code", BENCH), " tells."])]
    words = "; ".join(f"N = {batch}: {comparison.text}" for batch, comparison in found.items())
    said = [f"Measured on {facts.device}, this net against dense XLA: {words}."]
    ran = [layer for layer in facts.layers if layer.runs is not None]
    by_pattern = sum(layer.runs != "dense" for layer in ran)
    if ran:
        said.append(f"Of {count_of(len(ran), 'convolution')}, {_runs(ran)}.")
    words_found = {comparison.word for comparison in found.values()}
    if "faster" in words_found:
        if ran and not by_pattern:
            said.append("No convolution runs by its pattern, so that gain comes from elsewhere.")
    elif "unclear" in words_found:
        said.append("So the masks make this net smaller; that they make it faster here is not shown.")
    else:
        said.append("So the masks make this net smaller here, not faster.")
    return said
