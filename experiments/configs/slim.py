"""CPU-sized runs on real CIFAR-10: VGG-11 at a quarter of its width.

Command: python -m experiments train slim-vgg11-cifar10-8.6x --data.dir DIR
"""

import dataclasses

from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig


def configs() -> list[TrainConfig]:
    """``slim-vgg11-cifar10-dense`` and ``slim-vgg11-cifar10-8.6x``."""
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
        # The better of 0.03 and 0.1 on validation data, for each of the two; tuned on lossy images.
        learning_rate=0.03,
        lr_schedule="cosine",
        mixup_epoch=8,
        loop=LoopConfig(eval_every_epochs=2),
    )
    # The fractions of the authors' 8.7x recipe for the full width.
    fractions = (0.45, 0.55, 0.55, 0.65, 0.65, 0.85, 0.85)
    prune = PruneConfig(fractions, coeff=2.5e-4, select_epoch=3, prune_epoch=4)
    return [dense, dataclasses.replace(dense, name="slim-vgg11-cifar10-8.6x", learning_rate=0.1, method=prune)]
