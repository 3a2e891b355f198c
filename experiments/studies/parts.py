"""Long work in parts: each is saved once it is done, and the same command goes on where it was stopped."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.records import plain, read_json, write_json


class Parts:
    """A folder of finished parts, and a word on how long the rest will take.

    Args:
        folder: one of the same work, or a new one.
        question: plain data that the parts depend on.
        log: takes a line after each part.

    Attributes:
        seconds: spent in computing the parts asked for so far, whenever that was.

    Raises:
        ValueError: the folder holds parts of other work.
    """

    def __init__(self, folder: Path, question: dict[str, Any], log: Callable[[str], None]) -> None:
        self.folder, self.log, self.start = Path(folder), log, time.perf_counter()
        self.total = self.done = self.seconds = 0.0
        path = self.folder / "question.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, question)
            return
        earlier, question = read_json(path), plain(question)
        for field, value in question.items():
            if earlier.get(field) != value:
                raise ValueError(
                    f"{folder} holds parts of other work: {field} is {earlier.get(field)} there and {value} here; "
                    "choose another folder, or remove this one"
                )

    def expect(self, cost: float) -> None:
        """Announce all parts together; costs are in any unit, and may be rough."""
        self.total = cost

    def once(self, name: str, cost: float, compute: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """What a part gave: from its file, or else computed and saved. ``compute`` calls `passed`."""
        path = self.folder / f"{name}.npz"
        if path.exists():
            self.total -= cost
        else:
            begin = time.perf_counter()
            result = {**compute(), "seconds": time.perf_counter() - begin}
            temporary = path.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                np.savez(file, **result)
            os.replace(temporary, path)
        with np.load(path) as stored:
            arrays = {key: stored[key] for key in stored.files}
        self.seconds += float(arrays.pop("seconds"))
        return arrays

    def passed(self, cost: float, what: str) -> None:
        """Note that work of this cost was done just now."""
        self.done += cost
        seconds = time.perf_counter() - self.start
        left = seconds / self.done * max(self.total - self.done, 0.0)
        self.log(f"{seconds:6.0f} s  {what}; about {left / 60:.0f} min left")
