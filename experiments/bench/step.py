"""Whole training steps, dense against pruned, in one run: what pruning is worth in the end.

    python -m experiments bench step
    python -m experiments bench step --net vgg13 --batch-size 32

Every step is the training loop's own update: gather, augment, forward, backward, optimizer, masks. The masks are what
the library's selection makes of random scores, at 8x in several shapes of tile. The dense baseline is the fastest of
the dense forms, and all other rows are given against it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.states import fill_masks
from experiments import configs
from experiments.bench import drawn
from experiments.bench.timing import interleaved
from experiments.configs.base import PruneConfig
from experiments.train.memory import keep_freed
from experiments.train.pruned_phase import gaining_structures
from experiments.train.step import Trainer
from pallas_kernels import native

TARGET = 8.0
Tile = tuple[int | None, int | None]
# On a CPU; the last is what kernels choose for themselves. A goal is of times faster, in tiles and kernel by kernel.
TILES: tuple[Tile, ...] = ((64, 1), (16, 1), (1, 1))
TILE_GOAL, KERNEL_GOAL = 2.5, 2.0
# (net, width, batch size) that are measured when none is named.
NETS = (("vgg11", 0.25, 128), ("vgg13", 1.0, 32), ("resnet18", 1.0, 32))

# What each dense form of the loop is called in the table.
_DENSE = {"xla": "XLA (flax.linen.Conv)", "patches": "patches (PatchConv)", "direct": "pallas_kernels.dense_conv"}


def measure(
    net: str, width: float, batch_size: int, repeats: int, *, precision: str = "float32", tiles: Sequence[Tile] = TILES
) -> list[dict[str, Any]]:
    """Seconds of whole updates.

    Args:
        net: a name of `clicktrain_jax.models.names`.
        width: multiplies its widths.
        batch_size: images of an update.
        repeats: calls of each, in turns.
        precision: what the net computes in.
        tiles: of patterns and of removal, (filters, channels).

    Returns:
        Rows ``{"name", "tile", "seconds", "images_per_s", "ratio"}``, the fastest dense one first; ratio is how many
        times faster than that one; tile is None where nothing is run by pattern.

    Raises:
        ValueError: nothing gains by its structure, or the target is out of reach.
    """
    if jax.default_backend() == "cpu":
        keep_freed()  # as the loop does
    size = (net, width, batch_size, precision)
    native_dense = jax.default_backend() == "cpu" and native.is_fast()
    names = _DENSE | ({"direct": f"native ({_DENSE['direct']})"} if native_dense else {})
    functions: dict[str, Callable[[], Any]] = {}
    tile_of: dict[str, Tile] = {}

    def add(name: str, of: Trainer, kind: str, state: Any, structures: Any, way: str = "dense") -> None:
        program, args = jax.jit(of.update_step(kind, batch_size, way)), arguments(of)
        functions[name] = lambda: program(state, *args, structures)

    trainers = {form: random_trainer(*size, form, tiles[0], TARGET) for form in names}
    state = trainers["direct"].init(0)
    for form, trainer in trainers.items():
        add(f"dense, {names[form]}", trainer, "dense", state, {})
    ways = {"pattern": "NHWC"} | ({} if jax.default_backend() == "cpu" else {"pattern_hwnc": "HWNC"})
    for tile in tiles:
        trainer = random_trainer(*size, "direct", tile, TARGET)
        pruned, structures = pruned_state(trainer)
        # On a CPU it costs what a dense step costs, and there are many rows.
        if jax.default_backend() != "cpu" and tile == tiles[0]:
            add("pruned, dense under masks", trainer, "pruned", pruned, {})
        for way, layout in ways.items() if structures else ():
            name = f"pruned, by pattern in tiles of {tile}, {layout}"
            add(name, trainer, "pruned", pruned, structures, way)
            tile_of[name] = tile
    if not tile_of:
        raise ValueError(f"{net} in tiles of {', '.join(map(str, tiles))}: no layer gains by its structure")
    seconds = interleaved(functions, repeats)
    base = min((name for name in functions if name.startswith("dense")), key=lambda name: np.median(seconds[name]))
    order = [base, *(name for name in functions if name != base)]
    return [
        {
            "name": name,
            "tile": tile_of.get(name),
            "seconds": seconds[name],
            "images_per_s": batch_size / float(np.median(seconds[name])),
            # Of neighbours in time: a slow spell of the machine meets both.
            "ratio": float(np.median([other / mine for mine, other in zip(seconds[name], seconds[base])])),
        }
        for name in order
    ]


def measure_nets(width: float | None, batch_size: int | None, repeats: int) -> list[dict[str, Any]]:
    """`measure_step` of each of `NETS`, in their own sizes where none are given."""
    rows = []
    for net, own_width, own_batch in NETS:
        sizes = (own_width if width is None else width, batch_size or own_batch)
        what = f"{net}, width {sizes[0]:g}, N = {sizes[1]}"
        rows += [{"net": what, **row} for row in measure_step(net, *sizes, repeats)]
    return rows


def measure_step(
    net: str, width: float, batch_size: int, repeats: int, precision: str = "float32", tile: Tile | None = None
) -> list[dict[str, Any]]:
    """`measure` as rows of a record: percentiles, and the goal of what is run by pattern, in any of the forms.

    Args:
        net, width, batch_size, repeats, precision: of `measure`.
        tile: (filters, channels) of patterns and of removal; when None on a GPU blocks for its kernels, on a CPU
            several.
    """
    on_gpu = jax.default_backend() == "gpu"
    tiles = (tile,) if tile else ((64, 64),) if on_gpu else TILES
    rows = []
    for row in measure(net, width, batch_size, repeats, precision=precision, tiles=tiles):
        p20, median, p80 = np.percentile(row["seconds"], (20, 50, 80)).tolist()
        # What is asked of a step on a GPU is of an H200.
        goal = 1.33 if on_gpu else KERNEL_GOAL if row["tile"] == (1, 1) else TILE_GOAL
        facts = {"times_faster": row["ratio"], "goal": None if row["tile"] is None else goal}
        what = {"name": row["name"], "precision": precision, "images_per_s": row["images_per_s"]}
        rows.append({**what, "median": median, "p20": p20, "p80": p80, **facts})
    return rows


def pruned_state(trainer: Trainer) -> tuple[Any, dict[str, Any]]:
    """``(state, structures)`` after a selection from random scores with heavy tails, as scores have."""
    state = trainer.init(0)
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda leaf: jnp.asarray(rng.lognormal(0, 2, leaf.shape), jnp.float32), state.params)
    masks = jax.jit(lambda tree: ct.select_masks(tree, trainer.plan, trainer.patterns))(scores)
    held = state.opt_state._replace(masks=fill_masks(state.opt_state.masks, masks.layers))
    pruned = state._replace(params=ct.apply_masks(state.params, masks), opt_state=held)
    return pruned, trainer.scheduled(gaining_structures(masks, trainer.plan))


def random_trainer(
    net: str, width: float, batch_size: int, precision: str, form: str, tile: Tile, target: float, *, updates: int = 4
) -> Trainer:
    """A trainer on random images for so many updates an epoch; ``form`` is the dense convolutions'."""
    config = configs.get("slim-vgg11-cifar10-dense")
    # Small nets cannot reach 8x in wide tiles and keep every channel.
    prune = PruneConfig(fractions=(), target=target, coeff=1e-4, select_epoch=1, prune_epoch=2, tile=tile, floor=False)
    config = dataclasses.replace(
        config,
        net=net,
        width=width,
        batch_size=batch_size,
        precision=precision,
        dropout=None,
        mixup_epoch=None,
        method=prune,
        loop=dataclasses.replace(config.loop, convolution=form),
    )
    return Trainer(config, drawn.images(models.default_image_shape(net), updates * batch_size))


def arguments(trainer: Trainer) -> tuple[Any, ...]:
    """(metrics, data, order, index, key) of an update."""
    metrics = jnp.zeros((trainer.steps_per_epoch, 2), jnp.float32)
    order = jnp.arange(len(trainer.train_data.labels))
    return metrics, trainer.train_data, order, np.int32(0), jax.random.key(0)
