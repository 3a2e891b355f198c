"""The input pipeline beside its ceilings: images a second that reach the device, and that are decoded and thrown away.

    python -m experiments bench input --out experiments/results/bench/input.json

Photographs of ImageNet's size are made, and read from a folder and from a TFDS directory, both in the page cache. The
ceilings have the same files in memory and as many threads: one decodes them and does nothing else, one crops them too.
"""

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments.bench.photos import SIZE, write_photos
from experiments.data import DataConfig, StreamedDataset, load
from experiments.data.crops import random_box, resized_crop
from experiments.data.decode import decode_image
from experiments.data.streaming import default_threads
from experiments.data.writing import write_tfds
from experiments.records import plain, setting, write_json
from experiments.report.benchmarks import tables_of
from pallas_kernels import native

DECODE, CROP, FILES, RECORDS = "decode only", "decode and crop", "image files", "array_record"
# Beside them: the crop without the native library.
PILLOW = "pillow alone"
GOAL = 0.8
ROUNDS = 7
# A consumer that takes this much longer a batch than the pipeline is never to wait.
_SLOWER = 1.25
_LEAST_CROP_AREA = 0.08


def measure(
    *,
    photos: int = 256,
    epochs: int = 2,
    size: tuple[int, int] = SIZE,
    image_size: int = 224,
    batch_size: int = 64,
    threads: int | None = None,
    rounds: int = ROUNDS,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Whole passes in turns.

    Args:
        photos: different files.
        epochs: how often each is read in a pass.
        size: width and height of the files.
        image_size: pixels a side of what reaches the device.
        batch_size: images.
        threads: that read and decode; one a core by default.
        rounds: passes of each that count, after one that does not.
        log: takes a line a round.

    Returns:
        The record: beside what was asked, ``results``: ``{"name", "images_per_s", "p20", "p80", "ratio", "of_crop"}``,
        the ratios to decoding alone, and with the crop, being medians of the rounds'; ``waiting``, the share of its
        time that a slower consumer waits; ``pillow``, as one of the results, decoding and cropping without the native
        library; ``memory_mb``, this process's resident memory after each quarter of a long pass.
    """
    threads = threads or default_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_photos(Path(temporary) / "files", classes=2, train=photos // 2, test=1, size=size)
        directory = _as_tfds(folder, Path(temporary) / "tfds")
        config = DataConfig("photos", image_size=image_size, least_crop_area=_LEAST_CROP_AREA)
        sets = {
            name: load(dataclasses.replace(config, dir=str(where)))
            for name, where in ((FILES, folder), (RECORDS, directory))
        }
        encoded = [sets[FILES].train[index][0] for index in range(photos)]
        order = np.tile(np.arange(photos), epochs)

        def passes(dataset: StreamedDataset, repeats: int = 1) -> Iterator[Any]:
            places = np.tile(order, repeats)
            sizes = [batch_size] * (len(places) // batch_size)
            return dataset.train_batches(places, sizes, seed=0, epoch=0, threads=threads, put=_put)

        def alone(function: Callable[[bytes], Any]) -> None:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(function, encoded * epochs):
                    pass

        def crop(data: bytes) -> np.ndarray:
            random = np.random.Generator(np.random.PCG64(len(data)))
            box = functools.partial(random_box, random, least_area=_LEAST_CROP_AREA)
            return resized_crop(data, image_size, box, draft=True)

        def stream(name: str) -> None:
            for batch in passes(sets[name]):
                jax.block_until_ready(batch)

        def by_pillow() -> None:
            with mock.patch.dict(os.environ, {native.ENVIRONMENT: "0"}):
                alone(crop)

        images = len(order) // batch_size * batch_size
        ways: dict[str, Callable[[], None]] = {
            DECODE: lambda: alone(decode_image),
            CROP: lambda: alone(crop),
            PILLOW: by_pillow,
            FILES: lambda: stream(FILES),
            RECORDS: lambda: stream(RECORDS),
        }
        counts = {DECODE: len(order), CROP: len(order), PILLOW: len(order), FILES: images, RECORDS: images}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name in list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]:
                start = time.perf_counter()
                ways[name]()
                if number:
                    rates[name].append(counts[name] / (time.perf_counter() - start))
            if number:
                log(", ".join(f"{name} {rates[name][-1]:,.0f}/s" for name in ways))
        a_batch_s = batch_size / float(np.median(rates[FILES]))
        waiting = _waiting(passes(sets[FILES], repeats=4), _SLOWER * a_batch_s)
        memory = _memory(passes(sets[FILES], repeats=4), 4 * images // batch_size)
    results = [
        {
            "name": name,
            **dict(zip(("p20", "images_per_s", "p80"), map(float, np.percentile(found, (20, 50, 80))))),
            "ratio": float(np.median(np.divide(found, rates[DECODE]))),
            "of_crop": float(np.median(np.divide(found, rates[CROP]))),
        }
        for name, found in rates.items()
    ]
    pillow = results.pop(list(rates).index(PILLOW))
    return {
        "what": "input",
        "command": "python -m experiments bench input",
        "setting": setting(),
        "photos": {"count": photos, "size": list(size), "bytes": float(np.mean([len(data) for data in encoded]))},
        "image_size": image_size,
        "batch_size": batch_size,
        "threads": threads,
        "rounds": rounds,
        "goal": GOAL,
        "results": results,
        "pillow": pillow,
        "waiting": waiting,
        "memory_mb": memory,
    }


def _put(batch: tuple[np.ndarray, np.ndarray], size: int) -> Any:
    return jax.device_put(batch)


def _as_tfds(folder: Path, directory: Path) -> Path:
    def examples(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in sorted((folder / part).glob("*/*")):
            key = file.relative_to(folder).as_posix()
            yield key, {"id": key, "image": file.read_bytes(), "label": file.parent.name}

    names = sorted(place.name for place in (folder / "train").iterdir())
    write_tfds(
        "photos",
        "1.0.0",
        directory,
        {"train": lambda: examples("train"), "test": lambda: examples("val")},
        image_shape=(None, None, 3),
        encoding="jpeg",
        labels={"label": names},
        description="Made-up photographs.",
    )
    return directory


def _waiting(batches: Iterator[Any], a_batch_s: float) -> float:
    """The share of its time, after the first batch, that a consumer waits who takes so long for each."""
    jax.block_until_ready(next(batches))
    start, waited = time.perf_counter(), 0.0
    while True:
        time.sleep(a_batch_s)  # As for a device at work; whatever sleeps here leaves the cores to the pipeline.
        asked = time.perf_counter()
        if next(batches, None) is None:
            return waited / (time.perf_counter() - start)
        waited += time.perf_counter() - asked


def _memory(batches: Iterator[Any], count: int) -> list[float]:
    """Resident MB of this process after each quarter of the batches."""
    found = []
    for number, batch in enumerate(batches, 1):
        jax.block_until_ready(batch)
        if number * 4 // count > (number - 1) * 4 // count:
            found.append(_resident_mb())
    return found


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def run(photos: int = 256, batch_size: int = 64, threads: int | None = None, out: Path | None = None) -> str:
    """Images a second that the input pipeline brings to the device, against decoding alone. Takes a minute or two.

    Args:
        photos: files of ImageNet's size that are made for it.
        batch_size: images.
        threads: that read and decode; one for each core by default, 16 at most.
        out: a JSON file to save the record in.
    """
    found = measure(photos=photos, batch_size=batch_size, threads=threads, log=lambda line: print(line, flush=True))
    record = plain(found)
    if out is not None:
        write_json(out, record)
    return tables_of(record)
