"""What a data set is once loaded, and what a user may ask for.

Plain numpy on the host; the loop puts it on the device once, as uint8.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np


class DatasetMissing(ValueError):
    """The data set is neither on this machine nor obtainable right now; the message says how."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, split for one experiment. Arrays are read-only.

    Attributes:
        name: As in `DataConfig`.
        train_images: uint8 (N, H, W, C).
        train_labels: int32 (N,).
        eval_images: uint8 (M, H, W, C).
        eval_labels: int32 (M,).
        num_classes: Number of classes; every label is in [0, num_classes).
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        eval_split: "validation" (held out of the train split) or "test".
        encoding: How the source stored its pixels, told from its bytes: "png", "lossless webp" and
            "raw" keep them, "jpeg" and "lossy webp" do not; several are joined by "+". CIFAR as
            "jpeg" is a lossy re-encoding: accuracies on it do not compare with published ones.
        fingerprint: First 16 hex digits of the SHA-256 over the four arrays.
    """

    name: str
    train_images: np.ndarray = dataclasses.field(repr=False)
    train_labels: np.ndarray = dataclasses.field(repr=False)
    eval_images: np.ndarray = dataclasses.field(repr=False)
    eval_labels: np.ndarray = dataclasses.field(repr=False)
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_split: Literal["validation", "test"]
    encoding: str
    fingerprint: str

    @property
    def train_examples(self) -> int:
        """How many images an epoch has."""
        return len(self.train_labels)

    @property
    def eval_examples(self) -> int:
        """How many images are evaluated on."""
        return len(self.eval_labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.train_images.shape[1:]

    def eval_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The evaluation set in order: uint8 (B, H, W, C) and int32 (B,), the last ones perhaps fewer."""
        for begin in range(0, len(self.eval_labels), batch_size):
            yield self.eval_images[begin : begin + batch_size], self.eval_labels[begin : begin + batch_size]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data set, from where, and how it is split.

    Attributes:
        name: "digits" (embedded, no files), "cifar10", "cifar100", or any other data set that is
            prepared in `dir`, as by `prepare-data`.
        dir: A TFDS data directory (it holds NAME/VERSION in array_record form), or a file made by
            `python -m experiments pack-data`. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
        eval_split: "test" trains on the whole train split and evaluates on the test set.
            "validation" holds a fixed, class-stratified part of the train split out and evaluates
            on that (CIFAR: 45,000 / 5,000; digits: 1,000 / 198); the test set stays unseen. Fixed
            means: by the order of the records, so the same for every run on one prepared copy and
            for archives packed from it, whatever the training seed.
        train_examples: Train on the first n of a fixed, class-balanced order only; None for all.
        cache_dir: Where decoded arrays are kept. None: $CLICKTRAIN_CACHE, else
            ~/.cache/clicktrain-jax.
        image_size: None holds the whole set in memory; its images are of one size. A number streams it instead: images
            of any size are read and decoded while the net trains, a random-resized crop of so many pixels a side to
            train on, the centre crop to evaluate on. `dir` may then be a folder of images itself, with train/CLASS/FILE
            and val/CLASS/FILE, or one that holds it under the set's name. Of a TFDS set the labels are not known
            beforehand: "validation" and `train_examples` are plain draws there.
        least_crop_area: Of a random-resized crop, as a share of the image's.
    """

    name: str = "digits"
    dir: str | None = None
    eval_split: Literal["validation", "test"] = "test"
    train_examples: int | None = None
    cache_dir: str | None = None
    image_size: int | None = None
    least_crop_area: float = 0.08


@dataclasses.dataclass(frozen=True, eq=False)
class RawArrays:
    """A source as decoded, before any splitting: its own train and test parts.

    Images are uint8 (N, H, W, C), labels int32 (N,).
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    encoding: str


def check_raw(raw: RawArrays, where: str) -> RawArrays:
    """Returns `raw` unchanged, or raises ValueError if its arrays do not belong together."""
    for part, images, labels in (
        ("train", raw.train_images, raw.train_labels),
        ("test", raw.test_images, raw.test_labels),
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int32:
            raise ValueError(
                f"{where}: {part} images are {images.dtype}{images.shape} with {labels.dtype} "
                "labels; expected uint8 (N, H, W, C) and int32: rebuild the file"
            )
        if labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"{where}: {part} has {len(images)} images and labels of shape {labels.shape}; "
                "expected one label an image and at least one image: rebuild the file"
            )
        if labels.min() < 0 or labels.max() >= raw.num_classes:
            raise ValueError(
                f"{where}: {part} labels span {labels.min()}..{labels.max()}; expected "
                f"0..{raw.num_classes - 1} for {raw.num_classes} classes: rebuild the file"
            )
    if raw.train_images.shape[1:] != raw.test_images.shape[1:]:
        raise ValueError(
            f"{where}: train images are {raw.train_images.shape[1:]}, test images "
            f"{raw.test_images.shape[1:]}; expected one shape: rebuild the file"
        )
    return raw


def fingerprint(*arrays: np.ndarray) -> str:
    """First 16 hex digits of the SHA-256 over dtypes, shapes and contents, in the order given."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def fingerprint_of_text(text: str) -> str:
    """First 16 hex digits of the SHA-256 over a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
