"""Downloads CIFAR and writes it as a TFDS directory in array_record form, without TensorFlow.

TFDS's own CIFAR builders encode and unpack through TensorFlow, and its downloader retries for
minutes. So the archive is fetched here, in one attempt, checked, and handed to TFDS as PNG bytes;
the result has the names, features and lossless pixels of the official preparation.
"""

import dataclasses
import functools
import hashlib
import http.client
import io
import sys
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.writing import import_tfds, write_tfds

TIMEOUT_S = 3.0
_STALL_S = 30.0  # A download that delivers nothing for so long has failed.
_VERSION = "3.0.2"
_IMAGE_BYTES = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set's binary version lies and how it is laid out.

    Attributes:
        url: Of the .tar.gz.
        sha256: Of that file, in hex.
        files: Split name -> file names inside the archive, whatever their folder.
        label_keys: One byte a key, in this order, before each image; key -> number of classes.
    """

    url: str
    sha256: str
    files: dict[str, tuple[str, ...]]
    label_keys: dict[str, int]


SOURCES = {
    "cifar10": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        label_keys={"label": 10},
    ),
    "cifar100": Source(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        label_keys={"coarse_label": 20, "label": 100},
    ),
}


def host_answers(url: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether a HEAD request succeeds in time; proxies from the environment are honoured."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=timeout_s):
                answered.set()
        except Exception:  # No network, a refused or an odd answer: all mean "not now".
            pass

    # In a thread, as a name lookup obeys no timeout of ours.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answered.is_set()


def prepare(name: str, directory: Path) -> Path:
    """Downloads `name` and writes DIRECTORY/NAME/VERSION.

    Args:
        name: A key of `SOURCES`.
        directory: The TFDS data directory; created when needed.

    Returns:
        The prepared folder.

    Raises:
        OSError: If the download fails, or what came is not the file expected.
        ValueError: If tensorflow-datasets is not installed.
    """
    import_tfds()  # Before the download: it would be for nothing.
    source = SOURCES[name]
    print(f"downloading {source.url} (about 165 MB) ...", file=sys.stderr)
    try:
        with urllib.request.urlopen(source.url, timeout=_STALL_S) as response:
            archive = response.read()
    except http.client.HTTPException as error:  # Cut off midway; not an OSError.
        raise OSError(repr(error)) from error
    found = hashlib.sha256(archive).hexdigest()
    if found != source.sha256:
        raise OSError(f"the file has SHA-256 {found}, expected {source.sha256}")
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                members[Path(member.name).name] = file.read()
    content = {split: b"".join(members[file] for file in files) for split, files in source.files.items()}
    return write(name, directory, content)


def write(name: str, directory: Path, content: dict[str, bytes]) -> Path:
    """Writes DIRECTORY/NAME/VERSION, images as PNG.

    Args:
        name: A key of `SOURCES`; gives the label keys.
        directory: The TFDS data directory; created when needed.
        content: Split name -> records in CIFAR's binary form: label bytes, then 32x32 pixels as
            three planes.

    Returns:
        The prepared folder.
    """
    keys = SOURCES[name].label_keys
    return write_tfds(
        name,
        _VERSION,
        directory,
        {split: functools.partial(_records, split, data, tuple(keys)) for split, data in content.items()},
        image_shape=(32, 32, 3),
        encoding="png",
        labels=keys,
        description=f"{name}, prepared by experiments.data.prepare from the binary version.",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    )


def _records(split: str, data: bytes, keys: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    from PIL import Image

    table = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + _IMAGE_BYTES)
    for index, row in enumerate(table):
        pixels = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
        labels = {key: int(value) for key, value in zip(keys, row, strict=False)}
        yield index, {"id": f"{split}_{index:05d}", "image": buffer.getvalue(), **labels}
