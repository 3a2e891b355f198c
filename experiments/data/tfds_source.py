"""Reads a TFDS directory in array_record form: no TensorFlow, no network once it is prepared.

Whether a data set is prepared is seen on the file system alone; TFDS is imported only after that,
so a missing data set costs the host check of at most three seconds and nothing more.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import prepare
from experiments.data.dataset import DatasetMissing, RawArrays
from experiments.data.decode import decode_images, encoding_of

_SPLITS = ("train", "test")


class EncodedSplit(NamedTuple):
    """One split as stored: image files (JPEG or PNG), and int32 labels (N,)."""

    images: list[bytes]
    labels: np.ndarray


class Encoded(NamedTuple):
    """A source's splits, "train" and "test", with the images still encoded."""

    splits: dict[str, EncodedSplit]
    num_classes: int

    def decode(self) -> RawArrays:
        """Decodes both splits; ValueError if an image is broken."""
        train, test = (self.splits[name] for name in _SPLITS)
        return RawArrays(
            decode_images(train.images),
            train.labels,
            decode_images(test.images),
            test.labels,
            self.num_classes,
            encoding_of(train.images + test.images),
        )


def data_dir(given: str | None) -> Path:
    """The path given, else $TFDS_DATA_DIR, else TFDS's own default folder."""
    return Path(given or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find_prepared(name: str, directory: Path) -> Path | None:
    """The newest prepared DIRECTORY/NAME/VERSION, or None; looks at files only."""
    found = []
    for info in (directory / name).glob("*.*.*/dataset_info.json"):
        version = info.parent.name.split(".")
        # TFDS writes into VERSION.incompleteXXX and renames at the end.
        if all(part.isdigit() for part in version) and (info.parent / "features.json").is_file():
            found.append((tuple(int(part) for part in version), info.parent))
    return max(found)[1] if found else None


def find_or_prepare(name: str, directory: Path) -> Path:
    """The prepared folder of `name`; downloads and prepares it when its host answers.

    Args:
        name: Of any prepared data set; "cifar10" and "cifar100" can be downloaded.
        directory: The TFDS data directory; need not exist.

    Raises:
        DatasetMissing: If it is not prepared and cannot be downloaded now, within seconds.
    """
    folder = find_prepared(name, directory)
    if folder is not None:
        return folder
    remedy = (
        f"point data.dir at a TFDS directory that holds {name}/VERSION in array_record form, or "
        "at a file made by `python -m experiments pack-data`, or make one of a folder of images: "
        f"python -m experiments prepare-data --from FOLDER --name {name}"
    )
    if name not in prepare.SOURCES:
        known = ("digits", *prepare.SOURCES)
        raise DatasetMissing(f"name={name!r} is no known data set {known}, and not prepared in {directory}: {remedy}")
    remedy += ", or run once with network access"
    if directory.suffix and not directory.exists():
        raise DatasetMissing(f"{directory} does not exist: {remedy}")
    url = prepare.SOURCES[name].url
    if not prepare.host_answers(url):
        raise DatasetMissing(
            f"{name} is not prepared in {directory}, and {url} does not answer within {prepare.TIMEOUT_S:g} s: {remedy}"
        )
    try:
        return prepare.prepare(name, directory)
    except OSError as error:
        raise DatasetMissing(
            f"{name} is not prepared in {directory}, and downloading it from {url} failed "
            f"({error}): try again later, or {remedy}"
        ) from error


def files_of(folder: Path) -> list[Path]:
    """Every file of a prepared folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def read(folder: Path) -> RawArrays:
    """Reads and decodes the splits "train" and "test" of a prepared folder.

    Raises:
        ValueError: As for `read_encoded`, or if an image is broken.
    """
    return read_encoded(folder).decode()


def read_encoded(folder: Path) -> Encoded:
    """Reads the splits "train" and "test" of a prepared folder, images still encoded.

    Args:
        folder: .../NAME/VERSION, with the features "image" and "label".

    Raises:
        ValueError: If it is in another file format, lacks a split, or is damaged; or if
            tensorflow-datasets is not installed.
    """
    builder, num_classes, available = open_builder(folder)
    again = f"prepare {folder.parent.name} again in array_record form"
    splits = {}
    for split in _SPLITS:
        if split not in available:
            raise ValueError(f"{folder} has the splits {available}; expected {_SPLITS}: {again}")
        try:
            # Asking for all records at once reads in bulk, over twice as fast as one by one.
            encoded = {"image": prepare.import_tfds().decode.SkipDecoding()}
            source = builder.as_data_source(split=split, decoders=encoded)
            records = source.__getitems__(list(range(len(source))))
            labels = np.array([record["label"] for record in records], np.int32)
            splits[split] = EncodedSplit([record["image"] for record in records], labels)
        except Exception as error:  # array_record reports damage as RuntimeError and others.
            raise ValueError(f"cannot read {split!r} of {folder} ({error!r}): {again}") from error
    return Encoded(splits, num_classes)


def open_builder(folder: Path) -> tuple[Any, int, list[str]]:
    """TFDS's reader of a prepared folder, the number of classes, and the splits that it has.

    Raises:
        ValueError: If it is in another file format, or is damaged; or if tensorflow-datasets is not installed.
    """
    _check_format(folder)
    tfds = prepare.import_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        return builder, builder.info.features["label"].num_classes, sorted(builder.info.splits)
    except Exception as error:  # Whatever the parsers raise, the folder's metadata is unusable.
        again = f"prepare {folder.parent.name} again in array_record form"
        raise ValueError(f"{folder} is no readable TFDS data set ({error!r}): {again}") from error


def feature_source(builder: Any, split: str) -> tuple[Any, Callable[[int], Any]]:
    """A split's records, and a function from a record's number to its features, protocol buffers by name.

    Without TFDS's decoding, which takes longer than to read a record and keeps other threads from their work meanwhile.
    """
    tfds = prepare.import_tfds()
    from tensorflow_datasets.proto import tf_example_pb2

    source = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return source, lambda index: tf_example_pb2.Example.FromString(source[index]).features.feature


def _check_format(folder: Path) -> None:
    """The file format from the metadata itself: TFDS's own message names no remedy."""
    try:
        found = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder}/dataset_info.json cannot be read ({error}); expected TFDS metadata: prepare the data set again"
        ) from error
    if found != "array_record":
        raise ValueError(
            f"{folder} is in {found!r} form; expected 'array_record', which reads without "
            "TensorFlow: prepare it with file_format='array_record', or in another data.dir"
        )
