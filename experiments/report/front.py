"""README's first figures and its picture, from the committed records: does it compress, is it accurate, is it fast."""

import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiments.configs import price
from experiments.records import RUNS, kept, read_json
from experiments.report import claims, deploy, exports, studies
from experiments.report.results import RECORDS
from experiments.report.statistics import markdown_table, mean_spread
from experiments.report.studies import Cell, Study, mean

_ROOT = RECORDS.parents[1]
README, PICTURE = _ROOT / "README.md", _ROOT / "docs" / "pictures" / "speed.png"
BEGIN, END = "<!-- written by `python -m experiments table --write` -->", "<!-- to here -->"
_NOT_MEASURED = "not measured"
# The comparison and the compression that the first figures are taken from; the recipe whose files are weighed.
_STUDY, _COMPRESSION, _SIZED = "compare-digits", 8.0, "vgg13-cifar10-9.0x"
_OWN = ("price-vgg13-own-9.0x-1x1", "price-vgg13-own-9.0x-64x1")
_DENSE, _NARROW = "price-vgg13-dense", "price-vgg13-narrow-weights"
# What `experiments.report.claims` says of a difference smaller than its spread.
_TIE = "within the spread"
_Answer = tuple[str, list[str]]
_NETS = {"vgg13": "VGG-13", "resnet18": "ResNet-18"}


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
    """One row a question, the answer with its figures."""
    study = _study(records)
    rows = [
        ("Does it compress?", *_compression(records, study)),
        ("Is it as accurate?", *_accuracy(records, study)),
        ("Is it faster to train?", *_training(records, study)),
        ("Is it faster to run, and where?", *_speed(records)),
        ("It, or a narrower dense net?", *_against_narrow(records, study)),
    ]
    return markdown_table(
        ("question", "answer, with its figures"),
        [
            (question, f"**{answer}**: {'; '.join(figure for figure in figures if figure)}")
            for question, answer, figures in rows
        ],
    )


def _study(records: Path) -> Study | None:
    folder = records / _STUDY
    if not (folder / "study.json").exists():
        return None
    study = studies.read(folder)
    return study if study.some_run() else None


def _cell(study: Study) -> Cell | None:
    """ClickTrain's most accurate cell of the compression that is looked at."""
    found = [cell for cell in study.of("ClickTrain") if abs(mean(study.compression(cell)) - _COMPRESSION) < 0.1]
    return max(found, key=lambda cell: mean(cell.top1()), default=None)


def _compression(records: Path, study: Study | None) -> _Answer:
    figures = [f"VGG-13's convolutions {run['conv_compression']:.2f}x" for run in _summaries(records, _OWN[0])[:1]]
    ratios = [mean(study.compression(cell)) for cell in study.of("ClickTrain")] if study else []
    if ratios:
        figures.append(f"the digits net's {min(ratios):.0f}x to {max(ratios):.0f}x")
    return "yes" if figures else _NOT_MEASURED, [*figures, _files(records)]


def _files(records: Path) -> str:
    path = records / "deploy" / "sizes.json"
    rows = [row for row in read_json(path)["rows"] if row["name"] == _SIZED] if path.exists() else []
    row = next((row for row in rows if tuple(row["tile"]) == (1, 1)), None)
    if row is None:
        return f"files: {_NOT_MEASURED}"
    whole, small = (exports.ratio(row[dtype]) for dtype in ("float32", "int8"))
    return f"the exported file of `{_SIZED}` is {whole:.2f} times smaller, {small:.2f} times in int8"


def _summaries(records: Path, name: str) -> list[dict[str, Any]]:
    runs = kept(records / price.GROUP / RUNS)
    return [run["summary"] for run in runs if run["name"] == name and run["summary"] is not None]


def _accuracy(records: Path, study: Study | None) -> _Answer:
    runs, dense = (_summaries(records, name) for name in (_OWN[0], _DENSE))
    answer, figures = _NOT_MEASURED, [f"CIFAR-10: {_NOT_MEASURED}"]
    if runs and dense:
        mine, whole = ([100 * run["final_top1"] for run in each] for each in (runs, dense))
        gap = statistics.fmean(mine) - statistics.fmean(whole)
        answer = f"{abs(gap):.1f} points {'below' if gap < 0 else 'above'} dense on CIFAR-10"
        figures = [
            f"VGG-13, {runs[0]['epochs']} epochs, {len(mine)} seed{'s' if len(mine) > 1 else ''}: {mean_spread(mine)}% "
            f"at {runs[0]['conv_compression']:.2f}x, dense {mean_spread(whole)}%"
        ]
    return answer, [*figures, _digits(study), _published(records)]


def _digits(study: Study | None) -> str:
    cell = study and _cell(study)
    if not cell:
        return ""
    top1, dense = (claims.spread(one.top1()) for one in (cell, study.dense))
    return f"digits, {len(cell.runs)} seeds: {top1}% at {_COMPRESSION:g}x, dense {dense}%"


def _published(records: Path) -> str:
    found = kept(records / "published" / RUNS)
    return "the authors' recipes: see RESULTS.md" if found else f"the authors' recipes at full length: {_NOT_MEASURED}"


def _training(records: Path, study: Study | None) -> _Answer:
    cell = study and _cell(study)
    answer, figures = _NOT_MEASURED, []
    if cell:
        ratio = study.time(cell)
        answer = f"{'no' if mean(ratio) > 1 else 'yes'}, end to end on digits"
        figures = [
            f"{claims.spread(ratio)} of dense's seconds, {claims.spread(study.ratio(cell, 'train_seconds'))} "
            "without compiling"
        ]
    return answer, [*figures, _update(records), _gpu_step(records)]


def _update(records: Path) -> str:
    path = records / "bench" / "step-cpu.json"
    record = read_json(path) if path.exists() else {"results": []}
    found: dict[str, list[float]] = {}
    for row in record["results"]:
        if row["name"].startswith("pruned") and "width 1," in row.get("net", ""):
            found.setdefault(_NETS.get(row["net"].split(",")[0], row["net"]), []).append(row["times_faster"])
    if not found:
        return ""
    said = ", ".join(f"{net} {_span(times)} times" for net, times in found.items())
    cores = record["setting"]["cpu"]["cores"]
    return f"an update of the pruned phase (8x, {_cores(cores)}) against the fastest dense one: {said}"


def _gpu_step(records: Path) -> str:
    found = [read_json(path) for path in sorted((records / "gpu").glob("steps-*.json"))]
    ratios: dict[str, list[float]] = {}
    for kind in {record["setting"]["device"]["kind"] for record in found}:
        of_kind = [record for record in found if record["setting"]["device"]["kind"] == kind]
        rows = [row for record in of_kind if record["ok"] and not record["smoke"] for row in record["steps"]]
        dense = {(row["net"], row["batch"]): row["ms"] for row in rows if row["way"] == "dense"}
        ratios[kind] = [dense[row["net"], row["batch"]] / row["ms"] for row in rows if row["way"] != "dense"]
    said = [
        f"a whole step on an {kind.replace('NVIDIA ', '').split()[0]} {_span(times)} times"
        for kind, times in sorted(ratios.items())
        if times
    ]
    return "; ".join(said) or f"on a GPU: {_NOT_MEASURED}"


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


def times_faster(record: Mapping[str, Any]) -> dict[int, float]:
    """By batch size: the fastest dense engine's median over the exported net's."""
    found = {}
    for size, batch in record["batches"].items():
        dense = [ratio for name, ratio in deploy.ratios(batch).items() if name != deploy.IN_C]
        if dense:
            found[int(size)] = min(dense)
    return found


def _speed(records: Path) -> _Answer:
    parts, found = [], deployed(records)
    ratios = [times_faster(record) for record in found]
    for record, times in zip(found, ratios):
        if times:
            parts.append(f"{_name(record)} {_span(times.values(), 1)}")
    if not parts:
        return _NOT_MEASURED, [f"on a CPU: {_NOT_MEASURED}"]
    every = [ratio for times in ratios for ratio in times.values()]
    answer = f"on CPUs, {_span(every, 1)} times"
    cores = found[0]["setting"]["cpu"]["cores"]
    words = f"whole nets at 8x on {_cores(cores)}, times faster than the fastest dense engine: {', '.join(parts)}"
    return answer, [words, _gpu_export(records)]


def _name(record: Mapping[str, Any]) -> str:
    """The net and what its masks share: a tile of filters, or nothing."""
    net, tile = record["net"]["net"]["name"], tuple(record["tile"] or (1, 1))
    return f"{_NETS.get(net, net)} {'kernel by kernel' if tile == (1, 1) else f'in tiles of {tile[0]}'}"


def _span(values: Collection[float], digits: int = 2) -> str:
    least, most = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return least if least == most else f"{least} to {most}"


def _cores(count: int) -> str:
    return f"{count} core{'s' if count > 1 else ''}"


def _gpu_export(records: Path) -> str:
    found = [read_json(path) for path in (records / "deploy").glob("bench-*.json")]
    measured = any(record["setting"]["device"]["platform"] != "cpu" for record in found)
    return "on a GPU: see BENCHMARKS.md" if measured else f"exported nets on a GPU: {_NOT_MEASURED}"


def _against_narrow(records: Path, study: Study | None) -> _Answer:
    answer, figures = _NOT_MEASURED, []
    cell = study and _cell(study)
    part = claims.against_narrow(study) if cell else None
    row = next((row for row in part.rows if row[0] == cell.label), None) if cell else None
    if row is not None:
        columns = dict(zip(part.header, row))
        shown = [name for name in part.header[1:] if "N=1" in name or "weights" in name]
        latency = columns[shown[0]]
        better = "ClickTrain is more accurate" if not latency.startswith("-") else "a narrow net is more accurate"
        answer = f"at equal speed {'a narrow net does as well' if _TIE in latency else better} on digits"
        said = "; ".join(f"{columns[name]} {name}" for name in shown)
        figures.append(f"its points more than the narrow net's, digits at {_COMPRESSION:g}x: {said}")
    curves = {name: curve(records, name) for name in (_OWN[0], _NARROW)}
    common = max(curves[_OWN[0]].keys() & curves[_NARROW].keys(), default=None)
    if common is not None:
        gap = curves[_OWN[0]][common] - curves[_NARROW][common]
        figures.append(f"VGG-13 on CIFAR-10 at like weights, {common} epochs, one seed: {gap:+.2f}")
        if row is not None and gap > 0:
            answer += ", at equal size ClickTrain is more accurate on CIFAR-10"
    return answer, [*figures, f"CIFAR-10 at equal latency: {_NOT_MEASURED}"]


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6.6, 4), layout="constrained")
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
    plt.close(figure)
