"""The comparison: ClickTrain beside dense and narrow nets, pruning after training (PAT) and during it (PDT).

Command: python -m experiments compare digits   (or slim, slim-seconds, vgg13; with --data.dir DIR)
or, for any cell alone: python -m experiments train compare-digits-clicktrain-8x
One study is one net, one data set, one length of training; its cells differ in the method and how much it prunes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.configs import published
from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.configs.methods import (
    AdmmConfig,
    AfterConfig,
    ChannelConfig,
    GradualConfig,
    NOfMConfig,
    RetrainConfig,
    RiglConfig,
)
from experiments.data import DataConfig


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study, its seed apart.

    Attributes:
        name: short; the config is called ``compare-STUDY-NAME``.
        method: "ClickTrain", "PAT", "PDT", "dense", "narrow", "one-shot" or "random".
        label: what tells it apart from others of its method.
        family: cells of one family are points of one line.
        group: cells of one group share what was tuned.
        config: the whole run.
    """

    name: str
    method: str
    label: str
    family: str
    group: str
    config: TrainConfig


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is tuned for a group of cells, on validation data: as many trials for each group.

    Attributes:
        group: of `Cell`.
        cell: the cell that is tried.
        field: of the config, "learning_rate" or "admm.rho".
        values: the trials.
        epochs: length of a trial; None for the cell's own.
    """

    group: str
    cell: str
    field: str
    values: tuple[Any, ...]
    epochs: int | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: short.
        title: for people.
        cells: in the order in which they run; the first one is the dense run.
        tunings: one for each group of cells that is tuned; other groups take the dense run's learning rate.
        first: cells that run with every seed before the others run with any.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    tunings: tuple[Tuning, ...]
    first: tuple[str, ...] = ()

    @property
    def dense(self) -> Cell:
        """The run that all others are compared with."""
        return self.cells[0]

    def cell(self, name: str) -> Cell:
        """The cell of this name.

        Raises:
            ValueError: there is none.
        """
        found = next((cell for cell in self.cells if cell.name == name), None)
        if found is None:
            raise ValueError(f"no cell {name!r}; the cells are {', '.join(cell.name for cell in self.cells)}")
        return found


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How a study is laid out: epochs of the phases, how much is pruned, what the narrow nets are.

    ``widths`` by what a narrow net has in common with a pruned one, or by themselves; ``superset`` is that of the
    tiles; ``trial_epochs`` alone: only the dense run's rate is tuned, in so many epochs, and all cells take it.
    """

    compression: float
    others: tuple[float, ...]  # further compressions of the ClickTrain line
    select: int
    prune: int
    early_select: int
    early_prune: int
    coeff: float
    tile: tuple[int, int]
    importance_steps: int
    widths: Mapping[str, float]
    retrain: tuple[int, ...]
    admm: AdmmConfig
    channels: tuple[ChannelConfig, ...]
    every_updates: int
    rates: tuple[float, ...]
    superset: int | None = None
    trial_epochs: int | None = None
    first: tuple[str, ...] = ()


def studies() -> tuple[Study, ...]:
    """The studies: three for 2 CPU cores, one for a GPU."""
    return _digits(), _slim(), _slim_seconds(), _vgg13()


def study(name: str) -> Study:
    """A study by name.

    Raises:
        ValueError: there is none.
    """
    known = {one.name: one for one in studies()}
    if name not in known:
        raise ValueError(f"no study {name!r}; the studies are {', '.join(known)}")
    return known[name]


def configs() -> list[TrainConfig]:
    """Every cell of every study."""
    return [cell.config for one in studies() for cell in one.cells]


def _digits() -> Study:
    dense = TrainConfig(
        name="",
        net="small",
        data=DataConfig("digits"),
        epochs=30,
        batch_size=64,
        partial_batch="drop",
        lr_schedule="cosine",
        crop_padding=1,
        flip=False,
        loop=LoopConfig(eval_every_epochs=30, checkpoint_every_epochs=30),
    )
    shape = _Shape(
        compression=8.0,
        others=(4.0, 16.0, 32.0),
        select=10,
        prune=22,
        early_select=3,
        early_prune=6,
        coeff=1e-3,
        tile=(32, 1),
        importance_steps=16,
        widths=_by_width(0.25, 0.375, 0.5, 0.75),
        retrain=(2, 5, 10, 20, 30),
        admm=AdmmConfig(15, rho=1e-2, every_updates=18, learning_rate=0.02),
        channels=(ChannelConfig(0.2, 10), *(ChannelConfig(ratio, 10, 1e-2) for ratio in (0.8, 0.9, 0.95))),
        every_updates=18,
        rates=(0.1, 0.2, 0.4),
    )
    return _study("digits", "Digits, the small net, 30 epochs", dense, shape)


def _by_width(*widths: float) -> dict[str, float]:
    return {f"{width:g}": width for width in widths}


def _slim() -> Study:
    dense = TrainConfig(
        name="",
        net="vgg11",
        width=0.25,
        # Twelve epochs underfit: dropout only costs here.
        dropout=0.0,
        data=DataConfig("cifar10"),
        epochs=12,
        partial_batch="drop",
        lr_schedule="cosine",
        learning_rate=0.1,
        mixup_epoch=10,
        loop=LoopConfig(eval_every_epochs=4),
    )
    shape = _Shape(
        compression=8.0,
        others=(4.0, 12.0),
        select=5,
        prune=9,
        early_select=1,
        early_prune=2,
        coeff=2.5e-4,
        tile=(32, 1),
        superset=6,
        importance_steps=16,
        # The first is a guess at the width that is as fast as the tiles, from timings on a loaded machine: latency.json
        # of the study says how near it is. The others have as many multiply-adds (within 2%) and weights (within 12%,
        # no width is nearer) as single kernels at 8x keep.
        widths={"latency": 0.1875, "multiply-adds": 0.125, "weights": 0.0859375},
        retrain=(3, 6, 12),
        admm=AdmmConfig(6, rho=1e-2, every_updates=390, learning_rate=0.01),
        channels=(ChannelConfig(0.6, 2, 1e-2), ChannelConfig(0.8, 2, 1e-2)),
        every_updates=100,
        rates=(0.05, 0.1, 0.2),
        trial_epochs=3,
        first=("dense", "early-8x", "early-tiles-8x", "narrow-latency", "narrow-multiply-adds", "narrow-weights"),
    )
    return _study("slim", "CIFAR-10, a quarter-width VGG-11, 12 epochs", dense, shape)


def _slim_seconds() -> Study:
    """What a method saves on an update it spends on more of them; its learning rate is the one that was tuned there."""
    slim = _slim()
    # From CPU seconds of an epoch on one core of an AMD EPYC: dense 28.6, pruned 4x 18.5, the narrow one 19.8; guessed
    # before there was a run: 8x 17, the narrower one 11, and 20 for what a pruned run compiles and measures. How near
    # that came stands in the table. Single weights save no time, so those methods have the dense run's epochs.
    epochs = {
        **{"dense": 12, "early-8x": 18, "rigl-8x": 12, "gradual-8x": 12, "rewind-6": 8, "narrow-latency": 17},
        **{"early-4x": 16, "two-of-four": 12, "narrow-multiply-adds": 31},
    }
    cells = []
    for name, count in epochs.items():
        cell = slim.cell(name)
        changes: dict[str, Any] = {"epochs": count, "mixup_epoch": count - 2}
        if isinstance(cell.config.method, AfterConfig):  # pruned where its dense run ends
            pruned = dataclasses.replace(cell.config.method.prune, select_epoch=count, prune_epoch=count)
            changes["method"] = dataclasses.replace(cell.config.method, prune=pruned)
        config = dataclasses.replace(cell.config, name=f"compare-slim-seconds-{name}", **changes)
        label = ", ".join(filter(None, (cell.label.partition(", pruned")[0], f"{count} epochs")))
        cells.append(dataclasses.replace(cell, label=label, group="dense", config=config))
    title = "CIFAR-10, the quarter-width VGG-11, the seconds of 12 dense epochs"
    return Study("slim-seconds", title, tuple(cells), (), tuple(list(epochs)[:5]))


def _vgg13() -> Study:
    recipe = next(config for config in published.configs() if config.name == "vgg13-cifar10-dense")
    dense = dataclasses.replace(recipe, precision="bfloat16", loop=LoopConfig(eval_every_epochs=10))
    shape = _Shape(
        compression=9.0,
        others=(4.0, 6.2),
        select=60,
        prune=148,
        early_select=19,
        early_prune=38,
        coeff=6.5e-4,
        tile=(64, 1),
        importance_steps=16,
        widths=_by_width(0.334, 0.5, 0.75),
        retrain=(19, 60, 120, 190),
        admm=AdmmConfig(60, rho=1e-3, every_updates=391, learning_rate=0.01),
        channels=(ChannelConfig(0.2, 10), ChannelConfig(0.4, 10)),
        every_updates=100,
        rates=(0.05, 0.1),
    )
    return _study("vgg13", "CIFAR-10, VGG-13, 190 epochs", dense, shape)


def _study(name: str, title: str, base: TrainConfig, shape: _Shape) -> Study:
    cells: list[Cell] = []

    def add(cell: str, called: str, label: str, family: str, group: str, **changes: Any) -> None:
        changes |= {"name": f"compare-{name}-{cell}", "expected": "a cell of the comparison"}
        config = dataclasses.replace(base, **changes)
        cells.append(Cell(cell, called, label, family, group, config))

    ratio = f"{shape.compression:g}x"
    tile = f"{shape.tile[0]}x{shape.tile[1]}"
    late = PruneConfig((), shape.coeff, shape.select, shape.prune, target=shape.compression, floor=False)
    early = dataclasses.replace(
        late,
        select_epoch=shape.early_select,
        prune_epoch=shape.early_prune,
        importance="group_taylor",
        importance_steps=shape.importance_steps,
    )
    early_share, late_share = (f"{100 * epoch / base.epochs:.0f}%" for epoch in (shape.early_prune, shape.prune))
    end = base.epochs
    after = PruneConfig((), 0.0, end, end, target=shape.compression, importance="magnitude", floor=False)
    tiles = dataclasses.replace(early, tile=shape.tile, superset=shape.superset)

    def prune(group: str, of: PruneConfig, target: float = shape.compression) -> None:
        family = {"clicktrain": "late", "early": "early", "early-tiles": "early, tiles"}[group]
        label = f"{target:g}x, pruned at {late_share if of is late else early_share}"
        label += f", tiles {tile}" if of is tiles else ""
        method = dataclasses.replace(of, target=target)
        add(f"{group}-{target:g}x", "ClickTrain", label, f"ClickTrain, {family}", group, method=method)

    add("dense", "dense", "", "dense", "dense")
    prune("clicktrain", late)
    prune("early", early)
    prune("early-tiles", tiles)
    for like, width in shape.widths.items():
        label = f"width {width:g}" + ("" if like == f"{width:g}" else f", chosen for {like}")
        add(f"narrow-{like}", "narrow", label, "narrow", "narrow", width=width)
    for other in shape.others:
        prune("early", early, other)
        prune("clicktrain", late, other)
    for epochs in shape.retrain:
        label, method = f"{ratio}, magnitude, {epochs} rewound epochs", AfterConfig(after, RetrainConfig(epochs))
        add(f"rewind-{epochs}", "PAT", label, "PAT, rewinding", "dense", method=method)
    moved = dataclasses.replace(after, select_epoch=end + shape.admm.epochs, prune_epoch=end + shape.admm.epochs)
    for epochs in shape.retrain[-2:]:
        label = f"{ratio}, ADMM of {shape.admm.epochs} epochs, {epochs} rewound"
        method = AfterConfig(moved, RetrainConfig(epochs), shape.admm)
        add(f"admm-{epochs}", "PAT", label, "PAT, ADMM", "admm", method=method)
    for channels in shape.channels:
        label = f"PruneTrain, ratio {channels.ratio:g}, threshold {channels.threshold:g}"
        add(f"prunetrain-{channels.ratio:g}", "PDT", label, "PDT, PruneTrain", "prunetrain", method=channels)
    begin, stop, every = shape.early_select, 3 * end // 4, shape.every_updates
    gradual = GradualConfig(shape.compression, begin_epoch=begin, end_epoch=max(begin + 1, stop), every_updates=every)
    label = f"{ratio}, gradual magnitude, single weights"
    add(f"gradual-{ratio}", "PDT", label, "PDT, gradual magnitude", "gradual", method=gradual)
    rigl = RiglConfig(shape.compression, "erk", end_epoch=max(1, stop), every_updates=every)
    add(f"rigl-{ratio}", "PDT", f"{ratio}, RigL, single weights", "PDT, RigL", "rigl", method=rigl)
    add("two-of-four", "PDT", "2:4, straight-through", "PDT, 2:4", "two-of-four", method=NOfMConfig())
    label, method = f"{ratio}, magnitude, not retrained", AfterConfig(after, RetrainConfig(0))
    add(f"one-shot-{ratio}", "one-shot", label, "one-shot", "dense", method=method)
    middle = shape.retrain[len(shape.retrain) // 2]
    label = f"{ratio}, random masks, {middle} rewound epochs"
    method = AfterConfig(dataclasses.replace(after, importance="random"), RetrainConfig(middle))
    add(f"random-{ratio}", "random", label, "random", "dense", method=method)
    if shape.trial_epochs is not None:
        only = Tuning("dense", "dense", "learning_rate", shape.rates, shape.trial_epochs)
        return Study(name, title, tuple(cells), (only,), shape.first)
    tried = {
        "dense": "dense",
        "clicktrain": f"clicktrain-{ratio}",
        "early": f"early-{ratio}",
        "early-tiles": f"early-tiles-{ratio}",
        "narrow": f"narrow-{list(shape.widths)[1]}",
        "prunetrain": f"prunetrain-{shape.channels[-2].ratio:g}",
        "gradual": f"gradual-{ratio}",
        "rigl": f"rigl-{ratio}",
        "two-of-four": "two-of-four",
    }
    tunings = [Tuning(group, cell, "learning_rate", shape.rates) for group, cell in tried.items()]
    rhos = tuple(shape.admm.rho * 10.0**-power for power in range(len(shape.rates)))
    tunings.append(Tuning("admm", f"admm-{shape.retrain[-2]}", "admm.rho", rhos))
    return Study(name, title, tuple(cells), tuple(tunings), shape.first)
