"""A comparison's part of RESULTS.md and its joint.csv: one row a cell, what is claimed, and how it was tuned."""

import statistics
from collections.abc import Mapping, Sequence

from experiments.report import claims
from experiments.report.claims import UNKNOWN, spread
from experiments.report.comparison_records import BATCHES, CPU_SECONDS, SECONDS, Cell, Study, mean
from experiments.report.statistics import coding, csv_text, markdown_table

CSV, PLOT, WIDE, TUNING = "joint.csv", "joint.png", "wide.csv", "tuning.csv"
NOT_RUN = "not run"
COLUMNS = (
    "method",
    "cell",
    "n",
    "top-1, %",
    "against dense",
    "conv",
    "model",
    "multiply-adds",
    "training multiply-adds",
    "end-to-end s",
    "of dense",
    "without compiling",
    "CPU s, of dense",
    "tuning s",
    "of dense, with tuning",
    "peak MB",
    *(text for batch in BATCHES for text in (f"ms, N={batch}", f"speed-up, N={batch}")),
)
# What a column of figures by seed is called in the CSV file.
_FIGURES = (
    "top1_percent",
    "top1_less_dense_points",
    "conv_compression",
    "model_compression",
    "multiply_adds_of_dense",
    "training_multiply_adds_of_dense",
    "end_to_end_seconds",
    "end_to_end_seconds_of_dense",
    "training_seconds_of_dense",
    "cpu_seconds_of_dense",
    "tuning_seconds",
    "seconds_with_tuning_of_dense",
    "training_peak_mb",
)
_EXPLAINED = """Final top-1 in percent, mean ± standard deviation over the seeds; "against dense" in points, paired by
seed. Compression: weights of all convolutions of the dense net over those retained. Seconds are training, compiling and
whatever a run measures to choose its ways, as the mean share of dense's in runs of equal seeds; a process compiles and
measures once, which every seed is charged with. Where the cores did other work at the same time, CPU seconds stand in
their place, in the claims too: of all threads, of runs that one commit made on one kind of machine; compiling is among
them as far as that very run compiled. The wide tables have more: the whole model's compression, multiply-adds of one
image and of the training as it was executed, seconds of tuning, the peak of memory, and milliseconds a call of the nets
of one seed, whose weights and masks were checked to be those of the same row.
"""
# Columns of the wide table that RESULTS.md shows, after the cell; and those of time, by what they are called there.
_SHOWN = ("n", "top-1, %", "against dense", "conv")
_SECONDS = {"seconds, of dense": "of dense"}
_CPU_SECONDS = {"CPU seconds, of dense": "CPU s, of dense"}


def by_seed(study: Study, cell: Cell) -> dict[str, Mapping[int, float]]:
    """Every figure of a cell that its runs have, by seed; empty where it was not measured."""
    dense = study.dense.top1()
    return dict(
        zip(
            _FIGURES,
            (
                cell.top1(),
                {seed: top1 - dense[seed] for seed, top1 in cell.top1().items() if seed in dense},
                study.compression(cell),
                study.compression(cell, "model"),
                study.ratio(cell, "retained_multiply_adds", "multiply_adds"),
                study.ratio(cell, "training_multiply_adds"),
                cell.seconds(),
                study.time(cell) if study.clock == SECONDS else {},
                study.ratio(cell, "train_seconds"),
                study.processor_time(cell),
                {} if cell.tuning_s is None else dict.fromkeys(cell.runs, cell.tuning_s),
                study.time_with_tuning(cell),
                {seed: count / 1e6 for seed, count in cell.column("training_bytes").items()},
            ),
            strict=True,
        )
    )


def generate(study: Study, plot: str | None = None) -> str:
    """The section of one comparison, in Markdown.

    Args:
        study: from `experiments.report.comparison_records.read`.
        plot: link to its sheet; None for none.
    """
    found = claims.parts(study)
    texts = [_head(study), _claims(study, found), _joint(study)]
    if plot is not None and study.some_run() is not None:
        texts.append(f"![Accuracy against compression, training seconds and latency]({plot})\n")
        folder = plot.rpartition("/")[0]
        links = ", ".join(f"[{name}]({folder}/{name})" if folder else f"[{name}]({name})" for name in files(study))
        texts.append(f"Wide tables, and what the claims were read from: {links}.\n")
    return "\n".join(texts)


def files(study: Study) -> dict[str, str]:
    """The study's CSV files, by name: figures unrounded, the wide table, what each claim was read from, tuning."""
    found = {CSV: to_csv(study), WIDE: csv_text(COLUMNS, [_row(study, cell) for cell in study.ordered()])}
    for part in claims.parts(study):
        if part.rows:
            name = part.title.lower().replace(" ", "-")
            found[f"{name}.csv"] = csv_text(part.header, part.rows)
    if study.facts.get("tuning"):
        found[TUNING] = _tuning(study)
    return found


def to_csv(study: Study) -> str:
    """The joint table's figures unrounded: mean and standard deviation of each, empty where not measured."""
    header = ["cell", "method", "label", "family", "n"]
    header += [f"{name}_{what}" for name in _FIGURES for what in ("mean", "std")]
    header += [name for batch in BATCHES for name in (f"latency_ms_n{batch}", f"speed_up_n{batch}")]
    rows = []
    for cell in study.ordered():
        row = [cell.name, cell.method, cell.label, cell.family, str(len(cell.runs))]
        for values in by_seed(study, cell).values():
            row += [_number(mean(values)), _number(statistics.stdev(values.values()) if len(values) > 1 else None)]
        for batch in BATCHES:
            seconds = cell.latency_s(batch)
            row += [_number(None if seconds is None else 1e3 * seconds), _number(study.speed_up(cell, batch))]
        rows.append(row)
    return csv_text(header, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _head(study: Study) -> str:
    lines = [f"### {study.facts['title']}\n"]
    run = study.some_run()
    if run is None:
        return lines[0] + f"\nNo run is recorded yet: {NOT_RUN}.\n"
    counts = sorted({len(cell.runs) for cell in study.cells if cell.runs})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    width = "" if run["width"] == 1 else f" of width {run['width']:g}"
    lines.append(
        f"{run['dataset']} ({coding(run['encoding'])}), {run['train_examples']:,} training images, "
        f"{run['eval_split']} set of {run['eval_examples']:,}; {run['net']}{width}, "
        f"{study.facts.get('epochs', run['epochs'])} epochs, {seeds} seed{'s' * (counts != [1])}; "
        f"{', '.join(study.machines())}; "
        f"jax {run['setting']['versions']['jax']}; {study.date()}. Command: "
        f"`{study.facts['command']}`.\n"
    )
    return "\n".join(lines)


def _claims(study: Study, parts: Sequence[claims.Part]) -> str:
    doubts = study.doubts()
    head = f"The claims count for little here; {doubts}.\n\n" if doubts else ""
    if study.clock == CPU_SECONDS:
        head += "Time is told in CPU seconds, as the cores did other work too, which slows every run a little.\n\n"
    return head + "".join(f"- **{claim.verdict}**: {claim.text}\n" for part in parts for claim in part.claims)


def verdicts(compared: Sequence[Study]) -> str:
    """How many claims hold, over all comparisons: the first sentence of RESULTS.md."""
    found = [claim.verdict for study in compared for part in claims.parts(study) for claim in part.claims]
    others = ", ".join(
        f"{found.count(verdict)} {words}"
        for verdict, words in (
            (claims.FAILS, "do not"),
            (claims.UNTOLD, "cannot be told"),
            (claims.UNKNOWN, "are not measured"),
        )
    )
    doubtful = sum(bool(study.doubts()) for study in compared)
    short = f"; the records of {doubtful} of them are too short to count" if doubtful else ""
    held = f"**{found.count(claims.HOLDS)} of {len(found)} claims hold**"
    return f"{held}; {others} (comparisons: {len(compared)}{short})."


def _joint(study: Study) -> str:
    shown = dict(zip(_SHOWN, _SHOWN)) | (_SECONDS if study.clock == SECONDS else _CPU_SECONDS)
    places = [COLUMNS.index(name) for name in shown.values()]
    rows = []
    for cell in study.ordered():
        row = _row(study, cell)
        label = row[1] if row[0] == row[1] else f"{row[0]}: {row[1]}"
        rows.append((label, *(row[place] for place in places)))
    return markdown_table(("cell", *shown), rows)


def _row(study: Study, cell: Cell) -> tuple[str, ...]:
    if not cell.runs:
        return (cell.method, cell.label, "0", NOT_RUN, *[""] * (len(COLUMNS) - 4))
    figures = by_seed(study, cell)
    is_dense = cell.name == study.dense.name

    def shown(name: str, digits: int = 2, suffix: str = "") -> str:
        return f"{spread(figures[name], digits)}{suffix}" if figures[name] else UNKNOWN

    pairs = len(figures["cpu_seconds_of_dense"])
    against = "" if is_dense else spread(figures["top1_less_dense_points"], signed=True)
    latencies = []
    for batch in BATCHES:
        seconds, speed_up = cell.latency_s(batch), study.speed_up(cell, batch)
        latencies += [
            UNKNOWN if seconds is None else f"{1e3 * seconds:.3g}",
            UNKNOWN if speed_up is None else f"{speed_up:.2f}x",
        ]
    return (
        cell.method,
        cell.label,
        str(len(cell.runs)),
        shown("top1_percent"),
        against,
        shown("conv_compression", suffix="x"),
        shown("model_compression", suffix="x"),
        shown("multiply_adds_of_dense", 3),
        shown("training_multiply_adds_of_dense", 3),
        shown("end_to_end_seconds", 1),
        shown("end_to_end_seconds_of_dense"),
        shown("training_seconds_of_dense"),
        shown("cpu_seconds_of_dense", suffix=f" (n={pairs})" if pairs != len(cell.runs) else ""),
        shown("tuning_seconds", 0),
        shown("seconds_with_tuning_of_dense"),
        shown("training_peak_mb", 0),
        *latencies,
    )


def _tuning(study: Study) -> str:
    """Final top-1 on validation data, in percent, by value tried."""
    labels = {cell.name: cell.label for cell in study.cells}
    rows = []
    for trial in study.facts["tuning"]:
        tried = ", ".join(f"{_value(one['value'])}: {_top1(one['top1'])}" for one in trial["trials"])
        label = labels.get(trial["cell"], trial["cell"])
        epochs = str(trial.get("epochs", study.facts.get("epochs", "")))
        rows.append((label, trial["field"], epochs, str(len(trial["trials"])), tried, _value(trial["chosen"])))
    return csv_text(("cell", "field", "epochs", "trials", "tried", "chosen"), rows)


def _top1(value: float | None) -> str:
    return "failed" if value is None else f"{100 * value:.2f}"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def section(found: Sequence[tuple[Study, str | None]]) -> str:
    """All comparisons: the first part of RESULTS.md."""
    head = (
        "## Comparisons\n\nClickTrain beside dense training, narrower dense nets, pruning after training (PAT), "
        "pruning during training (PDT), one-shot pruning and random masks. Claims first, each with its verdict; where "
        f"one does not hold, it says so.\n\n{_EXPLAINED}"
    )
    if not found:
        return f"{head}\nNo comparison is recorded: {UNKNOWN}.\n"
    return "\n".join([head, *(generate(study, plot) for study, plot in found)])
