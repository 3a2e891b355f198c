"""Tables of `python -m experiments bench gpu`: whole steps, single layers on the device, the price of a shape."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.configs import price
from experiments.configs.work import conv_work
from experiments.records import RUNS, kept, read_json
from experiments.report.statistics import coding, csv_text, markdown_table, mean_spread

COMMAND = "python -m experiments bench gpu --out DIR --data.dir PACKED"
_DIRECTIONS = ("forward", "input gradient", "weight gradient")
# Kernels of convolutions by name: cuDNN's and ours.
_CONVOLUTION = re.compile("xmma|cutlass|cudnn|pattern_conv")
# Epochs after which runs are compared, as far as all had got.
_COMPARED = (40, 50, price.EPOCHS)
PRICE_CSV = "price.csv"
_PRICE_COLUMNS = (
    "run",
    "n",
    *(f"after {epochs} epochs" for epochs in _COMPARED),
    "conv",
    "multiply-adds (M)",
    "training s",
    "compiling s",
    "pruned phase",
)
_PRICE_SHOWN = ("run", "n", *_PRICE_COLUMNS[3:6], "training s")


def benchmarks(folder: Path) -> str:
    """The part of BENCHMARKS.md: whole steps and single layers; empty where there are no records.

    Args:
        folder: of the records, experiments/results/gpu.
    """
    found = [read_json(path) for path in sorted(folder.glob("steps-*.json"))]
    found = [record for record in found if record["ok"] and not record["smoke"]]
    parts = []
    if found:
        parts.append(
            f"### Whole steps in the training loop\n\n{_where(found[0]['setting'])}\n\nMasks of 8x from random scores, "
            'bfloat16. One compiled loop of 20 updates by the host\'s clock, medians of 7; "device" is what all '
            'kernels of an update take in a profiler\'s trace, "convolutions" those among the 30 longest that are '
            "named as such. Dense is XLA with cuDNN in NHWC; our sums over parts of a weight gradient are not in "
            '"convolutions".\n\n'
            f"{_steps_table([row for record in found for row in record['steps']])}"
        )
    path = folder / "conv-device-time.json"
    if path.exists() and not read_json(path)["smoke"]:
        record = read_json(path)
        left_out = f" Not reached: {', '.join(record['left_out'])}." if record["left_out"] else ""
        parts.append(
            f"### Single layers, device time\n\n{_where(record['setting'])}\n\nbfloat16, microseconds a call from a "
            "profiler's trace of 10: dense (XLA with cuDNN, NHWC) / the Hopper kernels with all that XLA puts around "
            f"them (HWNC), and how many times faster.{left_out}\n\n{_layers_table(record['conv_device'])}"
        )
    return "\n".join(parts)


def _where(setting: dict[str, Any]) -> str:
    return (
        f"`{COMMAND}`; {setting['device']['kind']}, driver {setting['driver']}; jax {setting['versions']['jax']}, "
        f"Python {setting['python']}; commit {setting['commit']}; {setting['date'][:10]}"
    )


def _steps_table(rows: Sequence[dict[str, Any]]) -> str:
    dense = {(row["net"], row["batch"]): row for row in rows if row["way"] == "dense"}
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["way"] != "dense", row["tile"][1])):
        base = dense[row["net"], row["batch"]]
        ours = row["way"] != "dense"
        convolutions = sum(micros for name, micros, _ in row["longest"] if _CONVOLUTION.search(name)) / 1e3
        lines.append(
            (
                f"{row['net']}, N = {row['batch']}",
                f"pruned, tiles {row['tile'][0]}x{row['tile'][1]}, HWNC" if ours else "dense",
                f"{100 * row['retained_multiply_adds'] / row['multiply_adds']:.0f}%",
                f"{row['ms']:.3f}",
                f"{row['device_ms']:.3f}",
                f"{convolutions:.3f}",
                f"{row['kernels']:.0f}",
                f"{row['images_per_s']:,.0f}",
                f"{base['ms'] / row['ms']:.2f}",
                f"{base['device_ms'] / row['device_ms']:.2f}",
                f"{row['compile_seconds']:.0f}",
            )
        )
    header = (
        "step",
        "way",
        "multiply-adds",
        "ms",
        "device ms",
        "convolutions ms",
        "kernels",
        "images/s",
        "times faster",
        "on the device",
        "compiling s",
    )
    return markdown_table(header, lines)


def _layers_table(rows: Sequence[dict[str, Any]]) -> str:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["direction"]] = row
    lines = []
    for case, found in cases.items():
        cells, sums = [], {"dense": 0.0, "mosaic_gpu": 0.0}
        for direction in _DIRECTIONS:
            us = found[direction]["us"] if direction in found else {}
            if set(us) != set(sums):
                cells.append("not measured")
                continue
            sums = {way: sums[way] + us[way] for way in sums}
            cells.append(f"{us['dense']:.1f} / {us['mosaic_gpu']:.1f}, {us['dense'] / us['mosaic_gpu']:.2f}")
        whole = "" if "not measured" in cells else f"{sums['dense'] / sums['mosaic_gpu']:.2f}"
        lines.append((case, *cells, whole))
    return markdown_table(("layer", *_DIRECTIONS, "all three"), lines)


def price_section(folder: Path) -> str:
    """The part of RESULTS.md on the price of a shape; empty where there are no records.

    Args:
        folder: of the runs, experiments/results/price. Unfinished ones count as far as they got.
    """
    runs = _priced(folder)
    if not runs:
        return ""
    first = next(run for members in runs.values() for run in members if run["summary"])
    at_once = max(run["setting"].get("runs_at_once", 1) for members in runs.values() for run in members)
    shared = (
        f" Up to {at_once} runs shared the card: their seconds tell nothing of a run's own pace, which whole steps in "
        "BENCHMARKS.md do."
        if at_once > 1
        else ""
    )
    summary = first["summary"]
    head = (
        f"## The price of a shape at full width\n\n{_where(first['setting'])}\n\n{summary['net']} on "
        f"{summary['dataset']} ({coding(summary['encoding'])}), {summary['epochs']} epochs, bfloat16; recipes in "
        f"`experiments.configs.{price.GROUP}`: kernels removed one by one (1x1) or in tiles of (filters, channels), 9x "
        "fewer weights of convolutions, and dense nets that are narrow instead. Top-1 in percent on the "
        f"{summary['eval_split']} set; mean ± standard deviation where there are several seeds. What a run did not "
        f"reach is left empty.{shared} [{PRICE_CSV}](experiments/results/{price.GROUP}/{PRICE_CSV}) has more.\n"
    )
    places = [_PRICE_COLUMNS.index(name) for name in _PRICE_SHOWN]
    rows = [[row[place] for place in places] for row in itertools.starmap(_price_row, runs.items())]
    return f"{head}\n{markdown_table(_PRICE_SHOWN, rows)}"


def price_csv(folder: Path) -> str:
    """All that there is on the price of a shape, as a CSV file; ``folder`` as for `price_section`."""
    return csv_text(_PRICE_COLUMNS, list(itertools.starmap(_price_row, _priced(folder).items())))


def _priced(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs by name, in the order of the configs."""
    order = [config.name for config in price.configs()]
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in kept(folder / RUNS):
        runs.setdefault(run["name"], []).append(run)
    return dict(sorted(runs.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))


def _price_row(name: str, members: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    config, summaries = members[0]["config"], [run["summary"] for run in members if run["summary"]]
    top1 = []
    for epochs in _COMPARED:
        lines = [line for run in members for line in run["metrics"] if line["epoch"] == epochs - 1]
        top1.append(mean_spread([line["eval_top1"] for line in lines], scale=100) if lines else "")
    weights, work = conv_work(config["net"], config["width"])
    whole, _ = conv_work(config["net"], 1.0)
    if summaries:
        work = summaries[0]["retained_multiply_adds"]
        weights = summaries[0]["conv_retained"]
    way = summaries[0]["pruned_convolution"] if summaries else None
    times = [
        mean_spread([summary[field] for summary in summaries], digits=0) if summaries else ""
        for field in ("train_seconds", "compile_seconds")
    ]
    label = f"{name}, width {config['width']:.3g}" if config["width"] != 1 else name
    return (
        label,
        str(len(members)),
        *top1,
        f"{whole / weights:.2f}x",
        f"{work / 1e6:.1f}",
        *times,
        "" if way is None else f"{way['way']}, {len(way['layers'])} layers" if way["layers"] else way["way"],
    )
