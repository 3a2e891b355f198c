"""The demo: a small net on scikit-learn's digits, dense and pruned, the same epochs.

Command: make demo   (or: python -m experiments demo)
"""

import dataclasses

from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig


def configs() -> list[TrainConfig]:
    """``digits-dense`` and ``digits-clicktrain``."""
    dense = TrainConfig(
        name="digits-dense",
        net="small",
        data=DataConfig("digits"),
        epochs=30,
        batch_size=64,
        lr_schedule="cosine",
        crop_padding=1,
        flip=False,
        # An epoch takes a fraction of a second: saving each one would be most of the time.
        loop=LoopConfig(checkpoint_every_epochs=5),
    )
    prune = PruneConfig(fractions=(0.72,), coeff=1e-3, select_epoch=6, prune_epoch=12)
    return [dense, dataclasses.replace(dense, name="digits-clicktrain", method=prune)]
