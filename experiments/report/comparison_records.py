"""The records of a comparison, `experiments/results/compare-NAME`, read and checked.

    study.json      title, command, cells, tuning
    latency.json    milliseconds of the nets of one seed, measured side by side
    runs.jsonl      its runs, see `experiments.records.kept`

A file that does not fit is a ValueError that names it.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.records import RUNS, identity, kept, read_json
from experiments.report.results import RECORDS, machine

PREFIX = "compare-"
# Of a summary: what a run takes on its machine, which says nothing where that did other work too.
TIMES = ("train_seconds", "compile_seconds", "train_and_compile_seconds", "eval_seconds")
# Fewer images seen (ten epochs of CIFAR) are too short a training to speak of the methods.
LEAST_SEEN = 500_000
METHODS = ("dense", "ClickTrain", "PAT", "PDT", "narrow", "one-shot", "random")
BATCHES = (1, 32)
# What a study's time is counted in.
SECONDS, CPU_SECONDS = "end-to-end seconds", "CPU seconds"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row: a config, its runs by seed, and how fast its net answers.

    Attributes:
        name: of the config.
        method: one of `METHODS`.
        label: for tables.
        family: cells of one family form a line in plots and can be read between.
        runs: summaries by seed, with ``setting`` and ``config``; empty when none was made.
        latency: ``{batch size: {"median_s", "low_s", "high_s"}}``, as far as measured.
        tuning_s: seconds of all trials that decided its settings; None where that is not recorded.
    """

    name: str
    method: str
    label: str
    family: str
    runs: Mapping[int, dict[str, Any]]
    latency: Mapping[int, Mapping[str, float]]
    tuning_s: float | None = None

    def top1(self) -> dict[int, float]:
        """Final accuracy by seed, in percent."""
        return {seed: 100 * run["final_top1"] for seed, run in self.runs.items()}

    def seconds(self) -> dict[int, float]:
        """End-to-end seconds by seed: training, compiling and what a run measures for itself; evaluation apart.

        Without runs whose cores were shared with other work: their seconds say nothing.

        A process compiles and measures a config once, for its first seed; the others are charged as much, as a run by
        itself would be.
        """
        compiling = max(self.column("compile_seconds").values(), default=0.0)
        return {seed: seconds + compiling for seed, seconds in self.column("train_seconds").items()}

    def column(self, field: str) -> dict[int, float]:
        """A field of the summaries by seed, those apart that lack it."""
        return {seed: run[field] for seed, run in self.runs.items() if run.get(field) is not None}

    def latency_s(self, batch: int) -> float | None:
        """Median seconds a call; None where it was not measured."""
        return self.latency.get(batch, {}).get("median_s")


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        folder: where its records are.
        facts: study.json.
        cells: in its order, those without runs too.
        latency: latency.json; None where there is none.
    """

    folder: Path
    facts: Mapping[str, Any]
    cells: tuple[Cell, ...]
    latency: Mapping[str, Any] | None

    @property
    def dense(self) -> Cell:
        """What every cell is compared with."""
        return next(cell for cell in self.cells if cell.name == self.facts["dense"])

    def ordered(self) -> list[Cell]:
        """All cells for a table: by method, family and compression; those without runs last in their family."""
        families = list(dict.fromkeys(cell.family for cell in self.cells))

        def place(cell: Cell) -> tuple[int, int, float]:
            compression = mean(self.compression(cell))
            return (
                METHODS.index(cell.method),
                families.index(cell.family),
                float("inf") if compression is None else round(compression, 2),
            )

        return sorted(self.cells, key=place)

    def of(self, method: str) -> list[Cell]:
        """The cells of a method that have runs."""
        return [cell for cell in self.cells if cell.method == method and cell.runs]

    def families(self, method: str) -> dict[str, list[Cell]]:
        """The cells of a method that have runs, by family."""
        found: dict[str, list[Cell]] = {}
        for cell in self.of(method):
            found.setdefault(cell.family, []).append(cell)
        return found

    def some_run(self) -> dict[str, Any] | None:
        """Any run, the dense one's first; None where there are none."""
        return next((run for cell in (self.dense, *self.cells) for run in cell.runs.values()), None)

    def doubts(self) -> str:
        """Why the study's claims count for little, if so; empty otherwise."""
        runs = [run for cell in self.cells for run in cell.runs.values()]
        epochs = self.facts.get("epochs")
        seen = max((run["train_examples"] * (epochs or run["epochs"]) for run in runs), default=LEAST_SEEN)
        return f"too short to count: {seen:,} images seen, {LEAST_SEEN:,} would do" if seen < LEAST_SEEN else ""

    def machines(self) -> list[str]:
        """Every device that runs were made on."""
        return sorted({machine(run) for cell in self.cells for run in cell.runs.values()})

    def date(self) -> str:
        """Of the newest run."""
        return max((run["setting"]["date"] for cell in self.cells for run in cell.runs.values()), default="")[:10]

    def relative(
        self, cell: Cell, measure: Callable[[dict[str, Any], dict[str, Any]], float | None]
    ) -> dict[int, float]:
        """A figure of two runs of one seed, ``measure(cell's, dense's)``, by seed; those apart where it is None."""
        found = {}
        for seed in sorted(cell.runs.keys() & self.dense.runs.keys()):
            value = measure(cell.runs[seed], self.dense.runs[seed])
            if value is not None:
                found[seed] = value
        return found

    def compression(self, cell: Cell, of: str = "conv") -> dict[int, float]:
        """How many times fewer weights than the dense net has, by seed; of convolutions ("conv") or all ("model")."""

        def measure(mine: dict[str, Any], dense: dict[str, Any]) -> float | None:
            if mine.get(f"{of}_retained") is None or dense.get(f"{of}_weights") is None:
                return None
            return dense[f"{of}_weights"] / mine[f"{of}_retained"]

        return self.relative(cell, measure)

    @property
    def clock(self) -> str:
        """What time is counted in: end-to-end seconds, or CPU seconds where cores were shared."""
        return SECONDS if self.dense.seconds() or not self.dense.runs else CPU_SECONDS

    def seconds(self, cell: Cell) -> dict[int, float]:
        """A cell's seconds by the study's clock, by seed; CPU seconds where they can be compared with dense's alone."""
        if self.clock == SECONDS:
            return cell.seconds()
        return {seed: cell.runs[seed]["cpu_seconds"] for seed in self.processor_time(cell)}

    def time(self, cell: Cell) -> dict[int, float]:
        """Seconds over dense's, by seed; see `clock`."""
        dense = self.seconds(self.dense)
        return {seed: seconds / dense[seed] for seed, seconds in self.seconds(cell).items() if seed in dense}

    def processor_time(self, cell: Cell) -> dict[int, float]:
        """CPU seconds over dense's, by seed: of pairs that one commit made on one kind of machine with one jax, as the
        code grows faster."""

        def measure(mine: dict[str, Any], dense: dict[str, Any]) -> float | None:
            commit = mine["setting"].get("commit", "unknown")
            known = commit == dense["setting"].get("commit") and commit != "unknown" and not commit.endswith("-dirty")
            told = mine.get("cpu_seconds") and dense.get("cpu_seconds")
            alike = all(of(mine) == of(dense) for of in (machine, lambda run: run["setting"]["versions"]))
            return mine["cpu_seconds"] / dense["cpu_seconds"] if known and told and alike else None

        return self.relative(cell, measure)

    def time_with_tuning(self, cell: Cell) -> dict[int, float]:
        """End-to-end seconds and those of tuning over dense's, by seed; empty where one is not recorded."""
        if cell.tuning_s is None or self.dense.tuning_s is None:
            return {}
        dense = self.dense.seconds()
        return {
            seed: (seconds + cell.tuning_s) / (dense[seed] + self.dense.tuning_s)
            for seed, seconds in cell.seconds().items()
            if seed in dense
        }

    def ratio(self, cell: Cell, field: str, dense_field: str | None = None) -> dict[int, float]:
        """A field of the summaries over dense's (or over another of dense's), by seed."""

        def measure(mine: dict[str, Any], dense: dict[str, Any]) -> float | None:
            if mine.get(field) is None or not dense.get(dense_field or field):
                return None
            return mine[field] / dense[dense_field or field]

        return self.relative(cell, measure)

    def speed_up(self, cell: Cell, batch: int) -> float | None:
        """Dense's seconds a call over the cell's; None where either was not measured."""
        mine, dense = cell.latency_s(batch), self.dense.latency_s(batch)
        return None if mine is None or dense is None else dense / mine


def mean(values: Mapping[int, float]) -> float | None:
    """Over seeds; None of none."""
    return statistics.fmean(values.values()) if values else None


def folders(records: Path = RECORDS) -> list[Path]:
    """The folders of comparisons that have a study.json."""
    return sorted(path.parent for path in records.glob(f"{PREFIX}*/study.json"))


def read(folder: Path) -> Study:
    """A comparison's records.

    Raises:
        ValueError: a file that cannot be read; a method, a cell or a dense cell that is not known; a run of no cell;
            runs of one cell with different configs; latencies of another net than the run's.
    """
    facts = read_json(folder / "study.json")
    names = [cell["name"] for cell in facts["cells"]]
    where = folder / "study.json"
    if len(set(names)) < len(names) or facts["dense"] not in names:
        raise ValueError(f"{where}: expected cells of different names, {facts['dense']!r} (dense) among them")
    for cell in facts["cells"]:
        if cell["method"] not in METHODS:
            raise ValueError(f"{where}: method={cell['method']!r} of {cell['name']}: expected one of {METHODS}")
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for run in kept(folder / RUNS):
        name, seed = run["name"], run["seed"]
        if name not in runs:
            raise ValueError(f"{folder / RUNS}: a run of {name!r}, no cell of study.json: remove its line")
        if seed in runs[name]:
            raise ValueError(f"{folder / RUNS}: a second run of {name}, seed {seed}: remove a line")
        if run["summary"] is not None:
            shared = run["setting"].get("shared_cores")
            told = {field: value for field, value in run["summary"].items() if not (shared and field in TIMES)}
            runs[name][seed] = told | {"setting": run["setting"], "config": run["config"]}
    for name, by_seed in runs.items():
        if len({identity(run["config"]) for run in by_seed.values()}) > 1:
            raise ValueError(f"{folder}: the runs of {name} were made with different configs: measure them again")
        runs[name] = dict(sorted(by_seed.items()))
    latency = read_json(folder / "latency.json") if (folder / "latency.json").exists() else None
    if latency is not None:
        _check_nets(folder, latency, runs)
    tuning = {each["group"]: [trial.get("seconds") for trial in each["trials"]] for each in facts.get("tuning", ())}
    cells = tuple(
        Cell(
            **{field: cell[field] for field in ("name", "method", "family")},
            label=cell["label"] or cell["method"],
            runs=runs[cell["name"]],
            latency={
                int(batch): found[cell["name"]]
                for batch, found in (latency or {"batches": {}})["batches"].items()
                if cell["name"] in found
            },
            tuning_s=_total([one for group in cell.get("tuned_by", ()) for one in tuning.get(group, [None])]),
        )
        for cell in facts["cells"]
    )
    return Study(folder, facts, cells, latency)


def _total(seconds: Sequence[float | None]) -> float | None:
    """Of what is recorded whole; None of nothing, or where one is missing."""
    return None if not seconds or None in seconds else sum(seconds)


def _check_nets(folder: Path, latency: Mapping[str, Any], runs: Mapping[str, Mapping[int, dict[str, Any]]]) -> None:
    """The nets that were timed are those that the runs of their seed ended with."""
    seed = latency["seed"]
    timed = {name for batch in latency["batches"].values() for name in batch}
    for name in sorted(timed | latency["nets"].keys()):
        net, run = latency["nets"].get(name), runs.get(name, {}).get(seed)
        if net is None or run is None:
            missing = "which net that was" if net is None else f"a run of it with seed {seed}"
            raise ValueError(f"{folder}/latency.json times {name}; there is no record of {missing}: measure it again")
        for field in ("masks_sha256", "params_sha256"):
            if net[field] != run[field]:
                raise ValueError(
                    f"{folder}/latency.json: {field} of {name} is {net[field]!r}, its run of seed {seed} ended with "
                    f"{run[field]!r}: another net was timed than the one whose accuracy stands here; measure it again"
                )
