"""What pruning adds to an update, and what a selection and an epoch loop cost: ratios measured side by side.

    python -m experiments bench steps      (make bench)
    python -m experiments bench update
    python -m experiments bench loop
    python -m experiments bench selection
    python -m experiments bench step

Convolutions, layer by layer, are measured by `experiments.bench.conv`.
"""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.selection import select_layers
from clicktrain_jax.trees import named_leaves
from experiments import configs
from experiments.bench import drawn, step
from experiments.bench.timing import interleaved
from experiments.records import setting, write_json
from experiments.report.benchmarks import tables_of
from experiments.train.recipe import make_optimizer
from experiments.train.step import Trainer

_PATTERNS = 12
_FRACTION = 0.65
_SELECT_STEP, _PRUNE_STEP = 1000, 2000


def run(
    what: str,
    net: str | None = None,
    width: float | None = None,
    batch_size: int | None = None,
    repeats: int = 7,
    out: Path | None = None,
) -> str:
    """Measure whole updates side by side in one process.

    Args:
        what: "steps", "update", "loop", "selection" or "step".
        net: vgg16 of width 1 in batches of 64 by default; step measures a slim VGG-11, VGG-13 and ResNet-18 when no
            net is named.
        width: of the net.
        batch_size: images an update.
        repeats: samples of each function.
        out: a JSON file to save the record in.
    """
    if not 1 <= repeats <= 500:  # more would walk out of the phase that is measured
        raise ValueError(f"repeats={repeats}: expected 1 to 500")
    if what == "step" and net is None:
        results, asked = step.measure_nets(width, batch_size, repeats), ""
    else:
        net, width, batch_size = net or "vgg16", 1.0 if width is None else width, batch_size or 64
        measures = {"steps": measure_steps, "update": measure_update, "loop": measure_loop}
        measures |= {"selection": measure_selection, "step": step.measure_step}
        results = measures[what](net, width, batch_size, repeats)
        asked = f"--net {net} "
    asked += "" if width is None else f"--width {width:g} "
    asked += "" if batch_size is None else f"--batch-size {batch_size} "
    record = {
        "what": what,
        "command": f"python -m experiments bench {what} {asked}--repeats {repeats}",
        "setting": setting(),
        "results": results,
    }
    if out is not None:
        write_json(out, record)
    return tables_of(record)


def _row(name: str, seconds: list[float], base: list[float] | None, goal: str = "") -> dict[str, Any]:
    ratio = None
    if base is not None:
        # Of neighbours in time: a slow spell of the machine meets both.
        ratio = statistics.median(mine / other for mine, other in zip(seconds, base))
    p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    return {"name": name, "median": median, "p20": p20, "p80": p80, "ratio": ratio, "goal": goal}


def loss_function(model: Any) -> Callable[..., Any]:
    """Cross entropy of a training forward: ``(params, batch_stats, images, labels) -> (loss, batch_stats)``."""

    def loss(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        rngs = {"dropout": jax.random.key(0)}
        logits, new = model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new["batch_stats"]

    return loss


def train_step(model: Any, update: Callable[..., Any]) -> Callable[..., Any]:
    """``(params, batch_stats, opt_state, images, labels) -> (params, batch_stats, opt_state)``."""
    loss = loss_function(model)

    def step(params: Any, batch_stats: Any, opt_state: Any, images: Any, labels: Any) -> Any:
        grads, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats, images, labels)
        updates, opt_state = update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    return step


def measure_steps(net: str, width: float, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Updates of every phase against the plain optax step, and the selection alone."""
    conv = models.PatchConv if jax.default_backend() == "cpu" else nn.Conv
    model = models.build(net, num_classes=10, width=width, conv=conv)
    image_shape = models.default_image_shape(net)
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch_size, *image_shape))
    labels = jax.random.randint(key, (batch_size,), 0, 10)
    variables = drawn.initialised(model, image_shape)
    params, batch_stats = variables["params"], variables["batch_stats"]
    inner = make_optimizer(configs.get("vgg16-cifar10-8.8x"), steps_per_epoch=391)
    plan = ct.make_plan(params, {path: _FRACTION for path in models.prunable_convs(model, image_shape)})
    patterns = ct.patterns.fixed_set(_PATTERNS)
    options = {"coeff": 1e-4, "patterns": patterns}
    updates = ct.phase_updates(inner, plan, **options)
    whole = ct.clicktrain(inner, plan, select_step=_SELECT_STEP, prune_step=_PRUNE_STEP, **options)

    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    select = jax.jit(updates.select)
    fresh = updates.init(params)
    _, selected = select(grads, fresh, params)
    pruned_params = ct.apply_masks(params, ct.masks_of(selected))

    def program(update: Callable[..., Any]) -> Callable[..., Any]:
        # Donated, and fed back: as in a training loop.
        return jax.jit(train_step(model, update), donate_argnums=(0, 1, 2))

    def runner(compiled: Callable[..., Any], params: Any, opt_state: Any) -> Callable[[], Any]:
        state = jax.tree.map(jnp.copy, (params, batch_stats, opt_state))

        def call() -> Any:
            nonlocal state
            state = compiled(*state, images, labels)
            return state

        return call

    # One program in all phases.
    plain, in_any_phase = program(inner.update), program(whole.update)

    def whole_at(count: int, params: Any, state: Any) -> Callable[[], Any]:
        return runner(in_any_phase, params, state._replace(count=jnp.int32(count)))

    pruned = selected._replace(pruned=jnp.int32(_PRUNE_STEP))
    functions = {
        "plain optax step": runner(plain, params, inner.init(params)),
        "plain optax step, again (noise)": runner(plain, params, inner.init(params)),
        "phase: regularize": runner(program(updates.regularize), params, selected),
        "phase: pruned": runner(program(updates.pruned), pruned_params, pruned),
        "clicktrain(...), dense phase": whole_at(0, params, fresh),
        "clicktrain(...), regularize phase": whole_at(_SELECT_STEP + 1, params, selected),
        "clicktrain(...), pruned phase": whole_at(_PRUNE_STEP + 1, pruned_params, pruned),
    }
    goals = ("", "", "1.05", "1.02", "1.10", "1.10", "1.10")
    seconds = interleaved(functions, repeats)
    base = seconds["plain optax step"]
    rows = [_row(name, seconds[name], base, goal) for name, goal in zip(functions, goals)]
    selection = interleaved({"select": lambda: select(grads, fresh, params)}, repeats)["select"]
    name = f"selection, {len(plan.layers)} layers, {_PATTERNS} patterns, compiled"
    return [*rows, _row(name, selection, None, "under 1 s on 2 cores")]


_OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
}


def measure_update(net: str, width: float, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Optimizers' updates alone, wrapped in every phase against plain ones; ``batch_size`` plays no part."""
    model, image_shape = models.build(net, num_classes=10, width=width), models.default_image_shape(net)
    params = drawn.initialised(model, image_shape)["params"]
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), params)
    plan = ct.make_plan(params, {path: _FRACTION for path in models.prunable_convs(model, image_shape)})
    rows = []
    for name, make in _OPTIMIZERS.items():
        inner = make()
        whole = ct.clicktrain(inner, plan, select_step=_SELECT_STEP, prune_step=_PRUNE_STEP, coeff=1e-4)

        def stepped(update: Callable[..., Any]) -> Callable[..., Any]:
            def step(params: Any, state: Any, grads: Any) -> Any:
                updates, state = update(grads, state, params)
                return optax.apply_updates(params, updates), state

            return jax.jit(step, donate_argnums=(0, 1))

        def runner(compiled: Callable[..., Any], state: Any) -> Callable[[], Any]:
            state = jax.tree.map(jnp.copy, (params, state))

            def call() -> Any:
                nonlocal state
                state = compiled(*state, grads)
                return state

            return call

        plain, wrapped = stepped(inner.update), stepped(whole.update)
        fresh: Any = whole.init(params)
        selecting = fresh._replace(count=jnp.int32(_SELECT_STEP))
        selected: Any = wrapped(*jax.tree.map(jnp.copy, (params, selecting)), grads)[1]
        pruned = selected._replace(count=jnp.int32(_PRUNE_STEP + 1), pruned=jnp.int32(_PRUNE_STEP))
        functions = {
            f"{name}, plain": runner(plain, inner.init(params)),
            f"{name}, plain again (noise)": runner(plain, inner.init(params)),
            f"{name}, dense phase": runner(wrapped, fresh),
            f"{name}, regularize phase": runner(wrapped, selected),
            f"{name}, pruned phase": runner(wrapped, pruned),
        }
        seconds = interleaved(functions, repeats)
        base = seconds[f"{name}, plain"]
        rows += [_row(key, seconds[key], base, "" if "plain" in key else "1.05") for key in functions]
    return rows


# (what, options of the plan, patterns) of one selection each; the first is the reference's.
_SELECTIONS: tuple[tuple[str, dict[str, Any], Any], ...] = (
    ("the authors' choice: 12 fixed patterns", {}, ct.patterns.fixed_set(12)),
    ("8 generated patterns", {}, ct.patterns.Generated(8)),
    ("8 generated patterns for each layer", {}, ct.patterns.Generated(8, per_layer=True)),
    ("retained scores, balanced", {"removal_score": "retained", "removal_scope": "filter"}, ct.patterns.fixed_set(8)),
    ("tiles (64, 1)", {"tile": (64, 1)}, ct.patterns.fixed_set(8)),
    ("supersets of 6 in tiles (64, 1)", {"tile": (64, 1), "superset": 6}, ct.patterns.candidates((3, 3), 4)),
    ("quads", {"quads": True}, ct.patterns.Generated(8, complementary=True)),
    ("target 8x, retained scores", {"target": 8.0, "removal_score": "retained"}, ct.patterns.fixed_set(8)),
    (
        "8 generated, quads, target 8x, retained scores, all at once",
        {"target": 8.0, "removal_score": "retained", "quads": True},
        ct.patterns.Generated(8, complementary=True),
    ),
)


def measure_selection(net: str, width: float, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of the selection alone, for each option; ``batch_size`` plays no part."""
    model = models.build(net, num_classes=10, width=width)
    image_shape = models.default_image_shape(net)
    params = models.abstract_variables(model, image_shape)["params"]
    paths = models.prunable_convs(model, image_shape)
    rng = np.random.default_rng(0)
    # Heavy tails, as scores have.
    scores = jax.tree.map(lambda leaf: jnp.asarray(rng.lognormal(0, 2, leaf.shape), jnp.float32), params)

    def selector(options: dict[str, Any], patterns: Any) -> Callable[[], Any]:
        rules = dict.fromkeys(paths, "auto" if "target" in options else _FRACTION)
        plan = ct.make_plan(params, rules, **options)
        compiled = jax.jit(lambda tree: select_layers(dict(named_leaves(tree)), plan, patterns))
        return lambda: compiled(scores)

    functions = {what: selector(options, patterns) for what, options, patterns in _SELECTIONS}
    seconds = interleaved(functions, repeats)
    base = next(iter(seconds.values()))
    return [_row(what, seconds[what], base, "under 2 s on 2 cores") for what in functions]


def measure_loop(net: str, width: float, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """An epoch of three updates, with both convolutions, as one compiled loop and as three calls."""
    config = configs.get("slim-vgg11-cifar10-dense")
    dataset = drawn.images(models.default_image_shape(net), 3 * batch_size)
    functions = {}
    for convolution, what in (("xla", "flax.linen.Conv"), ("patches", "PatchConv")):
        for program, how in (("steps", "one call an update"), ("scan", "one compiled loop")):
            loop = dataclasses.replace(config.loop, epoch_program=program, convolution=convolution)
            asked = dataclasses.replace(
                config, net=net, width=width, batch_size=batch_size, dropout=None, mixup_epoch=None, loop=loop
            )
            functions[f"{what}, {how}"] = _epoch_runner(Trainer(asked, dataset))
    seconds = interleaved(functions, repeats)
    base = next(iter(seconds.values()))
    return [_row(name, seconds[name], base) for name in functions]


def _epoch_runner(trainer: Trainer) -> Callable[[], Any]:
    state = trainer.init(0)

    def call() -> Any:
        nonlocal state
        state, metrics = trainer.run_epoch(state, 0, 0)
        return metrics

    return call
