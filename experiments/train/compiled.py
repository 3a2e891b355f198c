"""The compiled updates of a trainer: one by one, in three programs, or many in a loop; and compiling ahead of them."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from experiments.configs.base import TrainConfig
from experiments.data import Dataset, StreamedDataset
from experiments.train.costs import size_of
from experiments.train.devices import Devices
from experiments.train.programs import Programs, in_background, shapes_of
from experiments.train.pruned_phase import Choice, PrunedPhase, Way
from experiments.train.state import Images, TrainState
from experiments.train.update import change_of, draw_of, gradient_of_drawn, update_loop, update_step, with_retained

# Of the run's key: experiments.train.step has the stream before it.
_ORDER = 1


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
        schedule: phases in updates; None for a dense run.
        pruned: how the pruned phase is run.
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
    schedule: ct.PhaseSchedule | None
    pruned: PrunedPhase
    programs: Programs

    @property
    def compile_seconds(self) -> float:
        """Host seconds that a run waited for tracing, compiling and choosing so far."""
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

    def _order(self, key: jax.Array, epoch: int) -> jax.Array:
        """Which images, one after the other; beyond the epoch's own those of the next one, as far as a batch goes."""
        count = self.dataset.train_examples
        wanted = max(count, self.steps_per_epoch * self.config.batch_size) if self.fills and not self.tail else count
        orders = [
            _order(jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch + later), count)
            for later in range(-(-wanted // count))
        ]
        return orders[0] if wanted == count else jnp.concatenate(orders)[:wanted]

    def by_batch_size(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """Split updates [first, end) of an epoch by batch size, (first, end, batch): the last one may be smaller."""
        full = self.steps_per_epoch - bool(self.tail)
        parts = [(first, min(end, full), self.config.batch_size), (max(first, full), end, self.tail)]
        return [(begin, stop, batch) for begin, stop, batch in parts if begin < stop]

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

        It is three programs. All phases share the costly one, which has the convolutions, so that few have to wait for
        a compiler; and all ways the one that draws, whose samplers take longer to compile than a small net.
        """
        narrowed, shapes = self._shapes(args[0].params), self._shapes_key(args[-1], args[0].params)

        def done(program: Callable[..., Any], inputs: tuple) -> Any:
            """What a program gives; where it is compiled ahead, the shapes of that."""
            return self.devices.placed(shapes_of(program.out_info)) if ahead else program(*inputs)

        def run(state: TrainState, metrics: Any, data: Images, order: Any, index: Any, key: Any, held: Any) -> Any:
            inputs = (key, state.step)
            draw = self.programs.get(("draw", batch), lambda: draw_of(self, batch), inputs, ahead=ahead)
            inputs = (state.params, state.batch_stats, data, order, index, done(draw, inputs), held)
            gradient = self.programs.get(
                ("gradient", batch, way, *shapes),
                lambda: gradient_of_drawn(self, batch, way),
                inputs,
                large=True,
                beside=size_of(state.opt_state),
                ahead=ahead,
            )
            inputs = (state, metrics, index, done(gradient, inputs))
            change = self.programs.get(
                ("change", kind, *narrowed), lambda: change_of(self, kind), inputs, (0, 1), ahead=ahead
            )
            return None if ahead else change(*inputs)

        if ahead:
            run(*args)
            return self._program(kind, batch, way, args)
        return run

    def update_step(self, kind: str, batch: int, way: Way = "dense") -> Callable[..., Any]:
        """One whole update as a pure function: `experiments.train.update.update_step` of this trainer."""
        return update_step(self, kind, batch, way)

    def _sending(self, structures: dict[str, Any]) -> dict[str, Any]:
        """With what the devices send each other of the pruned phase's gradients, where that is not all of them."""
        retained = self._retained[1]
        return structures if retained is None else with_retained(structures, retained)

    def _note_retained(self, known: Any, state: TrainState) -> None:
        if not self.config.loop.compact_gradients or self.devices.mesh is None or self._retained[0] == known:
            return
        masks = self.masks(state)
        masks.pending = False  # what is only marked as yet is gone where this is used
        self._retained = known, self.devices.whole(ct.reduction.retained(state.params, masks))

    def _prepare_masked(self, args: tuple) -> None:
        """Have what the selection and the loops after it need compiled in the background."""
        if self._is_prepared:
            return
        self._is_prepared = True
        # The one that is waited for comes first; shapes alone, as the arrays themselves are donated meanwhile.
        self._loop("dense", "dense", (*args, {}))
        shapes = (*shapes_of(args), {})

        def work() -> None:
            self._program("select", self._batch, "dense", shapes, ahead=True)
            self._loop("masked", "dense", shapes, ahead=True)

        in_background(work, "compile for the selection")

    def _prepare_pruned(self, known: Any, state: Any, metrics: Any, order: Any, key: Any) -> None:
        """Have the pruned phase's programs compiled in the background, while the phases before it train."""
        if self.schedule.prune_step + 1 >= self.config.total_epochs * self.steps_per_epoch:
            return  # no update follows the prune

        def compile_way(way: Way, structures: dict[str, Any]) -> None:
            self._pruned_program(way, (*shapes, self._sending(structures)), ahead=True)

        self._note_retained(known, state)
        shapes = shapes_of((state, metrics, self._images(self._batch), order, np.int32(0), key))
        before = self.pruned.waited_seconds
        self.pruned.prepare(known, self.masks(state), compile_way)
        self.programs.seconds += self.pruned.waited_seconds - before

    def _choose_pruned(self, state: Any, metrics: Any, order: Any, key: Any) -> Choice:
        def ready(way: Way, structures: dict[str, Any]) -> Callable[[], object]:
            copies = jax.block_until_ready(jax.tree.map(jnp.copy, (state, metrics)))
            args = (*copies, self._images(self._batch), order, np.int32(0), key, self._sending(structures))
            # Not ahead: it was compiled before, and would be traced again.
            program = self._pruned_program(way, args, ahead=False)
            return lambda: jax.block_until_ready(program(*args))

        before = self.pruned.waited_seconds
        choice = self.pruned.choose(ready)
        self.programs.seconds += self.pruned.waited_seconds - before
        return choice


@functools.partial(jax.jit, static_argnums=1)
def _order(key: jax.Array, count: int) -> jax.Array:
    return jax.random.permutation(key, count)
