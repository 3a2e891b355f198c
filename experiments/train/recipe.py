"""What a config asks for, as objects: the net, the optimizer, the plan, the patterns."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax import models
from experiments.configs.base import PruneConfig, TrainConfig
from pallas_kernels import native
from pallas_kernels.pattern_conv import cpu


def make_models(
    config: TrainConfig, num_classes: int, convolution: str, *, on_cpu: bool, divided: bool = False
) -> dict[str, nn.Module]:
    """The net as each way of `experiments.train.pruned_phase` runs it, "dense" being that of all other phases.

    Args:
        config: of the run.
        num_classes: of the data set.
        convolution: of `LoopConfig`, "auto" decided.
        on_cpu: whether it is made for a CPU.
        divided: whether a batch is divided over devices.
    """
    build = functools.partial(
        models.build,
        config.net,
        num_classes=num_classes,
        width=config.width,
        dtype=jnp.dtype(config.precision),
        dropout=config.dropout,
    )
    # By pattern where a layer has a structure, else dense in the same way as all of them are before.
    dense = models.patch_convolution if convolution == "patches" else pk.dense_conv
    dense = dense if on_cpu or convolution == "patches" else models.gpu_convolution
    # Layers that have a structure gain by it: left open, the choice would go by what lists have room for.
    native_serves = on_cpu and native.is_fast() and config.precision in cpu.DTYPES
    convolve = functools.partial(pk.pattern_conv, backend="cpu") if native_serves else pk.pattern_conv
    by_pattern = functools.partial(models.PatternConv, convolve=convolve, dense=dense)
    whole = nn.Conv if convolution == "xla" and on_cpu else by_pattern
    if config.channels is not None:
        dense = models.xla_convolution if convolution == "xla" else dense
        whole = functools.partial(models.NarrowConv, dense=dense)
    # Divided, XLA's own is taken: the native one has a rule for meshes, and was not tried in whole runs yet.
    normalise = pk.batch_norm if on_cpu and not divided else functools.partial(pk.batch_norm, backend="xla")
    norm = functools.partial(models.Norm, normalise=normalise) if native_serves or not on_cpu else models.Norm
    return {
        "dense": build(conv=whole, norm=norm),
        "pattern": build(conv=by_pattern, norm=norm),
        "pattern_hwnc": build(conv=by_pattern, norm=norm, layout="HWNC"),
    }


def learning_rate(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """The config's schedule, by update: of the dense run, then ADMM's and that of retraining."""
    dense, pieces, bounds = _dense_rate(config, steps_per_epoch), [], []
    end = config.epochs * steps_per_epoch
    if config.admm is not None:
        pieces.append(optax.constant_schedule(config.admm.learning_rate))
        bounds.append(end)
        end += config.admm.epochs * steps_per_epoch
    if config.retrain is not None:
        steps = config.retrain.epochs * steps_per_epoch
        first = config.epochs * steps_per_epoch - steps
        rewound = config.retrain.schedule == "rewind"
        pieces.append(
            (lambda step: dense(first + step))
            if rewound
            else optax.cosine_decay_schedule(config.retrain.learning_rate, max(steps, 1))
        )
        bounds.append(end)
    return optax.join_schedules([dense, *pieces], bounds) if pieces else dense


def _dense_rate(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    total = config.epochs * steps_per_epoch
    asked = None if config.warmup_epochs is None else config.warmup_epochs * steps_per_epoch
    if config.lr_schedule == "cosine":
        warmup = max(1, total // 10) if asked is None else asked
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(total, warmup + 1))
    drops = {milestone * steps_per_epoch: config.lr_gamma for milestone in config.lr_milestones}
    rate = optax.piecewise_constant_schedule(config.learning_rate, drops)
    return (lambda step: rate(step) * jnp.minimum(1.0, (step + 1) / asked)) if asked else rate


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum, weight decay on every parameter and the config's schedule."""
    scheduled = learning_rate(config, steps_per_epoch)

    def rate(step: Any) -> jax.Array:
        # One of two: what shares a vector, though not what shares a number, a GPU's compiler does in one kernel.
        return jax.lax.optimization_barrier(jnp.full(2, scheduled(step)))[0]

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=config.momentum or None)
    )


def lasso_weight(prune: PruneConfig, select_step: int, steps_per_epoch: int) -> Any:
    """The lasso's weight: a number, or a function of the updates done where it rises after the selection."""
    if not prune.coeff_ramp_epochs:
        return prune.coeff
    length = prune.coeff_ramp_epochs * steps_per_epoch
    return optax.linear_schedule(0.0, prune.coeff, length, transition_begin=select_step)


def make_plan(prune: PruneConfig, model: Any, params: Any, image_shape: tuple[int, ...], net: str) -> ct.Plan:
    """The plan that a config asks for, on the prunable convolutions of a model.

    Raises:
        ValueError: neither one fraction nor one for each prunable convolution; what `ct.make_plan` refuses.
    """
    paths = models.prunable_convs(model, image_shape)
    rules = dict.fromkeys(paths, "auto") if prune.target else prune_rules(prune.fractions, paths, net)
    costs = None
    if prune.target_of == "latency":
        # Of the same layers and shapes; how much it removes is irrelevant there.
        shapes = make_plan(
            dataclasses.replace(prune, target=None, target_of="convolutions", fractions=(0.0,)),
            model,
            params,
            image_shape,
            net,
        )
        variables = model.init(jax.random.key(0), jnp.zeros((1, *image_shape), jnp.float32), train=False)
        images = jax.ShapeDtypeStruct((prune.latency_batch, *image_shape), jnp.float32)
        costs = ct.layer_times(functools.partial(model.apply, train=False), variables, images, shapes)
    return ct.make_plan(
        params,
        rules,
        costs=costs,
        tile=prune.tile,
        removal_tile=prune.removal_tile,
        entries=prune.entries,
        superset=prune.superset,
        quads=prune.quads,
        removal_score=prune.removal_score,
        removal_scope=prune.removal_scope,
        floor=prune.floor,
        target=prune.target,
        target_of=prune.target_of,
        output_sizes=models.output_sizes(model, image_shape),
    )


def pattern_source(prune: PruneConfig) -> Any:
    """The published pattern set of a config, or what generates one."""
    if prune.patterns == "fixed":
        return ct.patterns.fixed_set(prune.num_patterns)
    if prune.patterns == "all":
        return ct.patterns.candidates((3, 3), prune.entries, centre=prune.centre)
    return ct.patterns.Generated(
        prune.num_patterns,
        method=prune.patterns,
        centre=prune.centre,
        per_layer=prune.per_layer,
        complementary=prune.quads,
    )


def prune_rules(fractions: tuple[float, ...], paths: tuple[str, ...], net: str) -> dict[str, float]:
    """Rules of `ct.make_plan` from fractions in network order.

    Raises:
        ValueError: neither one fraction nor one for each prunable convolution.
    """
    if len(fractions) not in (1, len(paths)):
        raise ValueError(
            f"prune.fractions has {len(fractions)} values; {net} has {len(paths)} prunable convolutions: "
            "give one for each, in network order, or a single one for all"
        )
    values = fractions * len(paths) if len(fractions) == 1 else fractions
    return dict(zip(paths, values))
