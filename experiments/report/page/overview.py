"""The page's beginning: what was run, four big figures, accuracy by epoch, file sizes."""

from typing import Any

from experiments.data import is_lossy
from experiments.report.page.charts import Band, Curve, Event, Segment, bar, legend, line_chart
from experiments.report.page.facts import DENSE, MANIFEST, NET, WEIGHTS, Facts
from experiments.report.page.markup import (
    Html,
    count_of,
    el,
    figures,
    join,
    milliseconds,
    number,
    percent,
    pick,
    ratio,
    size,
    times,
)
from experiments.report.plots import accuracy_range

NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
_KINDS = {"regularize": "regularize", "prune": "pruned", "pruned": "pruned"}
_EVENTS = {"select": "select: masks chosen", "prune": "prune: masked weights set to zero"}


def missing(words: str) -> Html:
    """A sentence about what is not there."""
    return el("p", words, class_="missing")


def head(facts: Facts) -> Html:
    """Name, what it is, and the figures that most people want to know."""
    rows = {
        "net": _net(facts),
        "data": _data(facts),
        "seed": _or(facts.anywhere("seed")),
        "epochs": _or(facts.anywhere("epochs")),
        "trained": _date(facts),
    }
    entries = (el("div", el("dt", name), el("dd", text)) for name, text in rows.items())
    cards = (_accuracy_card(facts), _conv_card(facts), _file_card(facts), _speed_card(facts))
    return el(
        "header",
        el("p", "clicktrain-jax: an exported net", class_="eyebrow"),
        el("h1", facts.name),
        el("dl", *entries, class_="facts"),
        el("ul", *cards, class_="cards"),
    )


def _or(value: Any, otherwise: str = NOT_RECORDED) -> str:
    return otherwise if value is None else str(value)


def _net(facts: Facts) -> str:
    if facts.net is None:
        return "a net of the user's own" if "net" in facts.exported else NOT_RECORDED
    width = number(facts.anywhere("width") or pick(facts.exported, "net", "width"))
    width_words = "" if width in (None, 1) else f", {width:g} of its full width"
    kept = facts.manifest.get("dtype")
    return f"{facts.net}{width_words}{f', stored as {kept}' if kept else ''}"


def _data(facts: Facts) -> str:
    name = facts.summary.get("dataset") or pick(facts.exported, "data", "name") or pick(facts.config, "data", "name")
    encoding = facts.summary.get("encoding") or pick(facts.exported, "data", "encoding")
    if name is None:
        return NOT_RECORDED
    if encoding is None:
        return f"{name}, encoding not recorded"
    if not is_lossy(str(encoding)):
        return f"{name}, {encoding} pixels" if encoding == "raw" else f"{name}, {str(encoding).upper()}-coded"
    lossy = ": lossy, accuracies do not compare with published ones" if str(name).startswith("cifar") else ""
    return f"{name}, {str(encoding).upper()}-coded{lossy}"


def _date(facts: Facts) -> str:
    date = facts.setting.get("date")
    return NOT_RECORDED if date is None else str(date).replace("T", " ").replace("+00:00", " UTC")


def _card(what: str, big: str | None, *more: str, otherwise: str = NOT_MEASURED) -> Html:
    shown = el("span", big or otherwise, class_="big" if big else "big missing")
    below = (el("span", words, class_="more") for words in more if words)
    return el("li", el("span", what, class_="what"), shown, *below)


def _accuracy_card(facts: Facts) -> Html:
    top1, examples = (number(pick(facts.exported, "accuracy", key)) for key in ("top1", "examples"))
    trained = number(facts.summary.get("final_top1")) or number(pick(facts.exported, "accuracy", "run_top1"))
    split = pick(facts.exported, "accuracy", "split") or facts.summary.get("eval_split")
    examples = examples or number(facts.summary.get("eval_examples"))
    on = "" if split is None else f"{split} set" + ("" if not examples else f" of {count_of(int(examples), 'image')}")
    if trained is None:
        masked = f"masked net in training: {NOT_RECORDED}"
    else:
        masked = f"masked net in training: {percent(trained)}"
        if top1 is not None:
            masked += ", the same" if percent(top1) == percent(trained) else f", {100 * (top1 - trained):+.2f} points"
    return _card("Top-1 accuracy at export", None if top1 is None else percent(top1), on, masked)


def _conv_card(facts: Facts) -> Html:
    dense, stored = (number(facts.sizes.get(key)) for key in ("conv_dense_bytes", "conv_bytes"))
    # Headers count in full: what tells where the convolutions are belongs to them.
    stored = None if stored is None else stored + (number(facts.sizes.get("header_bytes")) or 0)
    smaller, fewer = ratio(dense, stored), _fewer_weights(facts)
    weights = f"{times(fewer)} fewer weights" if fewer else ""
    if smaller is None:
        known = (times(fewer), "fewer weights") if fewer else (None,)
        return _card("Convolutions", *known, f"bytes {NOT_RECORDED}" if fewer else "", otherwise=NOT_RECORDED)
    big, word = _against_dense(smaller)
    words = f"{word} dense float32: {size(dense)} in {size(stored)}, indices and headers included"
    return _card("Convolutions", big, words, weights)


def _fewer_weights(facts: Facts) -> float | None:
    known = number(facts.summary.get("conv_compression")) or number(facts.exported.get("conv_compression"))
    counted = [layer for layer in facts.layers if layer.share is not None]
    total = ratio(sum(layer.weights for layer in counted), sum(layer.retained for layer in counted))
    return known or total


def _file_card(facts: Facts) -> Html:
    dense, loaded = number(facts.sizes.get("dense_bytes")), facts.loaded_bytes
    smaller = ratio(dense, loaded)
    if smaller is None:
        return _card("File", None, otherwise=NOT_RECORDED)
    big, word = _against_dense(smaller)
    return _card("File", big, f"{word} dense float32: {size(dense)} in {size(loaded)}, manifest included")


def _against_dense(smaller: float) -> tuple[str, str]:
    """A ratio of sizes as a figure and words; what is stored as it is grows by its headers."""
    if 0.99 < smaller < 1.01:
        return times(smaller), "as large as"
    return times(max(smaller, 1 / smaller)), "smaller than" if smaller > 1 else "larger than"


def _speed_card(facts: Facts) -> Html:
    found = facts.against(1)
    if found is None:
        return _card("Time for one image (N = 1)", None)
    ours, dense = (milliseconds(facts.batches[1][engine].median) for engine in (NET, DENSE))
    if found.word == "unclear":
        # A ratio would be read as a result.
        big, words = ours, f"no clear difference to dense XLA's {dense}: within the spread"
    else:
        big = times(1 / found.speedup if found.word == "slower" else found.speedup)
        words = f"{found.word} {'as' if found.word == 'as fast' else 'than'} dense XLA ({ours}, dense {dense})"
    return _card("Time for one image (N = 1)", big, words, f"on {facts.device}")


def accuracy(facts: Facts) -> Html:
    """Accuracy and loss by epoch, with the phases behind them."""
    lines = facts.lines
    if not lines:
        return missing(f"Accuracy by epoch: {NOT_RECORDED}. This export holds no metrics of a training run.")
    x_end = max(line["epoch"] for line in lines) + 1
    place = {"bands": _bands(lines), "events": _events(lines), "x_end": x_end, "x_name": "epochs trained"}
    tested = Curve("top-1 of the evaluation set", _percents(lines, "eval_top1"))
    trained = Curve("top-1 in training (with augmentation and dropout, where used)", _percents(lines, "train_top1"))
    losses = [
        Curve("loss of the evaluation set", _points(lines, "eval_loss")),
        Curve("loss in training", _points(lines, "train_loss")),
    ]
    drawn = []
    if tested.points or trained.points:
        drawn.append(_accuracy_chart([tested, trained], place))
    if any(curve.points for curve in losses):
        drawn.append(_loss_chart(losses, place))
    return join([*drawn, _epoch_table(lines)])


def _points(lines: list, key: str) -> list[tuple[float, float]]:
    """An epoch's line tells what holds when the epoch is over."""
    values = ((line["epoch"], number(line.get(key))) for line in lines)
    return [(epoch + 1, value) for epoch, value in values if value is not None]


def _percents(lines: list, key: str) -> list[tuple[float, float]]:
    return [(epoch, 100 * value) for epoch, value in _points(lines, key) if value <= 1]


def _phases(line: Any) -> list[str]:
    phases = line.get("phases")
    return [phase for phase in phases if isinstance(phase, str)] if isinstance(phases, list | tuple) else []


def _bands(lines: list) -> list[Band]:
    """A band for each stretch of epochs that end in the same phase."""
    bands: list[Band] = []
    for line in lines:
        phases, epoch = _phases(line), line["epoch"]
        name = phases[-1] if phases else "phase not recorded"
        if bands and bands[-1].name == name:
            bands[-1] = bands[-1]._replace(end=epoch + 1)
        else:
            bands.append(Band(name, _KINDS.get(name, "dense"), epoch, epoch + 1))
    return bands


def _events(lines: list) -> list[Event]:
    """What happens in one update: the choice of the masks (perhaps twice), and the pruning."""
    return [
        Event(_EVENTS[phase], line["epoch"])
        for line in lines for phase in _phases(line) if phase in _EVENTS
    ] 


def _accuracy_chart(curves: list[Curve], place: dict[str, Any]) -> Html:
    shown = [y for curve in curves[:1] if curve.points for _, y in curve.points] or [y for _, y in curves[1].points]
    low, high = accuracy_range([shown])
    below = sum(y < low for y in shown)
    cut = f" The axis begins at {low:g} %: {count_of(below, 'epoch')} below it, see the table." if below else ""
    best = max(shown)
    words = f"Top-1 after each epoch, in %. Last {shown[-1]:.2f}, best {best:.2f}.{cut}"
    chart = line_chart(
        "accuracy", "Accuracy by epoch", words, [curve for curve in curves if curve.points], y_range=(low, high),
        y_name="top-1, %", height=280, last_label=f"{shown[-1]:.2f} %", **place,
    ) 
    return el("figure", el("figcaption", words), chart)


def _loss_chart(curves: list[Curve], place: dict[str, Any]) -> Html:
    curves = [curve for curve in curves if curve.points]
    values = sorted(y for curve in curves for _, y in curve.points)
    # Likewise: one bad epoch would flatten all others.
    top = max(values[min(len(values) - 1, round(0.95 * len(values)))], 1e-6)
    high = figures(1.1 * top, 2)
    cut = sum(value > float(high.replace(",", "")) for value in values)
    more = f" The axis ends at {high}: {count_of(cut, 'value')} above it, see the table." if cut else ""
    words = f"Cross-entropy after each epoch. Last {figures(curves[0].points[-1][1])}.{more}"
    chart = line_chart(
        "loss", "Loss by epoch", words, curves, y_range=(0.0, float(high.replace(",", ""))), y_name="loss, nats",
        height=150, last_label=figures(curves[0].points[-1][1]), explained=False, **place,
    ) 
    return el("figure", el("figcaption", words), chart)


def _epoch_table(lines: list) -> Html:
    columns = ("epoch", "phases", "top-1, evaluation", "training", "loss, evaluation", "training", "seconds, training")
    rows = []
    for line in lines:
        cells = [_cell(line.get(key), percent) for key in ("eval_top1", "train_top1")]
        cells += [_cell(line.get(key), lambda value: f"{value:.4f}") for key in ("eval_loss", "train_loss")]
        cells.append(_cell(line.get("train_seconds"), figures))
        epoch = f"{line['epoch'] + 1:g}"
        first = el("th", epoch, scope="row"), el("td", ", ".join(_phases(line)), class_="tight")
        rows.append(el("tr", *first, *(el("td", cell, class_="num") for cell in cells)))
    header = (el("th", name, scope="col", class_="num" if index > 1 else None) for index, name in enumerate(columns))
    table = el("table", el("thead", el("tr", *header)), el("tbody", *rows), class_="epochs")
    box = el("div", table, class_="scroll tall", tabindex="0", role="region", aria_label="Numbers of each epoch")
    return el("details", el("summary", f"The numbers of {count_of(len(lines), 'epoch')}"), box)


def _cell(value: Any, written: Any) -> str:
    known = number(value)
    return "" if known is None else written(known)


def sizes(facts: Facts) -> Html:
    """What lies on the disk, and what of it is what."""
    dense, loaded = number(facts.sizes.get("dense_bytes")), facts.loaded_bytes
    if dense is None and not facts.files:
        return missing(f"File sizes: {NOT_RECORDED}.")
    others = {name: count for name, count in facts.files.items() if name not in (MANIFEST, WEIGHTS)}
    bars = []
    if dense is not None:
        bars.append(("dense float32", [Segment("dense float32", "dense", dense)], "the whole net, unpruned"))
    parts = _parts(facts)
    if loaded is not None:
        smaller = ratio(dense, loaded)
        words = " ".join(_against_dense(smaller)).removesuffix(" than").removesuffix(" as") if smaller else ""
        bars.append(("this export", parts, words))
    bars += [(name, [Segment(name, "file", count)], "") for name, count in others.items()]
    scale = max(sum(part.amount for part in segments) for _, segments, _ in bars)
    drawn = (_size_bar(name, segments, words, scale or 1) for name, segments, words in bars)
    keys = legend([(_key(part.kind), f"{part.name}: {size(part.amount)}") for part in parts])
    total = sum(facts.files.values())
    words = f"This export is {WEIGHTS} and {MANIFEST}: all that a net is loaded from. 1 kB is 1,000 bytes."
    if others:
        words += f" With {count_of(len(others), 'further file')} the folder takes {size(total)}."
    caption = el("figcaption", words)
    return el("figure", caption, el("ul", *drawn, class_="bars"), keys if parts else None)


def _key(kind: str) -> Html:
    return el("rect", width="24", height="12", class_=f"bar-{kind}")


def _size_bar(name: str, segments: list[Segment], words: str, scale: float) -> Html:
    total = sum(part.amount for part in segments)
    drawn = el("span", bar(f"{name}: {size(total)}", segments, scale), class_="drawn")
    text = join([el("b", size(total)), el("span", f", {words}", class_="soft") if words else None])
    ours = "ours" if name == "this export" else None
    return el("li", el("span", name, class_="name"), drawn, el("span", text, class_="figures"), class_=ours)


def _parts(facts: Facts) -> list[Segment]:
    """The export's bytes: convolutions' weights and indices, other arrays, header and manifest."""
    if facts.loaded_bytes is None:
        return []
    keys = ("conv_bytes", "conv_index_bytes", "header_bytes")
    convs, indices, header = (number(facts.sizes.get(key)) for key in keys)
    rest = facts.loaded_bytes - (convs or 0) - (header or 0)
    if convs is None or rest < 0:
        return [Segment("weights, indices and header (not told apart)", "net", facts.loaded_bytes)]
    parts = (
        ("convolutions: weights", "net", convs - (indices or 0)),
        ("convolutions: which are kept (indices)", "index", indices or 0),
        ("other arrays (BatchNorm, classifier)", "rest", rest),
        ("headers: names, shapes, manifest", "header", header or 0),
    )
    return [Segment(*part) for part in parts if part[2] > 0]
