"""Pictures of runs: accuracy by epoch, which patterns were chosen, what each layer retains."""

import collections
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clicktrain_jax import patterns
from experiments.configs import TrainConfig

DENSE_COLOUR, PRUNED_COLOUR = "#555555", "#1f6fb4"
_PHASE_COLOURS = {"dense": "#ffffff", "regularize": "#fdf0d5", "pruned": "#dcebf7"}

Run = tuple[dict[str, Any], list[dict[str, Any]]]  # summary, metrics lines


def compare_runs(dense: Sequence[Run], pruned: Sequence[Run], config: TrainConfig, path: Path) -> None:
    """One sheet on a pruned config beside its dense one.

    Args:
        dense: runs of the dense config, one a seed.
        pruned: runs of the pruned config.
        config: the pruned config, for its phases.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure((11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.25, 1))
    _accuracy(figure.add_subplot(grid[0, :]), dense, pruned, config)
    _layers(figure.add_subplot(grid[1, 0]), pruned)
    _gallery(figure.add_subplot(grid[1, 1]), pruned)
    figure.savefig(path, dpi=110)


def _accuracy(axes: Any, dense: Sequence[Run], pruned: Sequence[Run], config: TrainConfig) -> None:
    prune = config.prune
    edges = (
        ("dense", 0, prune.select_epoch),
        ("regularize", prune.select_epoch, prune.prune_epoch),
        ("pruned", prune.prune_epoch, config.epochs),
    )
    for phase, first, end in edges:
        axes.axvspan(first, end, color=_PHASE_COLOURS[phase], zorder=0)
        # Above the axes, where no curve runs through it.
        axes.text((first + end) / 2, 1.01, phase, transform=axes.get_xaxis_transform(), ha="center", color="#666666")
    for runs, colour, label in ((dense, DENSE_COLOUR, "dense"), (pruned, PRUNED_COLOUR, "ClickTrain")):
        curves = [
            [(line["epoch"] + 1, 100 * line["eval_top1"]) for line in lines if "eval_top1" in line] for _, lines in runs
        ]
        for curve in curves:
            axes.plot(*zip(*curve), color=colour, alpha=0.3, linewidth=1)
        mean = np.mean([[top1 for _, top1 in curve] for curve in curves], axis=0)
        axes.plot([epoch for epoch, _ in curves[0]], mean, color=colour, linewidth=2, label=f"{label} (n={len(runs)})")
    axes.axvline(prune.select_epoch, color="#c77700", linestyle=":", label="masks chosen")
    axes.axvline(prune.prune_epoch, color="#c70039", linestyle="--", label="pruned")
    axes.set_ylim(
        *accuracy_range(
            [[100 * line["eval_top1"] for line in lines if "eval_top1" in line] for _, lines in (*dense, *pruned)]
        )
    )
    axes.set(xlim=(0, config.epochs), xlabel="epochs", ylabel="top-1, %")
    axes.set_title("Accuracy by epoch: thin lines are single seeds", fontsize=10, pad=18)
    # Beside the curves, not across them.
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def accuracy_range(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Lowest and highest percent of an axis: all epochs but the first eighth, the dip after the prune among them.

    Args:
        curves: top-1 in percent, epoch by epoch; not all empty.
    """
    # The first epochs would squeeze all that matters into the top of the plot.
    shown = [value for curve in curves for value in curve[len(curve) // 8 :]]
    return max(0.0, 5 * math.floor((min(shown) - 1) / 5)), min(100.0, 5 * math.ceil((max(shown) + 1) / 5))


def _layers(axes: Any, pruned: Sequence[Run]) -> None:
    layers = pruned[0][0]["layers"]
    shares = [100 * layer["retained"] / np.prod(layer["shape"]) for layer in layers]
    positions = np.arange(len(layers))
    axes.barh(positions, shares, color=PRUNED_COLOUR)
    for position, share in zip(positions, shares):
        axes.text(share + 1, position, f"{share:.1f}", va="center", fontsize=8)
    axes.set_yticks(
        positions,
        [f"{layer['name'].removesuffix('/kernel')}  {layer['shape'][2]}→{layer['shape'][3]}" for layer in layers],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="weights retained, %")
    axes.set_title(f"Convolutions: {pruned[0][0]['conv_compression']:.2f}x fewer weights", fontsize=10)


def _gallery(axes: Any, pruned: Sequence[Run]) -> None:
    counts = collections.Counter()
    for summary, _ in pruned:
        for layer in summary["layers"]:
            counts.update(layer["pattern_counts"] or {})
    total = sum(counts.values())
    columns = min(len(counts), 6)
    axes.set_title("Patterns chosen, share of the kernels kept", fontsize=10)
    axes.set(xlim=(-0.3, 4 * columns), ylim=(4.4 * -(-len(counts) // columns), -0.4), aspect="equal")
    axes.axis("off")
    for index, (text, count) in enumerate(counts.items()):
        left, top = 4 * (index % columns), 4.4 * (index // columns)
        glyph(axes, patterns.parse(text), left, top)
        axes.text(left + 1.5, top + 3.5, f"{100 * count / total:.0f}%", ha="center", va="center", fontsize=9)


def glyph(axes: Any, pattern: np.ndarray, left: float, top: float, side: float = 1.0) -> None:
    """A pattern's taps as squares, ``side`` apart."""
    from matplotlib.patches import Rectangle

    for (y, x), kept in np.ndenumerate(pattern):
        corner = (left + side * x, top + side * y)
        axes.add_patch(Rectangle(corner, 0.9 * side, 0.9 * side, facecolor=PRUNED_COLOUR if kept else "#e4e4e4"))
