"""Data sets that do not fit in memory: read, decoded and cropped by threads while the net trains, by Google's Grain.

Which images a batch holds, and how each is cropped, follows from the run's seed, the epoch and the image's place in the
epoch's order alone: not from threads, nor from how many processes share the work, nor from where a run was stopped. So
the position of a run in its data is the number of updates done, which its checkpoints hold.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from clicktrain_jax import extras
from experiments.data.crops import centre_box, random_box, resized_crop
from experiments.data.encoded import EncodedImages

# Batches that are ready before they are asked for; on the device, where `put` brings them there.
READY_BATCHES = 2
# Images that a thread may be ahead of the batch that is being put together, and those that it makes in one go, so that
# fewer things pass between threads.
_AHEAD, _TOGETHER = 16, 8

Batch = tuple[np.ndarray, np.ndarray]


class Put(Protocol):
    """What becomes of a batch before it is yielded."""

    def __call__(self, batch: Batch, size: int) -> Any:
        """Takes this process's part of a batch of so many images."""


def _as_it_is(batch: Batch, size: int) -> Batch:
    return batch


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of every batch a process reads.

    Attributes:
        index: Of the process.
        count: Of processes.
        devices: Of all processes, as many of each; None for one of each. A batch that they cannot divide is read whole
            by every process, as it lies whole on every device.
    """

    index: int = 0
    count: int = 1
    devices: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"process {self.index} of {self.count}: expected 0 to {self.count - 1}")
        if (self.devices or self.count) % self.count:
            raise ValueError(f"{self.devices} devices of {self.count} processes: expected as many of each")

    def of(self, begin: int, end: int) -> range:
        """This process's part of a batch that holds places [begin, end)."""
        if (end - begin) % (self.devices or self.count):
            return range(begin, end)
        size = (end - begin) // self.count
        return range(begin + self.index * size, begin + (self.index + 1) * size)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedDataset:
    """A data set on disk, split for one experiment; what `Dataset` is for sets in memory.

    Attributes:
        name: As in `DataConfig`.
        train: Where training images are.
        train_indices: int64 (N,), which of them are trained on.
        evaluation: Where evaluation images are.
        eval_indices: int64 (M,), which of them are evaluated on.
        num_classes: Number of classes.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        eval_split: "validation" (held out of the train split) or "test".
        encoding: As `Dataset` has it, of the first training image.
        fingerprint: First 16 hex digits of the SHA-256 over names, sizes and indices: contents are not read for it.
        image_size: Pixels a side, after the crop.
        least_crop_area: Of a random-resized crop, as a share of the image's.
    """

    name: str
    train: EncodedImages = dataclasses.field(repr=False)
    train_indices: np.ndarray = dataclasses.field(repr=False)
    evaluation: EncodedImages = dataclasses.field(repr=False)
    eval_indices: np.ndarray = dataclasses.field(repr=False)
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_split: Literal["validation", "test"]
    encoding: str
    fingerprint: str
    image_size: int
    least_crop_area: float = 0.08

    @property
    def train_examples(self) -> int:
        """How many images an epoch has."""
        return len(self.train_indices)

    @property
    def eval_examples(self) -> int:
        """How many images are evaluated on."""
        return len(self.eval_indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image, after the crop."""
        return self.image_size, self.image_size, 3

    def train_batches(
        self,
        order: np.ndarray,
        sizes: Sequence[int],
        *,
        seed: int,
        epoch: int,
        done: int = 0,
        share: Share = Share(),
        threads: int | None = None,
        put: Put = _as_it_is,
    ) -> Iterator[Any]:
        """An epoch's batches, or what is left of them.

        Args:
            order: (N,) integers below `train_examples`: which image comes at which place of the epoch.
            sizes: Images of each of the epoch's batches, over all processes; they take the order's places in turn.
            seed: Of the run.
            epoch: From 0; with the seed and an image's place it decides the crop.
            done: How many of the batches are left out: a run that was stopped after so many updates goes on.
            share: Which part of each batch this process reads.
            threads: That read and decode; one for each core by default, 16 at most.
            put: Takes (images uint8 (b, S, S, 3), labels int32 (b,)), this process's part of a batch, and how many
                images the batch has over all processes, and returns what is yielded; called in a thread, so what it
                sends to a device is under way before it is asked for.

        Yields:
            What `put` returns, batch by batch. Closing the iterator ends its threads.

        Raises:
            ValueError: An image cannot be read or decoded, or its label is none of the classes; it is named. Batches
                that ask for more images than the order has.
        """
        ends = np.cumsum([0, *sizes])
        if ends[-1] > len(order):
            raise ValueError(f"batches of {ends[-1]} images, but the order has {len(order)}; expected as many or fewer")
        spans = [(int(begin), int(end)) for begin, end in zip(ends[done:], ends[done + 1 :])]

        def load(place: int) -> Batch:
            random = np.random.Generator(np.random.PCG64([seed, epoch, place]))
            box = functools.partial(random_box, random, least_area=self.least_crop_area)
            return self._decoded(self.train, self.train_indices[order[place]], box, draft=True)

        return _batches(load, spans, share, threads, put)

    def eval_batches(
        self, batch_size: int, *, share: Share = Share(), threads: int | None = None, put: Put = _as_it_is
    ) -> Iterator[Any]:
        """The evaluation set in order, centre crops; the last batch may have fewer. As `train_batches` otherwise."""
        count = self.eval_examples
        spans = [(begin, min(begin + batch_size, count)) for begin in range(0, count, batch_size)]

        def load(place: int) -> Batch:
            return self._decoded(self.evaluation, self.eval_indices[place], centre_box, draft=False)

        return _batches(load, spans, share, threads, put)

    def _decoded(self, images: EncodedImages, index: int, box: Any, *, draft: bool) -> Batch:
        try:
            data, label = images[int(index)]
        except Exception as error:  # array_record reports damage as RuntimeError and others.
            raise ValueError(f"image {index} of {self.name} cannot be read ({error}): put it back") from error
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{images.name_of(int(index))} has the label {label}; expected 0..{self.num_classes - 1}: use a split "
                "that has labels"
            )
        try:
            return resized_crop(data, self.image_size, box, draft=draft), np.int32(label)
        except ValueError as error:
            raise ValueError(f"{images.name_of(int(index))} {error}: replace it, or take it away") from error


def default_threads() -> int:
    """That read and decode: one for each core that this process may use, 16 at most."""
    return min(len(os.sched_getaffinity(0)), 16)


def _batches(
    load: Callable[[int], Batch], spans: Sequence[tuple[int, int]], share: Share, threads: int | None, put: Put
) -> Iterator[Any]:
    """Batches of what `load` makes of places, in order."""
    threads = threads or default_threads()
    # A last batch of another size is a stream of its own.
    for size, alike in itertools.groupby(spans, lambda span: span[1] - span[0]):
        parts = [share.of(*span) for span in alike]
        yield from _stream(load, parts, threads, functools.partial(put, size=size))


def _stream(
    load: Callable[[int], Batch], parts: Sequence[range], threads: int, put: Callable[[Batch], Any]
) -> Iterator[Any]:
    """Batches of one size."""
    with extras.brings("experiments"):
        import grain
    size = len(parts[0])
    together = math.gcd(size, _TOGETHER)
    places = np.concatenate([np.asarray(part) for part in parts]).reshape(-1, together)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=-(-_AHEAD * threads // together))
    images = grain.MapDataset.source(places).map(lambda some: [load(place) for place in some.tolist()])
    batches = images.to_iter_dataset(options).batch(size // together, batch_fn=_stacked).map(put)
    ready = iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=READY_BATCHES))
    try:
        yield from ready
    finally:
        ready.close()


def _stacked(images: Sequence[list[Batch]]) -> Batch:
    pixels, labels = zip(*itertools.chain(*images))
    return np.stack(pixels), np.asarray(labels, np.int32)
