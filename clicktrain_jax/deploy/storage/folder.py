"""The folder of an export: files that appear whole or not at all, and are read with every byte checked."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clicktrain_jax.deploy.storage.manifest import MANIFEST, REPORT, Leaf, parse

# The manifest is read before anything of it is known.
_MAX_MANIFEST_BYTES = 64 * 2**20


def sha256(data: bytes) -> str:
    """sha256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Errors name the file, or the part of it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_checked_manifest(folder: Path) -> tuple[dict[str, Any], list[Leaf]]:
    """The manifest of a folder, and its leaves.

    Raises:
        ValueError: it is missing, cut, changed, or no manifest of an export; the file is named.
    """
    path = folder / MANIFEST
    with naming(path):
        if not folder.is_dir():
            raise ValueError("the folder does not exist: expected that of an export")
        data = _read_inside(folder, MANIFEST, _MAX_MANIFEST_BYTES)
        return parse(data)


def _read_inside(folder: Path, name: str, most: int) -> bytes:
    """The bytes of a plain file that really lies in the folder."""
    path = folder / name
    if not path.exists():
        raise ValueError("is missing")
    if path.resolve().parent != folder.resolve() or not path.is_file():
        raise ValueError("is not a plain file inside of its folder, but a link or a folder: refused")
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"has {size} bytes, at most {most} are expected: it was changed")
    return path.read_bytes()


def read_checked(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """The bytes of one file that the manifest lists.

    Raises:
        ValueError: it is missing, cut, changed, or another export's; the file is named.
    """
    entry = manifest["files"][name]
    with naming(folder / name):
        data = _read_inside(folder, name, entry["bytes"])
        if len(data) != entry["bytes"]:
            raise ValueError(f"has {len(data)} bytes, expected {entry['bytes']}: it was cut")
        if sha256(data) != entry["sha256"]:
            raise ValueError("is not the file of this manifest: a byte was changed, or it is another export's")
        return data


def place(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put files into a folder that appears whole, in place of an earlier export.

    Raises:
        ValueError: the folder holds something else, or more than an export.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that renaming it does not cross file systems.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new, earlier = Path(temporary) / "new", Path(temporary) / "earlier"
        new.mkdir()
        for name, data in contents.items():
            (new / name).write_bytes(data)
        try:
            if folder.exists():
                folder.rename(earlier)
            new.rename(folder)
        except BaseException:  # an interrupt too must not lose the earlier export with the temporary folder
            if earlier.exists() and not folder.exists():
                earlier.rename(folder)
            raise


def _check_replaceable(folder: Path) -> None:
    """Raise a ValueError unless the folder is new, empty, or an export and nothing more."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: expected a folder for the export")
    present = {path.name for path in folder.iterdir()}
    if not present:
        return
    if MANIFEST not in present:
        raise ValueError(f"{folder} is no export and not empty: choose another folder, or remove it")
    try:
        manifest = read_checked_manifest(folder)[0]
    except ValueError as error:
        raise ValueError(f"{folder} holds something else or a broken export ({error}): remove it yourself") from error
    foreign = sorted(present - {MANIFEST, REPORT} - set(manifest["files"]))
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]!r} beside an export: move it away, it would be lost")
