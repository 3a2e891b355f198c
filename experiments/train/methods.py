"""What a config's method asks of an update: the optimizer around the plain one, the weights the net sees, the masks.

ClickTrain's own phases are the trainer's affair (`experiments.train.step`); everything here is an optax transformation
of `clicktrain_jax.methods`, which the trainer's plain update calls like any optimizer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clicktrain_jax as ct
from clicktrain_jax import methods, models
from clicktrain_jax.trees import named_leaves
from experiments.configs.base import TrainConfig
from experiments.train.channel_pruning import ChannelPruning


class Method(NamedTuple):
    """How an update is done.

    Attributes:
        optimizer: called with ``value=``, the loss.
        forward: parameters -> the parameters that the net computes with.
        masks: ``(params, opt_state) -> bool arrays by leaf name`` that the method itself holds; empty for none.
        channels: what makes the net smaller between epochs; None for nothing.
    """

    optimizer: optax.GradientTransformationExtraArgs
    forward: Callable[[Any], Any] = lambda params: params
    masks: Callable[[Any, Any], dict[str, jax.Array]] = lambda params, opt_state: {}
    channels: ChannelPruning | None = None


def make_method(
    config: TrainConfig,
    plain: optax.GradientTransformation,
    model: Any,
    abstract: Any,
    image_shape: tuple[int, ...],
    steps_per_epoch: int,
    plan: ct.Plan | None,
) -> Method:
    """The method of a config.

    Args:
        config: of the run.
        plain: SGD as the config has it.
        model: the net.
        abstract: its variables as `jax.ShapeDtypeStruct`.
        image_shape: (height, width, channels).
        steps_per_epoch: updates.
        plan: of ``config.prune``.

    Raises:
        ValueError: a compression that the prunable convolutions cannot reach; what the methods refuse.
    """
    inner = optax.with_extra_args_support(plain)
    if config.channels is not None:
        channels = ChannelPruning(model, abstract, image_shape, config.channels)
        return Method(channels.optimizer(inner), channels=channels)
    if config.admm is not None:
        return Method(_admm(config, inner, plan, steps_per_epoch))
    if config.sparse is None:
        return Method(inner)
    plan = ct.make_plan(abstract["params"], dict.fromkeys(models.prunable_convs(model, image_shape), 0.0))
    sparse = config.sparse
    if sparse.method == "n_of_m":
        return Method(
            inner,
            forward=functools.partial(methods.straight_through, plan=plan, decay=sparse.decay),
            masks=lambda params, opt_state: methods.n_of_m_masks(params, plan),
        )
    settings = {
        "densities": methods.densities(plan, _retained(sparse.compression, plan, abstract), sparse.distribution),
        "end_step": sparse.end_epoch * steps_per_epoch,
        "every": sparse.every_updates,
    }
    if sparse.method == "gradual":
        wrapped = methods.gradual_magnitude(inner, plan, begin_step=sparse.begin_epoch * steps_per_epoch, **settings)
    else:
        wrapped = _rigl(functools.partial(
            methods.rigl, inner, plan, drop_fraction=sparse.drop_fraction, **settings
        ))
    return Method(wrapped, masks=lambda params, opt_state: methods.masks_of(opt_state))


def _rigl(make: Callable[..., Any]) -> Any:
    """RigL whose first masks depend on the run's first weights: one program serves all seeds."""

    def init(params: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(jax.tree.leaves(params)[-1].astype(jnp.float32), jnp.uint32)
        return make(key=jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32))).init(params)

    return optax.GradientTransformationExtraArgs(init, make(key=jax.random.key(0)).update)


def _admm(config: TrainConfig, inner: Any, plan: ct.Plan, steps_per_epoch: int) -> Any:
    admm = config.admm
    begin, length = config.epochs * steps_per_epoch, admm.epochs * steps_per_epoch
    jumps = {length * stage // admm.stages: admm.rho_factor for stage in range(1, admm.stages)}
    return methods.admm(
        inner,
        plan,
        patterns=ct.patterns.fixed_set(config.prune.num_patterns),
        rho=optax.piecewise_constant_schedule(admm.rho, jumps),
        every=admm.every_updates,
        begin_step=begin,
        end_step=begin + length,
    )


def _retained(compression: float, plan: ct.Plan, abstract: Any) -> int:
    """How many weights of the planned layers stay, so that all convolutions together are compressed so much."""
    total = sum(leaf.size for _, leaf in named_leaves(abstract["params"]) if len(leaf.shape) == 4)
    planned = sum(_size(layer.shape) for layer in plan.layers)
    retained = round(total / compression) - (total - planned)
    if not 0 < retained <= planned:
        raise ValueError(
            f"sparse.compression={compression}: the layers that stay dense hold {total - planned} of {total} weights; "
            f"expected less than {total / max(total - planned, 1):.2f}"
        )
    return retained


def _size(shape: tuple[int, ...]) -> int:
    return functools.reduce(int.__mul__, shape)
