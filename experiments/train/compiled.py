"""The compiled updates of a trainer: one by one, in two programs, or many in a loop."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.base import TrainConfig
from experiments.data import Dataset, StreamedDataset
from experiments.train.costs import size_of
from experiments.train.devices import Devices
from experiments.train.programs import Programs
from experiments.train.pruned_phase import Way
from experiments.train.state import Images, TrainState
from experiments.train.update import change_of, gradient_of, update_loop, update_step


class Updates:
    """What `experiments.train.step.Trainer` does its updates by.

    Attributes:
        config: of the runs.
        dataset: what they train on.
        streams: whether an update is given its batch, as the set is too large for the device.
        train_data: the images; of a streamed set, black ones in a batch's place; on the host where a batch is divided
            over devices.
        devices: where the arrays lie.
        channels: what makes the net narrower between epochs; None for nothing.
        steps_per_epoch: updates.
        loop_length: updates of a compiled loop; 0 where there is none.
        programs: what was compiled so far.
    """

    config: TrainConfig
    dataset: Dataset | StreamedDataset
    streams: bool
    train_data: Images
    devices: Devices
    channels: Any
    steps_per_epoch: int
    loop_length: int
    programs: Programs

    @property
    def compile_seconds(self) -> float:
        """See the class."""
        return self.programs.seconds

    @property
    def program_bytes(self) -> int:
        """Memory that the largest update compiled so far asks for, data set included."""
        return self.programs.bytes

    def compile_dense(self, state: TrainState) -> float:
        """Compile the dense phase's update, for a run that begins after it; returns the seconds."""
        start = time.perf_counter()
        metrics, order, key = self._begin(0, 0)
        args = (self.devices.whole(state), metrics, self._images(self._batch), order, np.int32(0), key, {})
        if self.loop_length > 1:
            self._loop("dense", "dense", args, ahead=True)
        else:
            self._program("dense", self._batch, "dense", args, ahead=True)
        seconds = time.perf_counter() - start
        self.programs.seconds += seconds
        return seconds

    def _begin(self, seed: int, epoch: int) -> tuple[Any, Any, Any]:
        """``(metrics, order, key)`` of an epoch, whose images are put on the devices where they are divided.

        A streamed set has no order here: an update is given its batch.
        """
        key, metrics = jax.random.key(seed), jnp.zeros((self.steps_per_epoch, 2), jnp.float32)
        order = None if self.streams else self._order(key, epoch)
        if self.devices.mesh is not None and not self.streams:
            full = self.steps_per_epoch - bool(self.tail)
            self._parts: dict[int, Images] = {}  # the last epoch's are let go first
            self._parts = self.devices.epoch_images(self.dataset, np.asarray(order), self._batch, full, self.tail)
        return self.devices.whole((metrics, order, key))

    def _images(self, batch: int) -> Images:
        """What the programs for batches of a size take."""
        return self.train_data if self.streams or self.devices.mesh is None else self._parts[batch]

    def _shapes(self, params: Any) -> tuple[tuple[int, ...], ...]:
        """What tells a narrowed net's programs apart."""
        return () if self.channels is None else tuple(leaf.shape for leaf in jax.tree.leaves(params))

    @property
    def _batch(self) -> int:
        return min(self.config.batch_size, self.dataset.train_examples)

    def _pruned_program(self, way: Way, args: tuple, *, ahead: bool) -> Callable[..., Any]:
        if self.loop_length > 1:
            return self._loop("masked" if way == "dense" else "pruned", way, args, ahead=ahead)
        return self._program("pruned", self._batch, way, args, ahead=ahead)

    def _shapes_key(self, structures: Any, params: Any) -> tuple[Any, ...]:
        """Structures of another size, and nets that became narrower, are other programs."""
        return jax.tree.structure(structures), *self._shapes(params)

    def _loop(self, kind: str, way: Way, args: tuple, *, ahead: bool = False) -> Callable[..., Any]:
        """`experiments.train.update.update_loop` of this trainer, compiled."""
        return self.programs.get(
            ("loop", kind, way, *self._shapes_key(args[-1], args[0].params)),
            lambda: update_loop(self, kind, self.config.batch_size, way, self.loop_length),
            args,
            (0, 1),
            large=True,
            ahead=ahead,
        )

    def _program(self, kind: str, batch: int, way: Way, args: tuple, *, ahead: bool = False) -> Callable[..., Any]:
        """An update, ``(state, metrics, data, order, index, key, structures) -> (state, metrics)``.

        It is two programs, so that all phases share the costly one, which has the convolutions, and few have to wait
        for a compiler.
        """
        narrowed, shapes = self._shapes(args[0].params), self._shapes_key(args[-1], args[0].params)

        def run(state: TrainState, metrics: Any, data: Images, order: Any, index: Any, key: Any, held: Any) -> Any:
            inputs = (state.params, state.batch_stats, state.step, data, order, index, key, held)
            gradient = self.programs.get(
                ("gradient", batch, way, *shapes),
                lambda: gradient_of(self, batch, way),
                inputs,
                large=True,
                beside=size_of(state.opt_state),
                ahead=ahead,
            )
            if ahead:
                found = self.devices.placed(jax.eval_shape(gradient_of(self, batch, way), *inputs))
            else:
                found = gradient(*inputs)
            changed = (state, metrics, index, found)
            change = self.programs.get(
                ("change", kind, *narrowed), lambda: change_of(self, kind), changed, (0, 1), ahead=ahead
            )
            return None if ahead else change(*changed)

        if ahead:
            run(*args)
            return self._program(kind, batch, way, args)
        return run

    def update_step(self, kind: str, batch: int, way: Way = "dense") -> Callable[..., Any]:
        """One whole update as a pure function: `experiments.train.update.update_step` of this trainer."""
        return update_step(self, kind, batch, way)
