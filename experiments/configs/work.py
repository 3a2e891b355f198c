"""What a config asks for in work, before anything runs: weights and multiply-adds of its net's convolutions."""

import dataclasses
import functools
import math

from clicktrain_jax import models
from experiments.configs.base import TrainConfig

# Training images of the whole sets.
SET_SIZES = {"digits": 1_198, "cifar10": 50_000, "cifar100": 50_000, "imagenet2012": 1_281_167}


def planned_multiply_adds(config: TrainConfig) -> int:
    """Of a whole run's convolutions, forward and backward, as if every layer were dense all along."""
    images = config.data.train_examples or SET_SIZES[config.data.name]
    return 3 * conv_work(config.net, config.width)[1] * images * config.total_epochs


@functools.cache
def conv_work(net: str, width: float) -> tuple[int, int]:
    """``(weights, multiply-adds of one image forward)`` of a dense net's convolutions, by name and width."""
    layers = models.conv_layers(models.build(net, num_classes=10, width=width), models.default_image_shape(net))
    by_path = {layer.path: layer for layer in layers}
    weights = sum(math.prod(layer.kernel_shape) for layer in by_path.values())
    return weights, sum(math.prod((*layer.output_size, *layer.kernel_shape)) for layer in by_path.values())


def stretched(config: TrainConfig, epochs: int) -> TrainConfig:
    """A run in another number of epochs, whatever happens in it happening in proportion.

    Raises:
        ValueError: a run that is pruned after its dense epochs, or one so short that its phases do not fit.
    """
    if config.retrain is not None:
        raise ValueError(f"{config.name} is pruned after its {config.epochs} dense epochs: say how long each part is")

    def at(epoch: int | None) -> int | None:
        return None if epoch is None else max(1, round(epoch * epochs / config.epochs))

    method = config.method
    if method is not None:
        names = [field.name for field in dataclasses.fields(method) if field.name.endswith("_epoch")]
        # What begins at once goes on doing so.
        moved = {name: at(getattr(method, name)) if getattr(method, name) else getattr(method, name) for name in names}
        method = dataclasses.replace(method, **moved)
    return dataclasses.replace(
        config,
        epochs=epochs,
        lr_milestones=tuple(map(at, config.lr_milestones)),
        warmup_epochs=config.warmup_epochs and at(config.warmup_epochs),
        mixup_epoch=at(config.mixup_epoch),
        ema_epochs=round(config.ema_epochs * epochs / config.epochs),
        method=method,
    )


def at_equal_seconds(config: TrainConfig, of_dense: float) -> TrainConfig:
    """A run that spends what it saves on more epochs, to take as long as the dense run.

    Args:
        config: the run, as long as the dense one in epochs.
        of_dense: its measured end-to-end seconds over the dense run's; above 1 the run becomes shorter.

    Raises:
        ValueError: not a positive number; what `stretched` refuses.
    """
    if not 0 < of_dense < math.inf:
        raise ValueError(f"of_dense={of_dense}: expected the run's seconds over the dense run's, a positive number")
    longer = stretched(config, max(1, round(config.epochs / of_dense)))
    return dataclasses.replace(longer, name=f"{config.name}-{longer.epochs}-epochs")
