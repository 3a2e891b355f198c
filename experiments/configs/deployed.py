"""Full-width nets that are trained for minutes, for what does not depend on accuracy: size, speed, exactness.

Command: python -m experiments train vgg13-short-8x-64x1 --data.dir DIR, then export and `bench deploy`.
Their accuracy says nothing about the method: 2,000 images, 4 epochs.
"""

import dataclasses

from experiments.configs import published
from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig


def configs() -> list[TrainConfig]:
    """Dense; 8x in tiles of 64 filters, and for each kernel by itself; the fractions of the authors' 9.0x in tiles."""
    dense = TrainConfig(
        name="vgg13-short-dense",
        net="vgg13",
        data=DataConfig("cifar10", train_examples=2000),
        epochs=4,
        batch_size=64,
        partial_batch="drop",
        learning_rate=0.03,
        lr_schedule="cosine",
        dropout=0.0,
        loop=LoopConfig(eval_every_epochs=4),
    )
    tiled = PruneConfig((), coeff=2.5e-4, select_epoch=1, prune_epoch=2, target=8.0, tile=(64, 1))
    recipe = next(config for config in published.configs() if config.name == "vgg13-cifar10-9.0x")
    return [
        dense,
        dataclasses.replace(dense, name="vgg13-short-8x-64x1", method=tiled),
        dataclasses.replace(dense, name="vgg13-short-8x-1x1", method=dataclasses.replace(tiled, tile=(1, 1))),
        dataclasses.replace(
            dense,
            name="vgg13-short-9.0x-64x1",
            method=dataclasses.replace(tiled, target=None, fractions=recipe.prune.fractions),
        ),
    ]
