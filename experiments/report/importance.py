"""The importance study's table and plot, from its record."""

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report.results import machine
from experiments.report.statistics import coding, markdown_table, mean_spread, paired

NAMES = {name: name for name in ("taylor", "group_taylor", "magnitude")}
NAMES |= {"random": "random scores", "dense": "not pruned"}
COLOURS = {
    "taylor": "#1f6fb4",
    "group_taylor": "#c70039",
    "magnitude": "#55803a",
    "random": "#999999",
    "dense": "#222222",
}
TOLERANCE = 0.02
_TARGETS = ("size", "signed")
_SCOPES = ("layer_mean", "together")


def generate(record: dict[str, Any], plot_file: str | None = None) -> str:
    """The section of RESULTS.md.

    Args:
        record: of `experiments.studies.importance`.
        plot_file: of the picture, as the text shall link to it; None for no picture.
    """
    where, config, study = record["setting"], record["config"], record["study"]
    partial = " A quick run, to see that it works: its figures mean nothing." if record.get("quick") else ""
    parts = [
        f"## Importance: {config['net']} of width {config['width']:g} on {record['dataset']}\n\n"
        f"`{_command(record)}`; {machine(record)}; jax {where['versions']['jax']}; {where['date'][:10]}; "
        f"{record['seconds'] / 60:.0f} minutes.{partial}\n\n"
        f"Single kernels of nets trained dense ({record['train_examples']:,} images, {coding(record['encoding'])}) are "
        "set to zero; the true change of the loss is measured on validation images, the test set is not read. Rank "
        "correlation (Spearman) of each criterion's kernel scores with its size and with the signed change (positive: "
        "the loss rises), in each layer, then averaged over the layers, and over the kernels of all layers together. "
        "N: training batches that a score is the mean of, at fixed weights. ± is the standard deviation over disjoint "
        "draws of the batches and over nets. Last rows: how well one half of the images predicts the other, and the "
        "correlation that a perfect criterion would reach for this noise.\n"
    ]
    for epochs in study["checkpoint_epochs"]:
        nets = [net for net in record["nets"] if net["epochs"] == epochs and net["truth"]]
        if nets:
            parts.append(_correlations(nets, epochs, config["epochs"]))
    if any(net["tuned"] for net in record["nets"]):
        parts.append(_accuracies(record))
    if plot_file:
        parts.append(f"![Correlation and accuracy against the number of batches]({plot_file})\n")
    return "\n".join(parts)


def _command(record: dict[str, Any]) -> str:
    """The command, without where things lay on the machine that ran it."""
    return re.sub(r"--out \S+", "--out FILE", re.sub(r"--data\.dir \S+", "--data.dir DIR", record["command"]))


def sufficient(record: dict[str, Any], criterion: str) -> int | None:
    """The smallest N that ranks within `TOLERANCE` of the largest; None without any removed kernels.

    By the mean correlation with the size of the true change in each layer, in the nets of the first checkpoint: where
    a selection happens, among the kernels that compete with one another.
    """
    nets = _first(record)
    counts = record["study"]["batches"]
    if not nets:
        return None
    means = {count: statistics.fmean(_values(nets, criterion, count, "size", "layer_mean")) for count in counts}
    return next(count for count in counts if means[count] >= means[counts[-1]] - TOLERANCE)


def _first(record: dict[str, Any]) -> list[dict[str, Any]]:
    first = record["study"]["checkpoint_epochs"][0]
    return [net for net in record["nets"] if net["epochs"] == first and net["truth"]]


def _rows(nets: Iterable[dict[str, Any]], criterion: str, batches: int | None) -> list[dict[str, Any]]:
    return [
        row
        for net in nets
        for row in net["truth"]["correlations"]
        if (row["criterion"], row["batches"]) == (criterion, batches)
    ]


def _values(nets: list[dict[str, Any]], criterion: str, batches: int | None, target: str, scope: str) -> list[float]:
    return [value for row in _rows(nets, criterion, batches) for value in row[target][scope]]


def _correlations(nets: list[dict[str, Any]], epochs: int, of: int) -> str:
    truths = [net["truth"] for net in nets]
    first = truths[0]
    cells = [(row["criterion"], row["batches"]) for row in first["correlations"]]
    rows = []
    for name, count in cells:
        draws = len(_values(nets, name, count, "size", "together"))
        figures = [mean_spread(_values(nets, name, count, t, s)) for t in _TARGETS for s in _SCOPES]
        rows.append((NAMES[name], "" if count is None else str(count), str(draws), *figures))
    for what, ending in (("one half of the images", ""), ("a perfect criterion", "_ceiling")):
        figures = [
            mean_spread([truth["split_half"][t][s + ending] for truth in truths]) for t in _TARGETS for s in _SCOPES
        ]
        rows.append((what, "", str(len(truths)), *figures))
    kernels = sum(len(layer["kernels"]) for layer in first["layers"])
    lowered, beyond = (
        statistics.fmean(100 * truth[field] for truth in truths)
        for field in ("share_of_loss_lowered", "share_beyond_two_errors")
    )
    top1 = mean_spread([net["top1"] for net in nets], scale=100, digits=1)
    header = ("scores", "N", "draws", "size, in a layer", "size, all", "signed, in a layer", "signed, all")
    return (
        f"After {epochs} of {of} epochs, {len(nets)} net(s), validation top-1 {top1}: {kernels} kernels, "
        f"{first['images']:,} images. Removal lowers the loss for {lowered:.0f}% of the kernels; {beyond:.0f}% of the "
        f"changes are larger than two standard errors.\n\n{markdown_table(header, rows)}"
    )


def _accuracies(record: dict[str, Any]) -> str:
    nets = [net for net in record["nets"] if net["tuned"]]
    cells = [(cell["criterion"], cell["batches"]) for cell in nets[0]["tuned"]]
    base = _tuned(nets, "taylor", record["study"]["batches"][0], "after")
    rows = []
    for name, count in cells:
        before, after = (_tuned(nets, name, count, field) for field in ("before", "after"))
        rows.append(
            (
                NAMES[name],
                "" if count is None else str(count),
                mean_spread(list(before.values()), scale=100),
                mean_spread(list(after.values()), scale=100),
                paired(after, base, scale=100),
            )
        )
    study = record["study"]
    compression = next(cell["conv_compression"] for cell in nets[0]["tuned"] if cell["criterion"] != "dense")
    within = [f"{name} {sufficient(record, name)}" for name in ("taylor", "group_taylor") if _first(record)]
    rule = f"The smallest N within {TOLERANCE:g} of the largest one's correlation (size, in a layer): "
    header = ("pruned by", "N", "top-1 pruned", "top-1 tuned", f"against taylor, N = {study['batches'][0]}")
    return (
        f"The same nets after {nets[0]['epochs']} epochs, pruned hard by the scores of one draw to "
        f"{compression:.1f}x over all convolutions (the four fixed patterns, no group lasso), then "
        f"{study['tune_epochs']} epoch(s) with the masks on at a learning rate of {study['tune_rate']:g}, cosine to "
        f"zero: validation top-1 over {len(nets)} seed(s), differences paired by seed, which decides net, batches, and "
        f"order and augmentation of the images.\n\n{markdown_table(header, rows)}"
        + (f"\n{rule}{', '.join(within)}.\n" if within else "")
    )


def _tuned(nets: list[dict[str, Any]], criterion: str, batches: int | None, field: str) -> dict[int, float]:
    return {
        net["seed"]: cell[field]
        for net in nets
        for cell in net["tuned"]
        if (cell["criterion"], cell["batches"]) == (criterion, batches)
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Correlations and accuracies against N; below, scores against true changes, kernel by kernel.

    Args:
        record: of `experiments.studies.importance`, with removed kernels at its first checkpoint.
        path: the PNG to write.

    Raises:
        ValueError: no kernels were removed.
    """
    from matplotlib.figure import Figure

    nets = _first(record)
    if not nets:
        raise ValueError("truth_seeds=0: no kernel was removed, there is nothing to plot")
    figure = Figure((13, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    axes = upper.subplots(1, 3)
    titles = ("size of the change", "signed change")
    for one, target, title in zip(axes, _TARGETS, titles):
        _correlation_panel(one, nets, record["study"]["batches"], target)
        one.set_title(f"Rank correlation with the {title}, in a layer", fontsize=10)
    _accuracy_panel(axes[2], record)
    entries = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels())}
    options = {"loc": "outside lower center", "ncols": 9, "fontsize": 9, "frameon": False}
    upper.legend(entries.values(), entries.keys(), **options)
    counts = record["study"]["batches"]
    shown = [("taylor", counts[0]), ("taylor", counts[-1]), ("group_taylor", counts[-1]), ("magnitude", None)]
    panels = lower.subplots(1, len(shown), sharey=True)
    for one, (name, count) in zip(panels, shown):
        _scatter(one, nets[0], name, count)
    panels[0].set_ylabel("size of the true change of the loss")
    lower.legend(*panels[0].get_legend_handles_labels(), **options, markerscale=3)
    figure.savefig(path, dpi=100)


def _over_n(axes: Any, counts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.5, counts[-1] * 1.5)
    axes.set_xlabel("N, training batches")
    axes.grid(axis="y", color="#e5e5e5")


def _correlation_panel(axes: Any, nets: list[dict[str, Any]], counts: list[int], target: str) -> None:
    _over_n(axes, counts)
    for offset, name in zip((0.96, 1.04), ("taylor", "group_taylor")):
        found = [_values(nets, name, count, target, "layer_mean") for count in counts]
        axes.errorbar(
            [offset * count for count in counts],
            [np.mean(values) for values in found],
            [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in found],
            color=COLOURS[name],
            marker="o",
            capsize=3,
            label=NAMES[name],
        )
    for name in ("magnitude", "random"):
        values = _values(nets, name, None, target, "layer_mean")
        axes.axhline(np.mean(values), color=COLOURS[name], linewidth=1.5, label=NAMES[name])
    ceiling = np.mean([net["truth"]["split_half"][target]["layer_mean_ceiling"] for net in nets])
    axes.axhline(ceiling, color="#222222", linestyle="--", linewidth=1, label="a perfect criterion, for this noise")


def _accuracy_panel(axes: Any, record: dict[str, Any]) -> None:
    counts, nets = record["study"]["batches"], [net for net in record["nets"] if net["tuned"]]
    _over_n(axes, counts)
    for offset, name in zip((0.96, 1.04), ("taylor", "group_taylor")):
        found = [[100 * top1 for top1 in _tuned(nets, name, count, "after").values()] for count in counts]
        axes.plot([offset * count for count in counts], [np.mean(values) for values in found], color=COLOURS[name])
        for count, values in zip(counts, found):
            axes.plot([offset * count] * len(values), values, "o", color=COLOURS[name], alpha=0.5, markersize=4)
    for name in ("magnitude", "random", "dense"):
        mean = 100 * np.mean(list(_tuned(nets, name, None, "after").values()))
        axes.axhline(
            mean, color=COLOURS[name], linewidth=1.5, linestyle=":" if name == "dense" else "-", label=NAMES[name]
        )
    axes.set_title(f"Validation top-1 after pruning and tuning, %: {len(nets)} seed(s)", fontsize=10)


def _scatter(axes: Any, net: dict[str, Any], criterion: str, batches: int | None) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    label = criterion if batches is None else f"{criterion}-{batches}"
    layers = net["truth"]["layers"]
    for layer, colour in zip(layers, colormaps["turbo"](np.linspace(0.05, 0.92, len(layers)))):
        change, score = np.abs(layer["mean"]), np.asarray(layer["scores"][label])
        seen = (change > 0) & (score > 0)  # the others have no place on these scales
        axes.plot(
            score[seen],
            change[seen],
            ".",
            color=colour,
            markersize=4,
            alpha=0.7,
            label=layer["name"].removesuffix("/kernel"),
        )
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    values = _values([net], criterion, batches, "size", "layer_mean")
    number = "" if batches is None else f", N = {batches}"
    axes.set_title(f"{NAMES[criterion]}{number}: {np.mean(values):.2f} in a layer", fontsize=10)
    axes.set_xlabel("score of the kernel")
