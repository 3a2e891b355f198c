"""What was measured, kept on disk: one JSON file per kind of device, its entries apart by the versions of jax.

A cache may lose what it holds but never stops anybody: a file that is broken, of another format or cannot be read
or written is passed over with a warning.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

try:
    import fcntl
except ImportError:  # Not a POSIX system: writes are still whole, but of two at one time the last one counts.
    fcntl = None

ENVIRONMENT = "CLICKTRAIN_CACHE"
_FORMAT = 1


def cache_folder() -> pathlib.Path:
    """The folder that the variable ``CLICKTRAIN_CACHE`` names, else ``~/.cache/clicktrain-jax``."""
    named = os.environ.get(ENVIRONMENT)
    return pathlib.Path(os.path.expanduser(named or "~/.cache/clicktrain-jax"))


def device_kind(device: Any = None) -> str:
    """What decides speed, in words: a GPU's name; for a CPU, which has none in jax, its kind and number of cores.

    Args:
        device: a `jax.Device`; None for the first one.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return f"cpu {platform.machine()} {os.cpu_count()} cores"
    return device.device_kind


class Cache:
    """Entries by key, for one kind of device and the running versions of jax and jaxlib.

    Nothing is held in memory: two processes see what each other stored.

    Args:
        kind: of the device, `device_kind` when None.
        folder: where the files are, `cache_folder` when None; made when something is stored.
    """

    def __init__(self, kind: str | None = None, folder: str | os.PathLike | None = None):
        self.kind = device_kind() if kind is None else kind
        folder = cache_folder() if folder is None else pathlib.Path(folder)
        self.path = folder / f"{re.sub('[^a-z0-9]+', '-', self.kind.lower()).strip('-')}.json"
        self.versions = f"jax {jax.__version__}, jaxlib {_jaxlib_version()}"

    def get(self, facts: Mapping[str, object]) -> dict | None:
        """The entry stored for these facts, None if there is none.

        Raises:
            ValueError: a fact is not plain data (text, numbers, truth values, None, and tuples or lists of them).
        """
        key = key_of(facts)
        stored = self._read(warn=True)
        if stored and self.versions not in stored:
            warnings.warn(
                f"{self.path} was measured with {'; '.join(sorted(stored))}, not with {self.versions}: it is not used",
                stacklevel=2,
            )
        entry = stored.get(self.versions, {}).get(key)
        return entry if isinstance(entry, dict) else None

    def put(self, facts: Mapping[str, object], entry: Mapping[str, object]) -> None:
        """Store an entry of plain data, in place of an older one; what others stored meanwhile is kept.

        Raises:
            ValueError: a fact or the entry is not plain data.
        """
        key = key_of(facts)
        try:
            json.dumps(entry, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"an entry is plain data that JSON can hold, got {entry!r}: {error}") from error
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                # A file that cannot be understood was warned of when it was read; here it gives way.
                stored = self._read(warn=False)
                stored.setdefault(self.versions, {})[key] = dict(entry)
                self._write({"format": _FORMAT, "device_kind": self.kind, "versions": stored})
        except OSError as error:
            warnings.warn(f"what was measured could not be kept in {self.path}: {error}", stacklevel=2)

    def _read(self, warn: bool) -> dict[str, dict]:
        """Entries by key by versions; empty where there is no file or none that can be used."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            reason = self._strange(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = str(error)
        if reason is None:
            return content["versions"]
        if warn:
            warnings.warn(f"the tuning cache {self.path} is not used: {reason}", stacklevel=3)
        return {}

    def _strange(self, content: object) -> str | None:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return f"it is not of format {_FORMAT}"
        if content.get("device_kind") != self.kind:
            return f"it is for {content.get('device_kind')!r}, this is {self.kind!r}"
        versions = content.get("versions")
        if not isinstance(versions, dict) or not all(isinstance(entries, dict) for entries in versions.values()):
            return "its versions hold no entries"
        return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own: the one with the entries is replaced, and a lock would go with the old one.
        with open(self.path.with_suffix(".lock"), "a", encoding="utf-8") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, content: dict) -> None:
        """In one step: a reader, or a process that is killed, leaves the old file or the new one, never half."""
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _jaxlib_version() -> str:
    try:
        return importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:  # Installed past pip.
        return "unknown"


def key_of(facts: Mapping[str, object]) -> str:
    """The facts as one line of text, alike for alike facts in any order.

    Raises:
        ValueError: a fact is not plain data.
    """
    try:
        return json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts are plain data that JSON can hold, got {dict(facts)!r}: {error}") from error
