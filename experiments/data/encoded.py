"""Sets of encoded images that are read one by one, in any order: a TFDS directory or a folder of image files."""

import dataclasses
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from experiments.data import tfds_source
from experiments.data.dataset import DatasetMissing, fingerprint_of_text
from experiments.data.image_folder import LITTER, empty_class, find_classes

# Of sets that have both it is "test", but ImageNet's has no labels in TFDS.
_EVAL_SPLITS = {"imagenet2012": ("validation", "test")}


class EncodedImages(Protocol):
    """One split: `len` of it, and each image by its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The image file and its label; from any thread."""

    def name_of(self, index: int) -> str:
        """Says which image it is."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSet:
    """A set's two parts.

    Attributes:
        train: To train on.
        test: Its own test part.
        train_labels: int32 (N,), where they are known without reading the images; else None.
        num_classes: Number of classes.
        fingerprint: Of names and sizes; no image is read for it.
    """

    train: EncodedImages
    test: EncodedImages
    train_labels: np.ndarray | None
    num_classes: int
    fingerprint: str


def find(name: str, directory: Path) -> EncodedSet:
    """A set by its name.

    Args:
        name: Of the set.
        directory: A folder of images itself (it holds train/), one that holds it as NAME/, or a TFDS data directory
            with NAME/VERSION in array_record form.

    Raises:
        DatasetMissing: If none of these is there.
        ValueError: If it is not laid out as expected, or cannot be read.
    """
    for folder in (directory, directory / name):
        if (folder / "train").is_dir():
            return _of_folder(folder)
    prepared = tfds_source.find_prepared(name, directory)
    if prepared is not None:
        return _of_tfds(name, prepared)
    raise DatasetMissing(
        f"no images of {name} in {directory}; expected train/CLASS/FILE and val/CLASS/FILE there or in {name}/, or a "
        f"TFDS data set {name}/VERSION in array_record form: point data.dir at one"
    )


class FolderImages:
    """The image files below a folder of classes.

    Args:
        part: Holds a folder a class.
        classes: Their names, in the order of labels.

    Attributes:
        labels: int32 (N,).

    Raises:
        OSError: If something cannot be read.
        ValueError: If a class is empty.
    """

    def __init__(self, part: Path, classes: list[str]) -> None:
        self._part, self._files, sizes, counts = str(part), [], [], []
        for name in classes:
            # Text, not paths: a million of these are to fit in memory.
            with os.scandir(part / name) as entries:
                found = sorted((f"{name}/{entry.name}", entry.stat().st_size) for entry in entries if _is_image(entry))
            if not found:
                raise empty_class(part / name)
            names, own_sizes = zip(*found)
            self._files += names
            sizes.append(np.asarray(own_sizes))
            counts.append(len(names))
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
        self._sizes = np.concatenate(sizes)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The image file and its label."""
        with open(self.name_of(index), "rb") as file:
            return file.read(), int(self.labels[index])

    def name_of(self, index: int) -> str:
        """The file's path."""
        return f"{self._part}/{self._files[index]}"

    @property
    def fingerprint(self) -> str:
        """Of the files' names and sizes."""
        return fingerprint_of_text("\n".join([*self._files, *map(str, self._sizes)]))


def _is_image(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and entry.name not in LITTER and entry.is_file()


def _of_folder(folder: Path) -> EncodedSet:
    classes, parts, _ = find_classes(folder)
    train, test = (FolderImages(parts[split], classes) for split in ("train", "test"))
    seen = fingerprint_of_text(f"{train.fingerprint} {test.fingerprint}")
    return EncodedSet(train, test, train.labels, len(classes), seen)


class TfdsImages:
    """A split of a TFDS directory.

    Args:
        builder: TFDS's reader of it.
        split: Its name.
        folder: Where it lies.
    """

    def __init__(self, builder: object, split: str, folder: Path) -> None:
        self._source, self._features = tfds_source.feature_source(builder, split)
        self._name = f"{split} of {folder}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The image file and its label."""
        features = self._features(index)
        return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]

    def name_of(self, index: int) -> str:
        """The record's number, and its name or id where it has one."""
        features = self._features(index)
        named = (features[key].bytes_list.value[0].decode() for key in ("file_name", "id") if key in features)
        told = next((f" ({name})" for name in named), "")
        return f"record {index} of {self._name}{told}"


def _of_tfds(name: str, folder: Path) -> EncodedSet:
    builder, num_classes, available = tfds_source.open_builder(folder)
    wanted = _EVAL_SPLITS.get(name, ("test", "validation"))
    test = next((split for split in wanted if split in available), None)
    if "train" not in available or test is None:
        raise ValueError(
            f"{folder} has the splits {available}; expected 'train' and {' or '.join(map(repr, wanted))}: prepare "
            f"{name} again in array_record form"
        )
    files = "\n".join(f"{file.name} {file.stat().st_size}" for file in tfds_source.files_of(folder))
    parts = (TfdsImages(builder, split, folder) for split in ("train", test))
    return EncodedSet(*parts, None, num_classes, fingerprint_of_text(files))
