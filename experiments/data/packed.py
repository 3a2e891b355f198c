"""One file a data set: the encoded images, readable with numpy and Pillow alone.

A zip of .npy arrays (`np.savez_compressed`): per split the concatenated image files, their
lengths and the labels, and a JSON note. No pickle. Two thirds of a small JPEG are a header common
to all, which the zip's compression folds away: CIFAR-10 as JPEG, 60,000 images, takes 18.4 MB
instead of 55. Lossless PNGs have no such header and stay near their own size.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from experiments.data import tfds_source
from experiments.data.dataset import DataConfig, DatasetMissing, RawArrays, check_raw

_FORMAT = "clicktrain-packed-images"
_VERSION = 1
_SPLITS = ("train", "test")


def pack(config: DataConfig, out_path: str | os.PathLike[str]) -> Path:
    """Packs both splits of a TFDS data set into one file; same input, same bytes.

    Args:
        config: `name` and `dir` (a TFDS directory) say what to pack; it is packed whole, so
            `train_examples` must be None, and `eval_split` makes no difference.
        out_path: The file to write; replaced if it exists, whole or not at all.

    Returns:
        `out_path`.

    Raises:
        DatasetMissing: If the data set is not there.
        ValueError: If it is no TFDS data set of images, or only a part of it is asked for.
    """
    if config.name not in ("cifar10", "cifar100"):
        raise ValueError(
            f"name={config.name!r} cannot be packed; expected 'cifar10' or 'cifar100': digits is "
            "embedded, and other sets do not fit the in-memory loop"
        )
    if config.train_examples is not None:
        raise ValueError(
            f"train_examples={config.train_examples}, but a data set is packed whole; expected "
            "None: give train_examples when loading"
        )
    source = tfds_source.data_dir(config.dir)
    if source.is_file():
        raise ValueError(f"dir={config.dir!r} is a file; expected a TFDS directory to pack from")
    encoded = tfds_source.read_encoded(tfds_source.find_or_prepare(config.name, source))
    arrays: dict[str, np.ndarray] = {}
    for name, split in encoded.splits.items():
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(split.images), np.uint8)
        arrays[f"{name}_lengths"] = np.array([len(image) for image in split.images], np.uint32)
        arrays[f"{name}_labels"] = split.labels
    meta = {
        "format": _FORMAT,
        "version": _VERSION,
        "name": config.name,
        "num_classes": encoded.num_classes,
    }
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep others from reading it.
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise
    return out


def load_packed(path: str | os.PathLike[str], *, name: str | None = None) -> RawArrays:
    """Reads and decodes a file made by `pack`; needs neither TFDS nor the network.

    Args:
        path: The file.
        name: The data set it must hold; None takes any.

    Returns:
        The decoded splits, equal to what the TFDS directory gives.

    Raises:
        DatasetMissing: If there is no such file.
        ValueError: If it is truncated, damaged, of another kind or version, or holds another set.
    """
    encoded, found = _read(Path(path))
    if name is not None and found != name:
        raise ValueError(
            f"{path} holds {found!r}; expected {name!r}: set data.name={found} or give another file"
        )
    return check_raw(encoded.decode(), str(path))


def _read(path: Path) -> tuple[tfds_source.Encoded, str]:
    again = "expected a file made by experiments.data.pack: make it or copy it again"
    if not path.is_file():
        raise DatasetMissing(f"{path} is no file; {again}")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            kind = (meta["format"], meta["version"])
            splits = {split: _read_split(file, split) for split in _SPLITS}
            num_classes, name = int(meta["num_classes"]), str(meta["name"])
    except Exception as error:  # Damage surfaces as BadZipFile, zlib.error, KeyError, ...
        raise ValueError(
            f"{path} cannot be read as a packed data set ({error!r}); {again}"
        ) from error
    if kind != (_FORMAT, _VERSION):
        raise ValueError(
            f"{path} is of format {kind}; expected {(_FORMAT, _VERSION)}: pack it again with this "
            "version"
        )
    return tfds_source.Encoded(splits, num_classes), name


def _read_split(file: np.lib.npyio.NpzFile, split: str) -> tfds_source.EncodedSplit:
    data = file[f"{split}_bytes"].tobytes()
    ends = np.cumsum(file[f"{split}_lengths"], dtype=np.int64).tolist()
    if not ends or ends[-1] != len(data):
        raise ValueError(f"{split!r}: {len(data)} bytes, lengths sum to {ends[-1:]}")
    starts = [0, *ends[:-1]]
    images = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    return tfds_source.EncodedSplit(images, file[f"{split}_labels"])
