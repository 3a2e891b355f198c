"""The ablation of the selection: what each option costs or wins, one change a cell.

Command: python -m experiments ablation --data.dir DIR --workdir DIR (all cells, by successive halving)
or, for any cell alone: python -m experiments train ablation-cov8 --data.dir DIR
Two families of the same cells: ``ablation-...``, a quarter-width VGG-11 for 2 CPU cores, and
``ablation-full-...``, the authors' VGG-13 recipe of 9.0x for a GPU. Both are read on validation data: the test set
is for what is chosen here. All cells of a family share every setting but those of the pruning, mixup's epoch included,
so that equal seeds are equal up to the selection; `experiments.studies.ablation` trains those epochs once.
"""

import dataclasses
from typing import Any

from experiments.configs import published, slim
from experiments.configs.base import LoopConfig, TrainConfig
from experiments.data import DataConfig

QUESTIONS = {
    "patterns": "Generated against fixed pattern sets",
    "importance": "Importance: batches and criterion",
    "removal": "Kernels to remove: score and scope",
    "pattern tiles": "Price of tiles for patterns (removal per kernel)",
    "removal tiles": "Price of tiles for removal (patterns per kernel)",
    "hardware": "Shapes for hardware: both in tiles, two levels, quads",
    "target": "One target instead of fractions by hand",
    "when": "When: epochs of selection and prune, re-selection",
    "lasso": "Weight of the group lasso",
    "combined": "What looked best together",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the ablation, its seed apart.

    Attributes:
        name: short; the config is called ``ablation-NAME``.
        question: a key of `QUESTIONS`.
        reference: name of the cell that it is paired with: the one that differs in this one choice only.
        must: runs with every seed whatever its accuracy, because a question cannot be answered without it.
        config: the whole run.
    """

    name: str
    question: str
    reference: str
    must: bool
    config: TrainConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """The cells of one base recipe, and the dense run whose first epochs they share.

    Attributes:
        prefix: of the configs' names.
        dense: the same recipe without pruning.
        cells: in the order in which they run; "base" and every other reference stand among them.
    """

    prefix: str
    dense: TrainConfig
    cells: tuple[Cell, ...]


# Hardware-shaped choices and all that is compared with them start from generated patterns: quads of the published
# ones do not exist.
_COV8: dict[str, Any] = {"patterns": "coverage", "num_patterns": 8}
# Within a superset of 6 taps a set of 8 patterns leaves a kernel one or two to choose from: there all 126 are offered.
_FREE: dict[str, Any] = {"patterns": "all"}

# (name, question, reference, must, changes to the base's PruneConfig).
_BOTH: tuple[tuple[str, str, str, bool, dict[str, Any]], ...] = (
    ("base", "patterns", "base", True, {}),
    ("cov8", "patterns", "base", True, _COV8),
    ("fixed8", "patterns", "base", False, {"num_patterns": 8}),
    ("cov4", "patterns", "base", False, {"patterns": "coverage"}),
    ("freq8", "patterns", "base", False, {"patterns": "frequency", "num_patterns": 8}),
    ("cov8-centre", "patterns", "base", False, {**_COV8, "centre": True}),
    ("cov8-per-layer", "patterns", "base", False, {**_COV8, "per_layer": True}),
    ("imp16", "importance", "base", False, {"importance_steps": 16}),
    ("group-taylor", "importance", "base", False, {"importance": "group_taylor"}),
    ("retained", "removal", "cov8", True, {**_COV8, "removal_score": "retained"}),
    ("balanced", "removal", "base", False, {"removal_scope": "filter"}),
    ("pat-8x1", "pattern tiles", "cov8", False, {**_COV8, "tile": (8, 1), "removal_tile": (1, 1)}),
    ("pat-32x1", "pattern tiles", "cov8", True, {**_COV8, "tile": (32, 1), "removal_tile": (1, 1)}),
    ("pat-all", "pattern tiles", "cov8", False, {**_COV8, "tile": (None, 1), "removal_tile": (1, 1)}),
    ("rem-8x1", "removal tiles", "cov8", False, {**_COV8, "removal_tile": (8, 1)}),
    ("rem-32x1", "removal tiles", "cov8", True, {**_COV8, "removal_tile": (32, 1)}),
    ("both-32x1", "hardware", "cov8", True, {**_COV8, "tile": (32, 1)}),
    ("super6-32x1", "hardware", "cov8", True, {**_FREE, "tile": (32, 1), "superset": 6}),
    ("super5-32x1", "hardware", "cov8", False, {**_FREE, "tile": (32, 1), "superset": 5}),
    (
        "super6-pat-32x1",
        "pattern tiles",
        "cov8",
        False,
        {**_FREE, "tile": (32, 1), "superset": 6, "removal_tile": (1, 1)},
    ),
    ("quads", "hardware", "cov8", True, {**_COV8, "quads": True}),
    ("lasso-0", "lasso", "base", False, {"coeff": 0.0}),
    ("combined", "combined", "base", True, {**_COV8, "removal_score": "retained", "importance_steps": 16}),
)
# Layers of the slim net have 16 to 128 channels: wide tiles would be all of a layer there.
_SLIM_ONLY: tuple[tuple[str, str, str, bool, dict[str, Any]], ...] = (
    ("rem-32x8", "removal tiles", "cov8", False, {**_COV8, "removal_tile": (32, 8)}),
)
_FULL_ONLY: tuple[tuple[str, str, str, bool, dict[str, Any]], ...] = (
    ("fixed12", "patterns", "base", False, {"num_patterns": 12}),
    ("imp4", "importance", "base", False, {"importance_steps": 4}),
    ("imp64", "importance", "base", False, {"importance_steps": 64}),
    ("magnitude", "importance", "base", False, {"importance": "magnitude"}),
    ("pat-64x1", "pattern tiles", "cov8", True, {**_COV8, "tile": (64, 1), "removal_tile": (1, 1)}),
    ("rem-64x1", "removal tiles", "cov8", True, {**_COV8, "removal_tile": (64, 1)}),
    ("rem-64x16", "removal tiles", "cov8", False, {**_COV8, "removal_tile": (64, 16)}),
    ("both-64x1", "hardware", "cov8", True, {**_COV8, "tile": (64, 1)}),
    ("super6-64x1", "hardware", "cov8", False, {**_FREE, "tile": (64, 1), "superset": 6}),
)


def slim_family() -> Family:
    """The cells on a quarter-width VGG-11, 5,000 images and 10 epochs: about a minute of 2 CPU cores each."""
    recipe = {config.name: config for config in slim.configs()}["slim-vgg11-cifar10-8.6x"]
    prune = dataclasses.replace(recipe.prune, select_epoch=2, prune_epoch=4)
    base = dataclasses.replace(
        recipe,
        data=DataConfig("cifar10", eval_split="validation", train_examples=5_000),
        method=prune,
        loop=LoopConfig(eval_every_epochs=10, keep_checkpoints=1),
        expected="a cell of the ablation",
    )
    own = (
        ("target", "target", "base", True, {"fractions": (), "target": 8.65}),
        # Prune at 20, 60 and 80% of the run, the base at 40%; the selection two epochs before it, of which the
        # earliest has one only: untrained weights have nothing to say.
        ("prune-20", "when", "base", False, {"select_epoch": 1, "prune_epoch": 2}),
        ("prune-60", "when", "base", False, {"select_epoch": 4, "prune_epoch": 6}),
        ("prune-80", "when", "base", False, {"select_epoch": 6, "prune_epoch": 8}),
        ("reselect", "when", "base", False, {"reselect_epoch": 3}),
        ("lasso-x4", "lasso", "base", False, {"coeff": 4 * prune.coeff}),
    )
    return _family("ablation", base, (*_BOTH, *_SLIM_ONLY, *own))


def full_family() -> Family:
    """The cells, and the wide tiles, on the authors' VGG-13 recipe of 9.0x: 190 epochs each, for a GPU."""
    recipe = {config.name: config for config in published.configs()}["vgg13-cifar10-9.0x"]
    base = dataclasses.replace(
        recipe, data=DataConfig("cifar10", eval_split="validation"), expected="a cell of the ablation"
    )
    own = (
        ("target", "target", "base", True, {"fractions": (), "target": 9.0}),
        # The base selects at 32% and prunes at 78% of the run.
        ("prune-20", "when", "base", False, {"select_epoch": 19, "prune_epoch": 38}),
        ("prune-40", "when", "base", False, {"select_epoch": 38, "prune_epoch": 76}),
        ("prune-60", "when", "base", False, {"select_epoch": 60, "prune_epoch": 114}),
        ("reselect", "when", "base", False, {"reselect_epoch": 104}),
        ("lasso-x4", "lasso", "base", False, {"coeff": 4 * recipe.prune.coeff}),
    )
    return _family("ablation-full", base, (*_BOTH, *_FULL_ONLY, *own))


def families() -> tuple[Family, ...]:
    """Both families."""
    return slim_family(), full_family()


def configs() -> list[TrainConfig]:
    """Every cell and each family's dense run."""
    return [config for family in families() for config in (family.dense, *(cell.config for cell in family.cells))]


def _family(prefix: str, base: TrainConfig, rows: tuple[tuple[str, str, str, bool, dict[str, Any]], ...]) -> Family:
    cells = tuple(
        Cell(
            name,
            question,
            reference,
            must,
            dataclasses.replace(base, name=f"{prefix}-{name}", method=dataclasses.replace(base.prune, **changes)),
        )
        for name, question, reference, must, changes in rows
    )
    dense = dataclasses.replace(base, name=f"{prefix}-dense", method=None, expected="the dense run beside the ablation")
    return Family(prefix, dense, cells)
