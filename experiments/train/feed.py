"""Where the images of updates and evaluations come from: the set on the device, or one that is streamed to it."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.base import TrainConfig
from experiments.data import StreamedDataset
from experiments.data.streaming import Share
from experiments.train.state import Images

EVAL_BATCH = 500
# Updates that the host may be ahead of the device: each holds a batch there.
_AHEAD = 2


def check_streamed(config: TrainConfig, dataset: StreamedDataset) -> None:
    """Raises ValueError where a config asks for what a streamed set cannot do."""
    if config.loop.epoch_program == "scan":
        raise ValueError("loop.epoch_program='scan' holds a set on the device, and this one is streamed: use 'steps'")
    if config.batch_size > dataset.train_examples:
        raise ValueError(
            f"batch_size={config.batch_size}, but {dataset.name} has {dataset.train_examples} training images: lower "
            "the batch size"
        )


class Feed:
    """An epoch's batches of a streamed set, taken one an update, in the order that a set in memory has them in.

    Args:
        trainer: `experiments.train.step.Trainer`.
        order: (N,) which images, one after the other.
        epoch: from 0.
        seed: of the run.
        done: updates of the epoch that were done before.
    """

    def __init__(self, trainer: Any, order: np.ndarray, epoch: int, seed: int, done: int = 0) -> None:
        parts = trainer.by_batch_size(0, trainer.steps_per_epoch)
        sizes = [batch for first, end, batch in parts for _ in range(first, end)]
        devices = trainer.devices
        self._batches = trainer.dataset.train_batches(
            order,
            sizes,
            seed=seed,
            epoch=epoch,
            done=done,
            # Processes lie in the mesh's order, each with its devices side by side.
            share=Share(jax.process_index(), jax.process_count(), devices.count),
            threads=trainer.config.loop.input_threads,
            put=lambda batch, size: devices.batch(*batch, size=size),
        )
        self._under_way: collections.deque[jax.Array] = collections.deque()

    def take(self, step: jax.Array) -> Images:
        """The next batch; ``step`` is the state's, after the update before. Waits where the device is far behind."""
        self._under_way.append(jnp.copy(step))  # the state's own is donated
        if len(self._under_way) > _AHEAD:
            jax.block_until_ready(self._under_way.popleft())
        return next(self._batches)

    def close(self) -> None:
        """End its threads."""
        self._batches.close()


def eval_batches(trainer: Any) -> Iterator[tuple[Images, int, int]]:
    """The evaluation set in order: ``(images, where in them the batch begins, how many it has)``."""
    if trainer.streams:
        devices = trainer.devices
        batches = trainer.dataset.eval_batches(
            -(-min(EVAL_BATCH, trainer.config.batch_size) // devices.count) * devices.count,
            share=Share(jax.process_index(), jax.process_count(), devices.count),
            threads=trainer.config.loop.input_threads,
            put=lambda batch, size: devices.batch(*batch, size=size),
        )
        for images in batches:
            yield images, 0, len(images.labels)
        return
    count, devices = trainer.dataset.eval_examples, trainer.devices.count
    size = max(1, EVAL_BATCH // devices) * devices
    for begin in range(0, count, size):
        yield trainer.eval_data, begin, min(size, count - begin)
