"""A run of a second: the small net at an eighth of its width on 140 digits, all phases, a last partial batch."""

import dataclasses

from experiments.configs import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig

CONFIG = TrainConfig(
    name="tiny",
    net="small",
    width=0.125,
    data=DataConfig("digits", train_examples=140),
    epochs=5,
    batch_size=32,
    lr_schedule="cosine",
    crop_padding=1,
    flip=False,
    mixup_epoch=4,
    method=PruneConfig(fractions=(0.5,), coeff=1e-3, select_epoch=1, prune_epoch=3),
    loop=LoopConfig(progress=False),
)


def changed(**fields: object) -> TrainConfig:
    """The tiny config with other fields."""
    return dataclasses.replace(CONFIG, **fields)
