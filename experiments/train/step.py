"""The device side of a run: one update, one evaluation, as compiled programs for each phase.

The whole training set lies on the device as uint8; an update gathers its batch, augments, normalises and
mixes it up, so the host sends one index a step and fetches one array of metrics an epoch.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax import models
from clicktrain_jax.methods import random_scores
from clicktrain_jax.phases import Phase
from experiments.configs.base import TrainConfig
from experiments.data import Dataset
from experiments.train.channel_pruning import ChannelPruning
from experiments.train.costs import bytes_of, size_of
from experiments.train.methods import make_method
from experiments.train.pruned_phase import Choice, PrunedPhase, Way, facts_of, scheduled
from experiments.train.recipe import make_models, make_optimizer, make_plan, pattern_source
from experiments.train.state import Images, TrainState
from experiments.train.update import change_of, evaluation_of, gradient_of, update_step

# Streams of random numbers, each folded into the run's key.
_INIT, _ORDER = range(2)  # experiments.train.update has the third
EVAL_BATCH = 500


# (phase, gathers scores, first, end), updates counted from an epoch's start.
Segment = tuple[Phase, bool, int, int]


class Trainer:
    """Model, optimizer and compiled programs of one config; serves any number of seeds.

    Attributes:
        steps_per_epoch: updates an epoch.
        schedule: phases in updates; None for a dense run.
        ran: the segments of the last epoch, as they were run.
        compile_seconds: host seconds spent in tracing and compiling so far.
        program_bytes: memory that the largest update compiled so far asks for, data set included.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        self.config = config
        self.dataset = dataset
        image_shape = tuple(dataset.train_images.shape[1:])
        self.image_shape = image_shape
        on_cpu = jax.default_backend() == "cpu"
        convolution, program = config.loop.convolution, config.loop.epoch_program
        self.scan = not on_cpu if program == "auto" else program == "scan"
        if convolution == "auto":
            convolution = ("patches" if self.scan else "direct") if on_cpu else "xla"
        self.models = make_models(config, dataset.num_classes, convolution)
        self.model = self.models["dense"]
        abstract = models.abstract_variables(self.model, image_shape)
        self.abstract_params = abstract["params"]
        self.train_data = Images(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
        self.eval_data = Images(jnp.asarray(dataset.eval_images), jnp.asarray(dataset.eval_labels))

        count = len(dataset.train_images)
        full, self.tail = divmod(count, config.batch_size)
        if config.partial_batch == "drop":
            self.tail = 0
        self.steps_per_epoch = full + bool(self.tail)
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the {count} training images and partial_batch is "
                "'drop': nothing would be trained; lower the batch size"
            )
        self.plan, self.schedule, self.updates = None, None, None
        if config.prune is not None:
            self.plan = make_plan(config.prune, self.model, self.abstract_params, image_shape, config.net)
        self.method = make_method(
            config, make_optimizer(config, self.steps_per_epoch), self.model, abstract, image_shape,
            self.steps_per_epoch, self.plan,
        )
        self.optimizer = self.method.optimizer
        self.channels = None
        if config.channels is not None:
            self.channels = ChannelPruning(self.model, abstract, image_shape, config.channels)
        if config.prune is not None:
            self._set_up_pruning()
        self.pruned = PrunedPhase(
            config.loop.pruned_convolution, self.plan, facts_of(config, self.plan), hwnc=not on_cpu, deal=self.scheduled
        )
        self.ran: list[Segment] = []
        self.compile_seconds, self.program_bytes = 0.0, 0
        self._programs: dict[Any, Callable[..., Any]] = {}

    def _set_up_pruning(self) -> None:
        prune = self.config.prune
        self.patterns = pattern_source(prune)
        per_epoch = self.steps_per_epoch
        last = self.config.total_epochs * per_epoch - 1
        # The prune is the update after the selection at the earliest, and the run's last one at the latest.
        select = min(prune.select_epoch * per_epoch, last - 1)
        self.schedule = ct.PhaseSchedule(
            select,
            min(max(prune.prune_epoch * per_epoch, select + 1), last),
            None if prune.reselect_epoch is None else prune.reselect_epoch * per_epoch,
            prune.importance_steps,
            None if prune.reselect_every_epochs is None else prune.reselect_every_epochs * per_epoch,
        )
        self.updates = ct.phase_updates(
            self.optimizer,
            self.plan,
            coeff=_lasso_weight(prune, select, per_epoch),
            patterns=self.patterns,
            importance=random_scores if prune.importance == "random" else prune.importance,
            importance_steps=prune.importance_steps,
        )

    def scheduled(self, structures: dict[str, Any]) -> dict[str, Any]:
        """The structures with worklists for this batch size; as they are on a CPU, which has no use for any."""
        if not structures or "pattern_hwnc" not in self.pruned.ways:
            return structures
        batch = min(self.config.batch_size, len(self.train_data.labels))
        return scheduled(self.models["pattern_hwnc"], (batch, *self.image_shape), structures)

    def fresh(self, key: jax.Array) -> TrainState:
        """The state before the first update, as a pure function."""
        variables = self.model.init(key, jnp.zeros((1, *self.image_shape), jnp.float32), train=False)
        params = variables["params"]
        begin = self.optimizer.init if self.updates is None else self.updates.init
        stats = variables.get("batch_stats", {})
        # Copies: a buffer that stands in a state twice cannot be donated.
        average = jax.tree.map(jnp.copy, (params, stats)) if self.config.ema_epochs else ()
        return TrainState(jnp.zeros([], jnp.int32), params, stats, begin(params), average)

    def init(self, seed: int) -> TrainState:
        """What `fresh` makes of a run's seed."""
        key = jax.random.fold_in(jax.random.key(seed), _INIT)
        return self._compiled(("init",), lambda: self.fresh, (key,), ())(key)

    def segments(self, epoch: int, done: int = 0, facts: tuple[int, int, int] | None = None) -> list[Segment]:
        """The phases of an epoch after its first ``done`` updates.

        Args:
            epoch: from 0.
            done: updates.
            facts: ``(selected, pruned, gathered)`` of the state then; as planned when None.
        """
        start = epoch * self.steps_per_epoch
        if self.schedule is None:
            return [(Phase.DENSE, False, done, self.steps_per_epoch)]
        runs = self.schedule.segments(start + done, start + self.steps_per_epoch, facts)
        return [(phase, gathers, first - start, end - start) for phase, gathers, first, end in runs]

    def _facts(self, state: TrainState) -> tuple[int, int, int] | None:
        """What has happened, on the host."""
        if self.schedule is None:
            return None
        held = state.opt_state
        return tuple(int(fact) for fact in jax.device_get((held.selected, held.pruned, held.gathered)))

    def run_epoch(
        self, state: TrainState, epoch: int, seed: int, on_step: Callable[[int], None] = lambda _: None
    ) -> tuple[TrainState, np.ndarray]:
        """Train one epoch. ``state`` is donated: its buffers are gone afterwards.

        Args:
            state: at the epoch's start.
            epoch: from 0.
            seed: the run's.
            on_step: called on the host with the number of updates dispatched, between updates ("steps") or
                between segments ("scan"); may raise to stop.

        Returns:
            ``(state, metrics)``, metrics float32 (steps, 2): loss without group lasso, top-1.
        """
        key = jax.random.key(seed)
        order = _order(jax.random.fold_in(jax.random.fold_in(key, _ORDER), epoch), len(self.train_data.labels))
        metrics = jnp.zeros((self.steps_per_epoch, 2), jnp.float32)
        self.ran, facts = [], self._facts(state)
        while not self.ran or self.ran[-1][3] < self.steps_per_epoch:
            for segment in self.segments(epoch, self.ran[-1][3] if self.ran else 0, facts):
                self.ran.append(segment)
                state, metrics = self._run_segment(
                    segment, (seed, facts and facts[0]), state, metrics, order, key, on_step
                )
                if segment[0] == Phase.SELECT:
                    # Scores that are not finite put it off: what follows depends on whether masks stand.
                    facts = self._facts(state)
                    break
        return state, np.asarray(metrics)

    def _run_segment(
        self, segment: Segment, known: Any, state: TrainState, metrics: Any, order: Any, key: Any,
        on_step: Callable[[int], None],
    ) -> tuple[TrainState, Any]:
        phase, gathers, first, end = segment
        way, structures = "dense", {}
        if phase >= Phase.REGULARIZE:
            self._prepare_pruned(known, state, metrics, order, key)
        if phase == Phase.PRUNED:
            choice = self._choose_pruned(state, metrics, order, key)
            way, structures = choice.way, choice.structures
        kind = "gather" if gathers else phase.name.lower()
        for begin, stop, batch in self.by_batch_size(first, end):
            looped = self.scan and stop - begin > 1
            for index in (begin,) if looped else range(begin, stop):
                bounds = (np.int32(begin), np.int32(stop)) if looped else (np.int32(index),)
                args = (state, metrics, self.train_data, order, *bounds, key, structures)
                state, metrics = self._program(kind, batch, looped, way, args)(*args)
                on_step(stop if looped else index + 1)
        return state, metrics

    def compile_dense(self, state: TrainState) -> float:
        """Compile the dense phase's update, for a run that begins after it; returns the seconds."""
        before, start = self.compile_seconds, time.perf_counter()
        key, metrics = jax.random.key(0), jnp.zeros((self.steps_per_epoch, 2), jnp.float32)
        order = _order(key, len(self.train_data.labels))
        batch = min(self.config.batch_size, len(self.train_data.labels))
        args = (state, metrics, self.train_data, order, *self._few_updates(), key, {})
        self._program("dense", batch, self.scan, "dense", args, True)
        self.compile_seconds = before + time.perf_counter() - start
        return self.compile_seconds - before

    def evaluate(self, state: TrainState) -> tuple[float, float]:
        """``(mean loss, top-1)`` on the evaluation set, in float32 sums."""
        count = len(self.eval_data.labels)
        totals = []
        for begin in range(0, count, EVAL_BATCH):
            end = min(begin + EVAL_BATCH, count)
            args = (state.params, state.batch_stats, self.eval_data, np.int32(begin))
            build = functools.partial(evaluation_of, self, end - begin)
            key = ("eval", end - begin, *self._shapes(state.params))
            totals.append(self._compiled(key, build, args, ())(*args))
        loss, correct = np.sum([np.asarray(total) for total in totals], axis=0, dtype=np.float64)
        return loss / count, correct / count

    def _shapes(self, params: Any) -> tuple[tuple[int, ...], ...]:
        """What tells a narrowed net's programs apart."""
        return () if self.channels is None else tuple(leaf.shape for leaf in jax.tree.leaves(params))

    def between_epochs(self, state: TrainState, epoch: int) -> tuple[TrainState, dict[str, Any] | None]:
        """What happens before an epoch's first update: PruneTrain's smaller net, and facts about it."""
        channels = self.channels
        if channels is None or not channels.is_due(epoch):
            return state, None
        return channels.reconfigure(state)

    def settled(self, state: TrainState, epoch: int) -> TrainState:
        """The state after an epoch: after the last one the averaged weights and statistics are the net's."""
        if not self.config.ema_epochs or epoch + 1 < self.config.total_epochs:
            return state
        params, stats = jax.tree.map(jnp.copy, state.average)
        return state._replace(params=params, batch_stats=stats)

    def masks(self, state: TrainState) -> ct.Masks | None:
        """The masks of a run in any phase, of whichever method; None for a dense one."""
        if self.updates is not None:
            return ct.masks_of(state.opt_state)
        return self.method.masks(state.params, state.opt_state)

    def variables(self, state: TrainState) -> dict[str, Any]:
        """What the net answers with, as for `flax.linen.Module.apply`: 2:4 keeps more weights than it computes with."""
        stats = {"batch_stats": state.batch_stats} if state.batch_stats else {}
        return {"params": self.method.forward(state.params), **stats}

    def by_batch_size(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """Split updates [first, end) of an epoch by batch size, (first, end, batch): the last one may be smaller."""
        full = self.steps_per_epoch - bool(self.tail)
        parts = [(first, min(end, full), self.config.batch_size), (max(first, full), end, self.tail)]
        return [(begin, stop, batch) for begin, stop, batch in parts if begin < stop]

    def _prepare_pruned(self, known: Any, state: Any, metrics: Any, order: Any, key: Any) -> None:
        """Have the pruned phase's programs compiled in the background, while the phases before it train."""
        if self.schedule.prune_step + 1 >= self.config.total_epochs * self.steps_per_epoch:
            return  # no update follows the prune
        batch = min(self.config.batch_size, len(self.train_data.labels))

        def compile_way(way: Way, structures: dict[str, Any]) -> None:
            self._program("pruned", batch, self.scan, way, (*shapes, structures), True)

        # Shapes alone: the arrays themselves are donated meanwhile.
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype),
            (state, metrics, self.train_data, order, *self._few_updates(), key),
        )
        before = self.pruned.waited_seconds
        self.pruned.prepare(known, self.masks(state), compile_way)
        self.compile_seconds += self.pruned.waited_seconds - before

    def _few_updates(self) -> tuple[np.int32, ...]:
        """Which updates are timed: the first one, or the first few of an epoch's loop."""
        return (np.int32(0), np.int32(min(3, self.steps_per_epoch))) if self.scan else (np.int32(0),)

    def _choose_pruned(self, state: Any, metrics: Any, order: Any, key: Any) -> Choice:
        batch = min(self.config.batch_size, len(self.train_data.labels))

        def run(way: Way, structures: dict[str, Any]) -> None:
            copies = jax.tree.map(jnp.copy, (state, metrics))
            args = (*copies, self.train_data, order, *self._few_updates(), key, structures)
            jax.block_until_ready(self._program("pruned", batch, self.scan, way, args)(*args))

        before = self.pruned.waited_seconds
        choice = self.pruned.choose(run)
        self.compile_seconds += self.pruned.waited_seconds - before
        return choice

    def _program(
        self, kind: str, batch: int, looped: bool, way: Way, args: tuple, in_background: bool = False
    ) -> Callable[..., Any]:
        """An update, ``(state, metrics, data, order, ..., key, structures) -> (state, metrics)``, or a loop of them.

        In a loop it is one program. An update by itself is two, so that all phases share the costly one, which has
        the convolutions, and few have to wait for a compiler.
        """
        # Structures of another size, and nets that became narrower, are other programs.
        narrowed = self._shapes(args[0].params)
        shapes = (jax.tree.structure(args[-1]), *narrowed)
        if looped:
            return self._compiled(
                (kind, batch, way, *shapes), lambda: update_loop(self.update_step(kind, batch, way)), args, (0, 1),
                in_background,
            )

        def run(state: TrainState, metrics: Any, data: Images, order: Any, index: Any, key: Any, held: Any) -> Any:
            inputs = (state.params, state.batch_stats, state.step, data, order, index, key, held)
            gradient = self._compiled(
                ("gradient", batch, way, *shapes), lambda: gradient_of(self, batch, way), inputs, (), in_background,
                size_of(state.opt_state),
            )
            if in_background:
                found = jax.eval_shape(gradient_of(self, batch, way), *inputs)
            else:
                found = gradient(*inputs)
            changed = (state, metrics, index, found)
            change = self._compiled(
                ("change", kind, *narrowed), lambda: change_of(self, kind), changed, (0, 1), in_background
            )
            return None if in_background else change(*changed)

        if in_background:
            run(*args)
        return run

    def _compiled(
        self,
        key: Any,
        build: Callable[[], Callable[..., Any]],
        args: tuple,
        donate: tuple[int, ...],
        in_background: bool = False,
        beside: int = 0,
    ) -> Callable[..., Any]:
        """The compiled program of a key; compiling that the run waits for is timed apart from running.

        ``beside``: bytes that live while it runs and are none of its arguments.
        """
        if key not in self._programs:
            start = time.perf_counter()
            lowered = jax.jit(build(), donate_argnums=donate).lower(*args)
            program = self._programs[key] = lowered.compile(pk.compiler_options(self.config.precision))
            if key[0] not in ("init", "eval"):
                self.program_bytes = max(self.program_bytes, bytes_of(program) + beside)
            if not in_background:
                self.compile_seconds += time.perf_counter() - start
        return self._programs[key]

    def update_step(self, kind: str, batch: int, way: Way = "dense") -> Callable[..., Any]:
        """One whole update as a pure function: `experiments.train.update.update_step` of this trainer."""
        return update_step(self, kind, batch, way)


def _lasso_weight(prune: Any, select_step: int, steps_per_epoch: int) -> Any:
    """The lasso's weight: a number, or a function of the updates done where it rises after the selection."""
    if not prune.coeff_ramp_epochs:
        return prune.coeff
    length = prune.coeff_ramp_epochs * steps_per_epoch
    return optax.linear_schedule(0.0, prune.coeff, length, transition_begin=select_step)


@functools.partial(jax.jit, static_argnums=1)
def _order(key: jax.Array, count: int) -> jax.Array:
    return jax.random.permutation(key, count)


def update_loop(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` over updates [first, end), one compiled loop; its bounds are traced, so one program serves all."""

    def run(state: Any, metrics: Any, data: Any, order: Any, first: Any, end: Any, key: Any, held: Any) -> Any:
        def once(index: Any, carry: Any) -> Any:
            return body(*carry, data, order, index, key, held)

        return jax.lax.fori_loop(first, end, once, (state, metrics))

    return run
