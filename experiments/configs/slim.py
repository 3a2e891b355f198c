"""CPU-sized runs on real CIFAR-10: VGG-11 at a quarter of its width.

Command: python -m experiments train slim-vgg11-cifar10-8.0x --data.dir DIR
"""

import dataclasses

from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig


def configs() -> list[TrainConfig]:
    """``slim-vgg11-cifar10-dense`` and ``slim-vgg11-cifar10-8.0x``."""
    dense = TrainConfig(
        name="slim-vgg11-cifar10-dense",
        net="vgg11",
        width=0.25,
        # Ten short epochs underfit: dropout only costs here.
        dropout=0.0,
        data=DataConfig("cifar10", train_examples=10_000),
        epochs=10,
        batch_size=64,
        partial_batch="drop",
        lr_schedule="cosine",
        mixup_epoch=8,
        loop=LoopConfig(eval_every_epochs=2),
    )
    prune = PruneConfig(fractions=(0.72,), coeff=2.5e-4, select_epoch=3, prune_epoch=4)
    return [dense, dataclasses.replace(dense, name="slim-vgg11-cifar10-8.0x", prune=prune)]
