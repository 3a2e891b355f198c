"""A run of a second: the small net at an eighth of its width on 140 digits, all phases, a last partial batch."""

import dataclasses
from pathlib import Path

from PIL import Image

from experiments.configs import LoopConfig, PruneConfig, TrainConfig
from experiments.data import DataConfig, Dataset

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


def as_files(folder: Path, dataset: Dataset, evaluated: int) -> Path:
    """A folder of the set's images as PNG files in colour, for a streamed run."""
    parts = (dataset.train_images, dataset.train_labels), (dataset.eval_images[:evaluated], dataset.eval_labels)
    for part, (images, labels) in zip(("train", "test"), parts):
        for index, (image, label) in enumerate(zip(images, labels)):
            place = folder / part / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).convert("RGB").save(place / f"{index:04d}.png")
    return folder


def changed(**fields: object) -> TrainConfig:
    """The tiny config with other fields."""
    return dataclasses.replace(CONFIG, **fields)
