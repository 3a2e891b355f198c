"""The demo: a small net on scikit-learn's digits, dense and pruned, the same epochs.

Command: make demo   (or: python -m experiments demo)
"""

import dataclasses

from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig

_EPOCHS = 20


def configs() -> list[TrainConfig]:
    """``digits-dense`` and ``digits-clicktrain``."""
    dense = TrainConfig(
        name="digits-dense",
        net="small",
        data=DataConfig("digits"),
        epochs=_EPOCHS,
        batch_size=64,
        lr_schedule="cosine",
        crop_padding=1,
        flip=False,
        mixup_epoch=10,
        # An epoch takes a fraction of a second: saving each one would be most of the time.
        loop=LoopConfig(checkpoint_every_epochs=5),
    )
    prune = PruneConfig(fractions=(0.72,), coeff=1e-4, select_epoch=6, prune_epoch=10)
    return [dense, dataclasses.replace(dense, name="digits-clicktrain", prune=prune)]
