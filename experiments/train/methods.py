"""The method of a run: what its config makes of the plain optimizer (`experiments.configs.methods`)."""

from typing import Any

import optax

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.channels import channel_nodes
from clicktrain_jax.methods import Method
from experiments.configs.base import TrainConfig
from experiments.configs.methods import Run


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
    if config.method is None:
        return Method(inner)

    def apply(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=False)

    return config.method.make(
        Run(
            inner,
            abstract["params"],
            ct.make_plan(abstract["params"], dict.fromkeys(models.prunable_convs(model, image_shape), 0.0)),
            plan,
            lambda: channel_nodes(apply, abstract, tuple(image_shape)),
            steps_per_epoch,
            config.epochs,
        )
    )
