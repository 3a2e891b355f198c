"""README's first figures and its picture, from the committed records: does it compress, is it accurate, is it fast."""

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs import price
from experiments.records import RUNS, kept, read_json
from experiments.report import claims, comparison_records, deploy, exports
from experiments.report.comparison_records import Cell, Study, mean
from experiments.report.results import RECORDS
from experiments.report.statistics import markdown_table

_ROOT = RECORDS.parents[1]
README, PICTURE = _ROOT / "README.md", _ROOT / "docs" / "pictures" / "speed.png"
BEGIN, END = "<!-- written by `python -m experiments table --write` -->", "<!-- to here -->"
_NOT_MEASURED = "not measured"
_DIGITS, _SLIM = "compare-digits", "compare-slim"
# The compression that studies are read at; the recipe whose files are weighed.
_COMPRESSION, _SIZED = 8.0, "vgg13-cifar10-9.0x"
_OWN, _OWN_TILES = "price-vgg13-own-9.0x-1x1", "price-vgg13-own-9.0x-64x64"
_DENSE, _NARROW = "price-vgg13-dense", "price-vgg13-narrow-weights"
# Images a call that are shown: what is answered one by one, and what is gathered; more are in BENCHMARKS.md.
_SIZES = (1, 8, 32)
# What `experiments.report.claims` says of a difference smaller than its spread.
_TIE, _ONE_SEED = "within the spread", " (one seed)"
# An answer in a few words, and the figures that it rests on.
_Answer = tuple[str, list[str]]
_NETS = {"vgg13": "VGG-13", "resnet18": "ResNet-18"}
_NAMES = {_DIGITS: "digits", _SLIM: "quarter-width VGG-11"}


def generate(text: str, records: Path = RECORDS) -> str:
    """README's text with the status table that the records give.

    Args:
        text: of README.md, with the two marks in it.
        records: as experiments/results.

    Raises:
        ValueError: a mark is missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: expected {BEGIN} and {END} around the table")
    return f"{head}{BEGIN}\n{status(records)}{END}{tail}"


def status(records: Path = RECORDS) -> str:
    """One row a question: the answer, and its figures."""
    digits, slim = (_study(records, name) for name in (_DIGITS, _SLIM))
    both = [study for study in (slim, digits) if study]
    rows = [
        ("Is the net smaller?", *_size(records)),
        ("As accurate as the dense net?", *_accuracy(records, both)),
        ("What do tiles cost beside that?", *_tiles(records, both)),
        ("More accurate than a narrow net of its size?", *_at_equal_size(records, both)),
        ("Than a narrow net that is as fast on a CPU?", *_at_equal_speed(both)),
        ("Faster to run on a CPU?", *_speed(records)),
        (
            "Faster to train in your own loop?",
            "no",
            ["by the wrapper alone a step takes as long as before; with `ct.accelerate` after the prune: not measured"],
        ),
        ("Faster to train with `clicktrain train`, on a CPU?", *_training(records, both)),
        ("Faster on a GPU?", *_gpu(records)),
    ]
    return markdown_table(
        ("question", "answer", "measured"),
        [(question, f"**{answer}**", "; ".join(filter(None, figures))) for question, answer, figures in rows],
    )


def _study(records: Path, name: str) -> Study | None:
    folder = records / name
    if not (folder / "study.json").exists():
        return None
    study = comparison_records.read(folder)
    return study if study.some_run() else None


def _cell(study: Study) -> Cell | None:
    """ClickTrain's most accurate cell of the compression that is looked at."""
    found = [cell for cell in study.of("ClickTrain") if abs(mean(study.compression(cell)) - _COMPRESSION) < 0.1]
    return max(found, key=lambda cell: mean(cell.top1()), default=None)


def _size(records: Path) -> _Answer:
    path = records / "deploy" / "sizes.json"
    rows = [row for row in read_json(path)["rows"] if row["name"] == _SIZED] if path.exists() else []
    row = next((row for row in rows if tuple(row["tile"]) == (1, 1)), None)
    if row is None:
        return _NOT_MEASURED, []
    whole, small = (exports.ratio(row[dtype]) for dtype in ("float32", "int8"))
    ratio = f"{_SIZED.rpartition('-')[2].removesuffix('x')} times fewer weights in VGG-13's convolutions"
    return f"{whole:.1f} times", [f"{ratio}; its file beside the dense float32 one; in int8 {small:.0f} times"]


def _summaries(records: Path, name: str) -> list[dict[str, Any]]:
    runs = kept(records / price.GROUP / RUNS)
    return [run["summary"] for run in runs if run["name"] == name and run["summary"] is not None]


def _accuracy(records: Path, both: Sequence[Study]) -> _Answer:
    """Answered by the largest net that was trained."""
    dense, pruned = (_summaries(records, name) for name in (_DENSE, _OWN))
    gaps, figures = [], []
    if dense and pruned:
        where = f"VGG-13 at {pruned[0]['conv_compression']:.0f}x, {_seeds(len(pruned))}"
        gaps.append((where, _top1(pruned) - _top1(dense)))
        figures.append(f"VGG-13, {dense[0]['epochs']} epochs: {_top1(pruned):.1f}%, dense {_top1(dense):.1f}%")
    for study in both:
        cell = _cell(study)
        if cell:
            gaps.append((_told(study, cell), mean(cell.top1()) - mean(study.dense.top1())))
            figures.append(f"{_told(study, cell)}: {abs(gaps[-1][1]):.1f} {'below' if gaps[-1][1] < 0 else 'above'}")
    if not gaps:
        return _NOT_MEASURED, []
    where, gap = gaps[0]
    answer = f"{abs(gap):.1f} points {'below' if gap < 0 else 'above'} ({where})"
    return answer, ["kernel by kernel", *figures, _published(records)]


def _tiles(records: Path, both: Sequence[Study]) -> _Answer:
    """Points that sharing patterns and removals loses, where both were trained."""
    gaps, figures = [], []
    alone, shared = (_summaries(records, name) for name in (_OWN, _OWN_TILES))
    if alone and shared:
        gaps.append(_top1(alone) - _top1(shared))
        figures.append(f"VGG-13 at 9x, tiles of 64, {_seeds(len(shared))}: {gaps[-1]:.1f}")
    for study in both:
        cell = _cell(study)
        tiles = [other for other in study.of("ClickTrain") if cell and other.label == f"{cell.label}, tiles 32x1"]
        for other in tiles:
            mine, theirs = cell.top1(), other.top1()
            lost = {seed: mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()}
            if lost:
                gaps.append(mean(lost))
                figures.append(f"{_told(study, cell, len(lost))}, tiles of 32: {claims.spread(lost, 1)}")
    return (f"{_span(gaps, 1)} points", figures) if gaps else (_NOT_MEASURED, [])


def _told(study: Study, cell: Cell, count: int | None = None) -> str:
    return f"{_NAMES[study.folder.name]}, {_COMPRESSION:g}x, {_seeds(count or len(cell.runs))}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _top1(runs: Sequence[Mapping[str, Any]]) -> float:
    return 100 * statistics.fmean(run["final_top1"] for run in runs)


def _published(records: Path) -> str:
    return "" if kept(records / "published" / RUNS) else f"the paper's recipes: {_NOT_MEASURED}"


def _at_equal_size(records: Path, both: Sequence[Study]) -> _Answer:
    figures, gaps = [], []
    curves = {name: curve(records, name) for name in (_OWN, _NARROW)}
    common = max(curves[_OWN].keys() & curves[_NARROW].keys(), default=None)
    if common is not None:
        gap = curves[_OWN][common] - curves[_NARROW][common]
        gaps.append(f"{gap:+.1f}{_ONE_SEED}")
        figures.append(f"VGG-13 at 9x, {common} epochs, 1 seed: {gap:+.1f} points")
    found, said = _narrow(both, lambda name: "weights" in name)
    return _verdict(gaps + found), figures + said


def _at_equal_speed(both: Sequence[Study]) -> _Answer:
    found, said = _narrow(both, lambda name: "N=1" in name)
    return _verdict(found), said


def _narrow(both: Sequence[Study], wanted: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """ClickTrain's points more than the narrow net's in each study that has them, and as told."""
    found, said = [], []
    for study in both:
        cell, part = _cell(study), claims.against_narrow(study)
        row = next((row for row in part.rows if cell and row[0] == cell.label), None)
        gaps = [] if row is None else [gap for name, gap in zip(part.header[1:], row[1:]) if wanted(name)]
        gaps = [gap for gap in gaps if gap[:1] in "+-0"]
        found += gaps
        for gap in gaps:
            points, _, remark = gap.partition(" (")
            said.append(f"{_told(study, cell)}: {points} points{remark and f' ({remark}'}")
    return found, said


def _verdict(gaps: Sequence[str]) -> str:
    """Of differences as `experiments.report.claims` writes them."""
    if not gaps:
        return _NOT_MEASURED
    clear = [gap for gap in gaps if _TIE not in gap and float(gap.split()[0])]
    if not clear:
        return "no difference seen"
    signs = {gap[0] for gap in clear}
    answer = {"+": "yes", "-": "no"}[signs.pop()] if len(signs) == 1 else "it depends"
    return answer + _ONE_SEED * all(_ONE_SEED in gap for gap in clear)


def _training(records: Path, both: Sequence[Study]) -> _Answer:
    """In times dense's speed, as all speeds of the table: whole runs, and an update after the prune."""
    every, figures, clocks = [], [], set()
    for study in both:
        cell = _cell(study)
        seconds = {} if cell is None else study.time(cell)
        if seconds:
            every.append(1 / mean(seconds))
            clocks.add(study.clock)
            clock = "" if study.clock == comparison_records.SECONDS else f" in {study.clock}"
            figures.append(f"{_told(study, cell, len(seconds))}: {every[-1]:.2f} times{clock}")
    updates = _updates(records)
    if not every:
        return _NOT_MEASURED, [updates]
    answer = "no" if max(every) < 1 else "yes" if min(every) > 1 else "it depends"
    return f"{answer}: whole runs {_span(every)} times{', by two clocks' * (len(clocks) > 1)}", [*figures, updates]


def _updates(records: Path) -> str:
    path = records / "bench" / "step-cpu.json"
    record = read_json(path) if path.exists() else {"results": []}
    found: dict[str, list[float]] = {}
    for row in record["results"]:
        if row["name"].startswith("pruned") and "width 1," in row.get("net", ""):
            found.setdefault(_NETS.get(row["net"].split(",")[0], row["net"]), []).append(row["times_faster"])
    said = " and ".join(f"{net} {_span(times, 1)} times" for net, times in found.items())
    return f"only the updates after the prune, at 8x: {said}" if found else ""


def _gpu_step(records: Path) -> tuple[list[float], str]:
    """An update after the prune, in times the dense one's speed: all of them, and in words."""
    found = [read_json(path) for path in sorted((records / "gpu").glob("steps-*.json"))]
    ratios: dict[str, list[float]] = {}
    for kind in {record["setting"]["device"]["kind"] for record in found}:
        of_kind = [record for record in found if record["setting"]["device"]["kind"] == kind]
        rows = [row for record in of_kind if record["ok"] and not record["smoke"] for row in record["steps"]]
        dense = {(row["net"], row["batch"]): row["ms"] for row in rows if row["way"] == "dense"}
        ratios[kind] = [dense[row["net"], row["batch"]] / row["ms"] for row in rows if row["way"] != "dense"]
    said = [
        f"{_span(times)} times on an {kind.replace('NVIDIA ', '').split()[0]}"
        for kind, times in sorted(ratios.items())
        if times
    ]
    every = [one for times in ratios.values() for one in times]
    return every, f"an update after the prune: {' and '.join(said)}" if said else ""


def deployed(records: Path = RECORDS) -> list[Mapping[str, Any]]:
    """The whole records of exported nets at full width, those on the most cores."""
    found = [read_json(path) for path in sorted((records / "deploy").glob("bench-*.json"))]
    found = [
        one
        for one in found
        if not one["quick"]
        and one["net"]["net"]
        and one["net"]["net"]["width"] == 1
        and one["setting"]["device"]["platform"] == "cpu"
    ]
    most = max((one["setting"]["cpu"]["cores"] for one in found), default=0)
    return [one for one in found if one["setting"]["cpu"]["cores"] == most]


def times_faster(record: Mapping[str, Any], in_c: bool = False) -> dict[int, float]:
    """By the batch sizes that are shown: the fastest dense engine's median over the exported net's, or its C file's."""
    found = {}
    for size, batch in record["batches"].items():
        ratios = deploy.ratios(batch)
        ours = ratios.pop(deploy.IN_C, None) if in_c else 1.0
        ratios.pop(deploy.IN_C, None)
        if int(size) in _SIZES and ratios and ours:
            found[int(size)] = min(ratios.values()) / ours
    return found


def _speed(records: Path) -> _Answer:
    """Against the fastest dense engine of each batch size."""
    found = deployed(records)
    said = _by_shape(found, in_c=False)
    if not said:
        return _NOT_MEASURED, []
    sizes = sorted({size for record in found for size in times_faster(record)})
    nets = " and ".join(sorted({_NETS[record["net"]["net"]["name"]] for record in found}))
    images = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    cores = _cores(found[0]["setting"]["cpu"]["cores"])
    in_c = _by_shape(found, in_c=True)
    figures = [f"{nets} at 8x, {images} images a call, {cores}, against the fastest dense engine"]
    return said, figures + ([f"as one C file: {in_c}"] if in_c else [])


def _by_shape(found: Sequence[Mapping[str, Any]], in_c: bool) -> str:
    parts: dict[str, list[float]] = {}
    for record in found:
        parts.setdefault(_shape(record), []).extend(times_faster(record, in_c).values())
    return ", ".join(f"{name} {_span(times, 1)} times" for name, times in parts.items() if times)


def _name(record: Mapping[str, Any]) -> str:
    """The net and what its masks share."""
    return f"{_NETS[record['net']['net']['name']]} {_shape(record)}"


def _shape(record: Mapping[str, Any]) -> str:
    """What masks share: a tile of filters, or nothing."""
    tile = tuple(record["tile"] or (1, 1))
    return "kernel by kernel" if tile == (1, 1) else f"in tiles of {tile[0]}"


def _span(values: Collection[float], digits: int = 2) -> str:
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} to {most}"


def _cores(count: int) -> str:
    return f"{count} core{'s' if count > 1 else ''}"


def _gpu(records: Path) -> _Answer:
    found = [read_json(path) for path in (records / "deploy").glob("bench-*.json")]
    measured = any(record["setting"]["device"]["platform"] != "cpu" for record in found)
    times, said = _gpu_step(records)
    answer = _NOT_MEASURED if not times else "no" if max(times) < 1 else "yes" if min(times) > 1 else "no gain yet"
    return answer, [said, "to run: see BENCHMARKS.md" if measured else f"to run: {_NOT_MEASURED}"]


def curve(records: Path, name: str) -> dict[int, float]:
    """Top-1 in percent by epochs done, of a run's first seed; as far as it got."""
    lines = next((run["metrics"] for run in kept(records / price.GROUP / RUNS) if run["name"] == name), [])
    return {line["epoch"] + 1: 100 * line["eval_top1"] for line in lines if "eval_top1" in line}


def draw(path: Path = PICTURE, records: Path = RECORDS) -> None:
    """README's picture: whole nets against the fastest dense engine, a group of bars a net; nothing without records."""
    found = [(record, times_faster(record)) for record in deployed(records)]
    found = sorted(((record, times) for record, times in found if times), key=lambda one: -max(one[1].values()))
    if not found:
        return
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure((6.6, 4), layout="constrained")
    axes = figure.subplots()
    sizes_shown = sorted({size for _, times in found for size in times})
    shades = ("#9cc4e4", "#4a90c4", "#15507f")
    height = 0.8 / len(sizes_shown)
    for place, (_, times) in enumerate(found):
        for index, size in enumerate(sizes_shown):
            if size not in times:
                continue
            at = place - 0.4 + (index + 0.5) * height
            label = f"{size} image{'s' if size > 1 else ''} a call" if place == 0 else None
            axes.barh(at, times[size], height * 0.92, color=shades[index % len(shades)], label=label)
            axes.text(times[size] + 0.03, at, f"{times[size]:.1f}", va="center", fontsize=9)
    axes.axvline(1, color="#c70039", linewidth=1)
    axes.text(1.02, -0.55, "dense, fastest engine", color="#c70039", fontsize=9, va="bottom")
    axes.set_yticks(range(len(found)), [_name(record) for record, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.75)
    axes.set_xlim(0, 1.15 * max(max(times.values()) for _, times in found))
    axes.set_xlabel("times faster than the fastest dense engine")
    cores = found[0][0]["setting"]["cpu"]["cores"]
    figure.suptitle(f"Whole nets, 8x fewer convolution weights, {_cores(cores)} of a CPU, float32", fontsize=10)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
