"""Decoded arrays on disk, so that the second run starts in well under a second.

One uncompressed .npz a source, named by the source's files (names, sizes, modification times):
a source that changes gets a new entry. The zip's own checksums tell a damaged entry.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.data.dataset import RawArrays, check_raw

_VERSION = 2  # Raise it when the layout or the decoding changes: old entries are then not found.
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def cached(cache_dir: Path, name: str, files: Sequence[Path], read: Callable[[], RawArrays]) -> RawArrays:
    """Returns the cached arrays of `files`, or reads them and keeps them.

    Args:
        cache_dir: Created when needed. If it cannot be written, a warning says so and the arrays
            are used uncached.
        name: Of the data set; starts the entry's file name.
        files: The source's files, which name the entry.
        read: Reads the source; called when there is no sound entry.
    """
    path = cache_dir / f"{name}-{_key(files)}.npz"
    raw = _load(path)
    if raw is None:
        raw = read()
        try:
            _save(path, raw)
        except OSError as error:
            warnings.warn(
                f"cannot keep decoded images in {cache_dir} ({error}); every start will decode "
                "them again: set CLICKTRAIN_CACHE or data.cache_dir to a folder with room",
                stacklevel=2,
            )
    return raw


def _key(files: Sequence[Path]) -> str:
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(json.dumps([_VERSION, seen]).encode()).hexdigest()[:16]


def _load(path: Path) -> RawArrays | None:
    """The entry at `path`, or None if there is none or it is damaged."""
    if not os.path.isfile(path):  # Unlike Path.is_file, False for a folder that may not be seen.
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as entry:
            # Reading a member to its end checks its CRC-32; damage raises.
            arrays = {key: entry[key] for key in _ARRAYS}
            meta = json.loads(entry["meta"].tobytes())
        raw = RawArrays(**arrays, num_classes=meta["num_classes"], encoding=meta["encoding"])
        return check_raw(raw, str(path))
    except Exception as error:  # Damage may surface as almost anything, and all means: rebuild.
        damage = error
    warnings.warn(f"cache entry {path} is damaged ({damage}); rebuilding it", stacklevel=3)
    return None


def _save(path: Path, raw: RawArrays) -> None:
    """Writes beside the target, then renames: a reader sees a whole entry or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = json.dumps({"num_classes": raw.num_classes, "encoding": raw.encoding}).encode()
    arrays = {key: getattr(raw, key) for key in _ARRAYS}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays, meta=np.frombuffer(meta, np.uint8))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
