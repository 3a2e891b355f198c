"""The demo: train dense and ClickTrain on embedded images, one table, one plot, and an export with its page."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.data import load
from experiments.records import read_metrics, setting
from experiments.report.plots import Run, compare_runs
from experiments.report.statistics import coding, markdown_table, mean_spread, paired
from experiments.studies import export
from experiments.train.loop import train
from experiments.train.step import Trainer

_NAMES = ("digits-dense", "digits-clicktrain")


def run(workdir: Path, seeds: int) -> str:
    """Train, write ``table.md``, ``plot.png`` and ``export/`` into ``workdir``, and return the text to print.

    Raises:
        ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    runs_folder = workdir / "runs"
    for name in _NAMES:
        # Only what an earlier demo left: the same configs' run folders.
        for earlier in runs_folder.glob(f"{name}-seed*"):
            shutil.rmtree(earlier)
    workdir.mkdir(parents=True, exist_ok=True)
    trainers = {}
    for name in _NAMES:
        config = configs.get(name)
        trainers[name] = Trainer(config, load(config.data))
    finished: dict[str, list[Run]] = {name: [] for name in _NAMES}
    for seed in range(seeds):
        # Interleaved, so that a slow spell of the machine meets both.
        for name, trainer in trainers.items():
            config = dataclasses.replace(trainer.config, seed=seed)
            folder = runs_folder / f"{name}-seed{seed}"
            summary = train(config, folder, trainer=trainer)
            finished[name].append((summary, read_metrics(folder)))
            print(f"{name}, seed {seed}: final top-1 {100 * summary['final_top1']:.2f}", flush=True)
    table = make_table(finished["digits-dense"], finished["digits-clicktrain"])
    (workdir / "table.md").write_text(table)
    plot = workdir / "plot.png"
    compare_runs(finished["digits-dense"], finished["digits-clicktrain"], configs.get("digits-clicktrain"), plot)
    exported = workdir / "export"
    manifest = export.export_run(runs_folder / "digits-clicktrain-seed0", exported)
    page = exported / export.REPORT
    return f"\n{table}\nPlot: {plot}\nExported {export.describe(exported, manifest)}\nPage: {page}\n"


def make_table(dense: list[Run], pruned: list[Run]) -> str:
    """Dense and pruned runs of equal seeds as a Markdown table with its setting."""
    header = (
        "run",
        "final top-1, %",
        "best top-1, %",
        "conv compr.",
        "model compr.",
        "training s",
        "of dense",
        "compiling s",
    )
    dense_seconds = sum(summary["train_seconds"] for summary, _ in dense)
    rows = []
    for label, runs in (("dense", dense), ("ClickTrain", pruned)):
        summaries = [summary for summary, _ in runs]

        def column(field: str, summaries: list[dict[str, Any]] = summaries) -> list[float]:
            return [summary[field] for summary in summaries]

        rows.append(
            (
                label,
                mean_spread(column("final_top1"), scale=100),
                mean_spread(column("best_top1"), scale=100),
                f"{mean_spread(column('conv_compression')[:1])}x",
                f"{mean_spread(column('model_compression')[:1])}x",
                mean_spread(column("train_seconds"), digits=1),
                f"{sum(column('train_seconds')) / dense_seconds:.2f}x",
                # Programs are shared by the seeds: the first run of each kind compiles them.
                f"{sum(column('compile_seconds')):.1f}",
            )
        )
    first = dense[0][0]
    difference = paired(
        *({summary["seed"]: summary["final_top1"] for summary, _ in runs} for runs in (pruned, dense)), scale=100
    )
    where = setting()
    return (
        markdown_table(header, rows)
        + f"\nFinal top-1 against the dense net of the same seed: {difference} points. Mean ± standard deviation over "
        f"{len(dense)} seeds; {first['dataset']} ({coding(first['encoding'])}), test set of "
        f"{first['eval_examples']}; {first['epochs']} epochs each; seconds without evaluation; compiling once for "
        f"all seeds.\n{where['cpu']['model']}, {where['cpu']['cores']} cores, "
        f"{where['device']['kind']}, jax {where['versions']['jax']}.\n"
    )
