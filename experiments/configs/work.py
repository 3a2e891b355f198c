"""What a config asks for in work, before anything runs: weights and multiply-adds of its net's convolutions."""

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
