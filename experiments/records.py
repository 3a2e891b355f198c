"""The run folder: what was asked for, with what, what happened, and how it ended.

    config.json     the whole config
    setting.json    versions, device, data fingerprint, date
    data.json       where the images were found
    metrics.jsonl   a line an epoch
    summary.json    final and best accuracy, compression, seconds; written at the end
    checkpoints/    see `experiments.train.checkpoints`
    within/         the last one within an epoch, where a run makes such

What is kept of runs, below experiments/results, is a line each in a runs.jsonl: `keep` and `kept`.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from experiments.configs.base import TrainConfig, from_dict, to_dict
from experiments.data import DataConfig, place

# What is kept of the runs of a group, in its folder.
RUNS = "runs.jsonl"
# Fields that a resumed run may change: they decide neither data nor mathematics.
_FREE_FIELDS = (
    "loop.devices",
    "loop.coordinator",
    "loop.processes",
    "loop.process_id",
    "loop.progress",
    "loop.tensorboard",
    "loop.keep_checkpoints",
    "loop.checkpoint_every_epochs",
    "loop.checkpoint_every_steps",
    "loop.input_threads",
    "data.dir",
    "data.cache_dir",
    "expected",
)
_OF_A_RUN = ("name", "seed", "config", "setting", "summary", "metrics")
# Set for runs whose cores do other work at the same time.
SHARED_CORES = "CLICKTRAIN_SHARED_CORES"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


def setting() -> dict[str, Any]:
    """Versions and hardware of this process."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        **({"driver": _driver()} if device.platform == "gpu" else {}),
        "cpu": {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "load_average": os.getloadavg(),
        # Whoever starts a run beside other work says so: its seconds then compare with nothing.
        "shared_cores": bool(os.environ.get(SHARED_CORES)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found[0] if found else "unknown"


def _commit() -> str:
    # A copy that travelled without its history is told by whoever sent it.
    if told := os.environ.get("CLICKTRAIN_COMMIT"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class RunFolder:
    """One run's files.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def check(self, config: TrainConfig, data_fingerprint: str) -> bool:
        """Whether the folder holds this run already. Writes nothing.

        Args:
            config: the run's config.
            data_fingerprint: of the data set as loaded.

        Raises:
            ValueError: the folder belongs to another config or data set, or holds something else.
        """
        stored = self.path / "config.json"
        if stored.exists():
            for field, old, new in differences(read_json(stored), config):
                raise ValueError(
                    f"{self.path} belongs to another config: {field} is {old!r} there and {new!r} here; choose another "
                    "--workdir, or ask for the same run to resume it"
                    + (" (--lengthen gives it more epochs)" if field == "epochs" and new > old else "")
                )
            earlier = read_json(self.path / "setting.json").get("data_fingerprint")
            if earlier != data_fingerprint:
                raise ValueError(
                    f"{self.path} was trained on other images (fingerprint {earlier}, now {data_fingerprint}); "
                    "use the same data or another --workdir"
                )
            return True
        # A kill while the folder was being made may have left the first file, or a part of one.
        if self.path.exists() and any(
            path.name not in ("setting.json", "data.json") and path.suffix != ".tmp" for path in self.path.iterdir()
        ):
            raise ValueError(f"{self.path} is not empty and holds no run: choose another --workdir")
        return False

    def open(self, config: TrainConfig, data_fingerprint: str) -> None:
        """Make the folder, or note in it that the run goes on; `check` comes first."""
        path = self.path / "setting.json"
        now = setting()
        is_old, found = self.check(config, data_fingerprint), place(config.data)
        self.path.mkdir(parents=True, exist_ok=True)
        # Not in the setting: where a machine keeps its images is no part of a record.
        write_json(self.path / "data.json", {"dir": None if found is None else str(found)})
        if is_old:
            earlier = read_json(path)
            if any(earlier[key] != now[key] for key in ("versions", "device", "cpu")):
                warnings.warn(f"{self.path} is resumed with other versions or on another device", stacklevel=3)
            write_json(path, earlier | {"resumed": [*earlier.get("resumed", []), now]})
            return
        write_json(path, {**now, "data_fingerprint": data_fingerprint})
        # Last: a folder is a run once it has a config.
        self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Make the folder that of a config."""
        write_json(self.path / "config.json", _plain(config))

    def data(self, config: TrainConfig) -> DataConfig:
        """The run's images where the run found them, if they are still there; else where its config looks for them."""
        stored = self.path / "data.json"
        where = read_json(stored)["dir"] if stored.exists() else None
        return config.data if where is None or not Path(where).exists() else dataclasses.replace(config.data, dir=where)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def within(self) -> Path:
        """Where those within epochs lie."""
        return self.path / "within"

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        path = self.path / "summary.json"
        return read_json(path) if path.exists() else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        write_json(self.path / "summary.json", summary)

    def record(self) -> dict[str, Any]:
        """What is kept of the run: plain data, "name", "seed", and its files' contents as "config" (without the folders
        of one machine), "setting", "summary" (None of a run that is not finished) and "metrics"."""
        config = read_json(self.path / "config.json")
        config["data"] |= {"dir": None, "cache_dir": None}
        return {
            "name": config["name"],
            "seed": config["seed"],
            "config": config,
            "setting": read_json(self.path / "setting.json"),
            "summary": self.summary(),
            "metrics": read_metrics(self.path),
        }

    def restore(self, record: dict[str, Any]) -> None:
        """Make the folder of a finished run again from what was kept of it; there are no checkpoints."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "setting.json", record["setting"])
        for line in record["metrics"]:
            self.append_metrics(line)
        write_json(self.path / "config.json", record["config"])
        # Last: a kill before leaves a run to be done.
        self.write_summary(record["summary"])

    def keep_epochs(self, count: int) -> list[dict[str, Any]]:
        """Drop the lines of epochs that the checkpoint does not hold; returns the lines kept."""
        lines = [line for line in read_metrics(self.path) if line["epoch"] < count]
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add an epoch's line, on disk before this returns."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_config(path: Path) -> TrainConfig:
    """The config of a run folder.

    Raises:
        ValueError: it is no run folder, or its config does not fit this version.
    """
    stored = Path(path) / "config.json"
    if not stored.exists():
        raise ValueError(f"{path} is no run folder: it has no config.json")
    return from_dict(read_json(stored))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl; a last line cut short by a kill is left out."""
    file = Path(path) / "metrics.jsonl"
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def keep(file: Path, records: Iterable[dict[str, Any]]) -> int:
    """Put records of runs, as from `RunFolder.record`, into a file of them, which is made when missing.

    A record takes the place of an earlier one of the same name and seed. Returns how many were put.
    """
    new = {(record["name"], record["seed"]): record for record in records}
    earlier = {(record["name"], record["seed"]): record for record in kept(file)} if Path(file).exists() else {}
    if new:
        _replace(Path(file), "".join(json.dumps(record) + "\n" for _, record in sorted((earlier | new).items())))
    return len(new)


def kept(file: Path) -> list[dict[str, Any]]:
    """The records in a file of `keep`, by name and seed; none where there is no file.

    Raises:
        ValueError: a line that is none.
    """
    if not Path(file).exists():
        return []
    found = []
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            found.append({name: record[name] for name in _OF_A_RUN})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}: is no record of a run ({type(error).__name__}: {error}); expected an object "
                f"with {', '.join(_OF_A_RUN)}. Restore the file, or collect its runs again"
            ) from error
    return found


def read_json(path: Path) -> Any:
    """Parse a JSON file; a broken one is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one piece, and its folder if that is missing."""
    _replace(Path(path), json.dumps(data, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def plain(data: Any) -> Any:
    """Data as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(data))


def _plain(config: TrainConfig) -> dict[str, Any]:
    return plain(to_dict(config))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def identity(stored: dict[str, Any]) -> str:
    """What makes two stored configs the same run but for the seed, as text; fields added since have their defaults."""
    with contextlib.suppress(ValueError):
        stored = _plain(from_dict(stored))
    fixed = {field: value for field, value in _flat(stored).items() if field not in (*_FREE_FIELDS, "seed")}
    return json.dumps(fixed, sort_keys=True)


def differences(stored: dict[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """``(field, stored value, asked value)`` wherever a stored config means another run than ``config``."""
    with contextlib.suppress(ValueError):
        stored = _plain(from_dict(stored))  # fields added since have their defaults
    old, new = _flat(stored), _flat(_plain(config))
    fields = sorted(old.keys() | new.keys())
    return [(f, old.get(f), new.get(f)) for f in fields if f not in _FREE_FIELDS and old.get(f) != new.get(f)]
