"""CPU-sized runs on real CIFAR-10: VGG-13 at a quarter of its width.

Command: python -m experiments train slim-vgg13-cifar10-8.0x --data.dir DIR
"""

import dataclasses

from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig


def configs() -> list[TrainConfig]:
    """``slim-vgg13-cifar10-dense`` and ``slim-vgg13-cifar10-8.0x``."""
    dense = TrainConfig(
        name="slim-vgg13-cifar10-dense",
        net="vgg13",
        width=0.25,
        data=DataConfig("cifar10", train_examples=12_000),
        epochs=12,
        batch_size=128,
        partial_batch="drop",
        lr_schedule="cosine",
        mixup_epoch=9,
        loop=LoopConfig(eval_every_epochs=3),
    )
    prune = PruneConfig(fractions=(0.72,), coeff=2.5e-4, select_epoch=3, prune_epoch=5)
    return [dense, dataclasses.replace(dense, name="slim-vgg13-cifar10-8.0x", prune=prune)]
