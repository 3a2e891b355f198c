"""A recipe of today beside the authors' of 2021: what is lost by pruning is told against the better dense net, too.

Command: python -m experiments train resnet18-cifar10-modern-8.0x --data.dir DIR
ResNet-18 on CIFAR-10: cosine schedule, smoothed labels, weights averaged over the last sixth of the run, random crops
and flips, batches of 512, no mixup, bfloat16, 60 epochs; pruned early as in `experiments.configs.own`. Expected of the
dense net on a GPU: 95% and more. Neither is measured yet.
"""

import dataclasses

from experiments.configs.base import LoopConfig, TrainConfig
from experiments.configs.clicktrain import PruneConfig
from experiments.data import DataConfig

EPOCHS = 60


def configs() -> list[TrainConfig]:
    """``resnet18-cifar10-modern-dense``, and the same pruned 8x over all convolutions."""
    dense = TrainConfig(
        name="resnet18-cifar10-modern-dense",
        net="resnet18",
        data=DataConfig("cifar10"),
        epochs=EPOCHS,
        batch_size=512,
        partial_batch="drop",
        # In proportion to the batch: 0.1 at 128.
        learning_rate=0.4,
        lr_schedule="cosine",
        label_smoothing=0.1,
        ema_epochs=EPOCHS // 6,
        precision="bfloat16",
        loop=LoopConfig(eval_every_epochs=5),
        expected="95% and more expected",
    )
    prune = PruneConfig(
        (),
        coeff=2.5e-4,
        select_epoch=EPOCHS // 10,
        prune_epoch=EPOCHS // 5,
        target=8.0,
        importance="group_taylor",
        importance_steps=16,
    )
    return [dense, dataclasses.replace(dense, name="resnet18-cifar10-modern-8.0x", method=prune, expected="not known")]
