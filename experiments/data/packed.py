"""One file a data set: the encoded images, readable with numpy and Pillow alone.

A zip of .npy arrays (`np.savez_compressed`): per split the concatenated image files, their
lengths and the labels, and a JSON note. No pickle. Two thirds of a small JPEG are a header common
to all, which the zip's compression folds away: CIFAR-10 as JPEG, 60,000 images, takes 18.4 MB
instead of 55. PNGs become lossless WebP, pixel for pixel the same in three quarters of the bytes:
107 MB. A file may lie in parts (FILE.part0, FILE.part1, ...), for those who can move only so much
at a time; `load_packed` joins them.
"""

import glob
import io
import json
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from experiments.data import tfds_source
from experiments.data.dataset import DataConfig, DatasetMissing, RawArrays, check_raw
from experiments.data.decode import encoding_of

_FORMAT = "clicktrain-packed-images"
_VERSION = 1
_SPLITS = ("train", "test")


def pack(config: DataConfig, out_path: str | os.PathLike[str], parts: int = 1) -> list[Path]:
    """Packs both splits of a TFDS data set into one file; same input, same bytes.

    Args:
        config: `name` and `dir` (a TFDS directory) say what to pack; it is packed whole, so
            `train_examples` must be None, and `eval_split` makes no difference.
        out_path: The file to write; replaced if it exists, each part whole or not at all.
        parts: Into how many it is cut, of one size; 1 writes `out_path` itself.

    Returns:
        What was written: `out_path`, or its parts in order.

    Raises:
        DatasetMissing: If the data set is not there.
        ValueError: If it is no TFDS data set of images, or only a part of it is asked for; no
            parts.
    """
    if parts < 1:
        raise ValueError(f"parts={parts}; expected at least 1")
    if config.name in ("digits", "imagenet2012"):
        raise ValueError(
            f"name={config.name!r} cannot be packed; expected another data set: digits is embedded, "
            "and imagenet2012 does not fit in memory"
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
        images = [_smaller(image) for image in split.images]
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(images), np.uint8)
        arrays[f"{name}_lengths"] = np.array([len(image) for image in images], np.uint32)
        arrays[f"{name}_labels"] = split.labels
    meta = {"format": _FORMAT, "version": _VERSION, "name": config.name, "num_classes": encoded.num_classes}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    whole = io.BytesIO()
    np.savez_compressed(whole, **arrays)
    data, out = whole.getvalue(), Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in files_of(out):  # Of another number of parts, they would be read instead.
        old.unlink()
    if parts == 1:
        _write(out, data)
        return [out]
    size = -(-len(data) // parts)
    written = [out.with_name(f"{out.name}.part{number}") for number in range(parts)]
    for number, path in enumerate(written):
        _write(path, data[number * size : (number + 1) * size])
    return written


def files_of(path: Path) -> list[Path]:
    """The file itself, or its parts in order where it lies in parts; empty where there is neither.

    Raises:
        ValueError: If a part between others is missing.
    """
    if path.is_file():
        return [path]
    numbered = {
        int(found[1]): other
        for other in path.parent.glob(f"{glob.escape(path.name)}.part*")
        if (found := re.fullmatch(r".*\.part(\d+)", other.name))
    }
    if sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"{path} lies in parts {sorted(numbered)}; expected all from 0 on: copy the others here too")
    return [numbered[number] for number in sorted(numbered)]


def _smaller(image: bytes) -> bytes:
    """A PNG as lossless WebP, the same pixels; anything else as it is."""
    from PIL import Image

    if encoding_of([image]) != "png":
        return image
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        # WebP has no grey images: they would come back with three channels.
        if opened.mode != "RGB":
            return image
        opened.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep others from reading it.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_packed(path: str | os.PathLike[str], *, name: str | None = None) -> RawArrays:
    """Reads and decodes a file made by `pack`; needs neither TFDS nor the network.

    Args:
        path: The file, also where only its parts are there.
        name: The data set it must hold; None takes any.

    Returns:
        The decoded splits, the pixels equal to what the TFDS directory gives.

    Raises:
        DatasetMissing: If there is no such file.
        ValueError: If it is truncated, damaged, of another kind or version, or holds another set.
    """
    encoded, found = _read(Path(path))
    if name is not None and found != name:
        raise ValueError(f"{path} holds {found!r}; expected {name!r}: set data.name={found} or give another file")
    return check_raw(encoded.decode(), str(path))


def _read(path: Path) -> tuple[tfds_source.Encoded, str]:
    again = "expected a file made by `python -m experiments pack-data`: make it or copy it again"
    parts = files_of(path)
    if not parts:
        raise DatasetMissing(f"{path} is no file; {again}")
    try:
        whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
        with np.load(whole, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            kind = (meta["format"], meta["version"])
            splits = {split: _read_split(file, split) for split in _SPLITS}
            num_classes, name = int(meta["num_classes"]), str(meta["name"])
    except Exception as error:  # Damage surfaces as BadZipFile, zlib.error, KeyError, ...
        raise ValueError(f"{path} cannot be read as a packed data set ({error!r}); {again}") from error
    if kind != (_FORMAT, _VERSION):
        raise ValueError(f"{path} is of format {kind}; expected {(_FORMAT, _VERSION)}: pack it again with this version")
    return tfds_source.Encoded(splits, num_classes), name


def _read_split(file: np.lib.npyio.NpzFile, split: str) -> tfds_source.EncodedSplit:
    data = file[f"{split}_bytes"].tobytes()
    ends = np.cumsum(file[f"{split}_lengths"], dtype=np.int64).tolist()
    if not ends or ends[-1] != len(data):
        raise ValueError(f"{split!r}: {len(data)} bytes, lengths sum to {ends[-1:]}")
    starts = [0, *ends[:-1]]
    images = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    return tfds_source.EncodedSplit(images, file[f"{split}_labels"])
