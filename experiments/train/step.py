"""The device side of a run: one update, one evaluation, as compiled programs for each phase.

The whole training set lies on the device as uint8; an update gathers its batch, augments, normalises and
mixes it up, so the host sends one index a step and fetches one array of metrics an epoch. Of a streamed set an update
is given its batch instead, in the same order; all else is the same.

Where epochs are compiled loops, three of them serve a run: dense updates, updates under masks in any phase, updates by
pattern. A loop has one length; updates that it does not fit, such as those of the epoch of a selection and a smaller
last batch, are called one by one. All programs but the first one are compiled while others train.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax import models
from clicktrain_jax.methods import random_scores
from clicktrain_jax.phases import Phase
from experiments.configs.base import TrainConfig
from experiments.data import Dataset, StreamedDataset
from experiments.train.channel_pruning import ChannelPruning
from experiments.train.compiled import Updates
from experiments.train.devices import Devices
from experiments.train.feed import Feed, check_streamed, eval_batches
from experiments.train.methods import make_method
from experiments.train.programs import Programs
from experiments.train.pruned_phase import PrunedPhase, facts_of, scheduled, way_asked
from experiments.train.recipe import lasso_weight, make_models, make_optimizer, make_plan, pattern_source
from experiments.train.state import Begun, TrainState
from experiments.train.update import evaluation_of
from pallas_kernels.pattern_conv import mosaic_gpu

# Streams of random numbers, each folded into the run's key.
_INIT = 0  # experiments.train.compiled and update have the others
# Updates that a compiled loop does at most: the host shows progress and heeds signals between loops.
LONGEST_LOOP = 512


# (phase, gathers scores, first, end), updates counted from an epoch's start.
Segment = tuple[Phase, bool, int, int]


class Trainer(Updates):
    """Model, optimizer and compiled programs of one config; serves any number of seeds.

    Attributes:
        ran: the segments of the last epoch, as they were run.
        images_by_pattern: images of the last epoch whose convolutions ran by pattern.

    Args:
        config: of the runs, but for the seed.
        dataset: what they train on.
        platform: "cpu" or "gpu", that programs are made for; jax's own when None.
        devices: that a batch is divided over; one when None, whatever the config says (`devices_of` reads it).
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset | StreamedDataset,
        platform: str | None = None,
        devices: Devices | None = None,
    ) -> None:
        self.config, self.devices = config, devices or Devices()
        self.dataset = dataset
        image_shape = tuple(dataset.image_shape)
        self.image_shape = image_shape
        on_cpu = self.on_cpu = (platform or jax.default_backend()) == "cpu"
        convolution, program = config.loop.convolution, config.loop.epoch_program
        self.streams = isinstance(dataset, StreamedDataset)
        if self.streams:
            check_streamed(config, dataset)
        self.scan = program == "scan" or program == "auto" and not on_cpu and not self.streams
        if convolution == "auto":
            convolution = ("patches" if self.scan else "direct") if on_cpu else "xla"
        divided = self.devices.mesh is not None
        self.models = make_models(
            config, dataset.num_classes, convolution, on_cpu=on_cpu, divided=divided or config.loop.ordered
        )
        self.model = self.models["dense"]
        abstract = models.abstract_variables(self.model, image_shape)
        self.abstract_params = abstract["params"]
        count = dataset.train_examples
        if self.streams:
            # What stands for a batch where programs are compiled and tried.
            share = self.devices.share(config.batch_size)
            images, labels = np.zeros((share, *image_shape), np.uint8), np.zeros(share, np.int32)
            self.train_data = self.devices.batch(images, labels)
        else:
            self.train_data = self.devices.images(dataset.train_images, dataset.train_labels)
            self.eval_data = self.devices.whole(self.devices.images(dataset.eval_images, dataset.eval_labels))
        full, self.tail = divmod(count, config.batch_size)
        keeps = on_cpu and config.accumulate * config.shards == 1
        self.fills = config.partial_batch == "fill" or config.partial_batch == "keep" and not keeps
        if self.fills and full:
            full, self.tail = full + bool(self.tail), 0
        if config.partial_batch == "drop":
            self.tail = 0
        self.steps_per_epoch = full + bool(self.tail)
        self.loop_length = full // max(1, -(-full // LONGEST_LOOP)) if self.scan else 0
        if self.tail % (config.accumulate * config.shards):
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the {count} training images, which cannot be divided "
                f"into accumulate={config.accumulate} times shards={config.shards} equal parts: lower the batch size"
            )
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the {count} training images and partial_batch is "
                "'drop': nothing would be trained; lower the batch size"
            )
        self.plan, self.schedule, self.updates = None, None, None
        if config.prune is not None:
            self.plan = make_plan(config.prune, self.model, self.abstract_params, image_shape, config.net)
        self.method = make_method(
            config,
            make_optimizer(config, self.steps_per_epoch),
            self.model,
            abstract,
            image_shape,
            self.steps_per_epoch,
            self.plan,
        )
        self.optimizer = self.method.optimizer
        self.channels = None
        if config.channels is not None:
            self.channels = ChannelPruning(self.model, abstract, image_shape, config.channels)
        if config.prune is not None:
            self._set_up_pruning()
        self.pruned = PrunedPhase(
            way_asked(config, self.devices, on_cpu=on_cpu),
            self.plan,
            facts_of(config, self.plan) | ({"devices": self.devices.count} if divided else {}),
            hwnc=not on_cpu and not divided,
            deal=lambda structures: self.devices.whole(self.scheduled(structures)),
            portable=on_cpu
            or not divided
            and (config.precision not in mosaic_gpu.DTYPES or mosaic_gpu.why_not_here() is not None),
        )
        self.ran: list[Segment] = []
        self.images_by_pattern = 0
        self.programs = Programs(pk.compiler_options(config.precision), self.devices.everywhere)
        self._is_prepared = False
        self._retained: tuple[Any, Any] = None, None

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
            coeff=lasso_weight(prune, select, per_epoch),
            patterns=self.patterns,
            importance=random_scores if prune.importance == "random" else prune.importance,
            importance_steps=prune.importance_steps,
        )

    def scheduled(self, structures: dict[str, Any]) -> dict[str, Any]:
        """The structures with worklists for this batch size; as they are on a CPU, which has no use for any."""
        if not structures or "pattern_hwnc" not in self.pruned.ways:
            return structures
        batch = self._batch // (self.config.accumulate * self.config.shards)
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
        self._retained = None, None
        key = self.devices.whole(jax.random.fold_in(jax.random.key(seed), _INIT))
        return self.programs.get(("init",), lambda: self.fresh, (key,), counts=False, runs_once=True)(key)

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
        self,
        state: TrainState,
        epoch: int,
        seed: int,
        on_step: Callable[[int], None] = lambda _: None,
        *,
        begun: Begun | None = None,
        save: Callable[[TrainState, jax.Array], None] = lambda *_: None,
        save_every: int | None = None,
    ) -> tuple[TrainState, np.ndarray]:
        """Train one epoch. ``state`` is donated: its buffers are gone afterwards.

        Args:
            state: at the epoch's start, or where it was saved within.
            epoch: from 0.
            seed: the run's.
            on_step: called on the host with the number of updates dispatched, between updates ("steps") or
                between segments ("scan"); may raise to stop.
            begun: what was done of the epoch before.
            save: called with the state and the metrics so far, between updates ("steps"), or at the first end of a loop
                after so many ("scan"); not at the epoch's end.
            save_every: after how many updates; None for never.

        Returns:
            ``(state, metrics)``, metrics float32 (steps, 2): loss without group lasso, top-1.
        """
        metrics, order, key = self._begin(seed, epoch)
        done, self.ran, self.images_by_pattern = 0, [], 0
        if begun is not None:
            done, metrics, self.images_by_pattern = begun.done, begun.metrics, begun.facts["images_by_pattern"]
            self.ran = [(Phase(phase), *rest) for phase, *rest in begun.facts["ran"]]
        if self.streams:
            self._feed = Feed(self, np.asarray(self._order(key, epoch)), epoch, seed, done)
        facts = self._facts(state)
        segments = self.segments(epoch, done, facts)
        with contextlib.closing(self._feed) if self.streams else contextlib.nullcontext():
            while segments:
                known = seed, facts and facts[0]
                first = segments[0][2]
                if save_every and first // save_every > done // save_every:
                    save(state, metrics)
                    done = first
                kind = self._looped(segments, first)
                if kind is not None:
                    state, metrics = self._run_loop(kind, first, known, state, metrics, order, key)
                    end = first + self.loop_length
                    self.ran += [(*what, begin, min(stop, end)) for *what, begin, stop in segments if begin < end]
                    segments = [(*what, max(begin, end), stop) for *what, begin, stop in segments if stop > end]
                    on_step(end)
                    continue
                segment = segments.pop(0)
                if save_every and (cut := (first // save_every + 1) * save_every) < segment[3]:
                    segments.insert(0, (*segment[:2], cut, segment[3]))
                    segment = (*segment[:3], cut)
                self.ran.append(segment)
                state, metrics = self._run_segment(segment, known, state, metrics, order, key, on_step)
                if segment[0] == Phase.SELECT:
                    # Scores that are not finite put it off: what follows depends on whether masks stand.
                    facts = self._facts(state)
                    segments = self.segments(epoch, segment[3], facts)
        return state, np.asarray(metrics)

    def _looped(self, segments: list[Segment], first: int) -> str | None:
        """Which loop does the next updates in one piece: "dense", "masked" or "pruned"; None if none does."""
        end = first + self.loop_length
        if self.loop_length < 2 or end > self.steps_per_epoch - bool(self.tail):
            return None
        inside = [(phase, gathers) for phase, gathers, begin, _ in segments if begin < end]
        phases = {phase for phase, _ in inside}
        if any(gathers for _, gathers in inside) or Phase.SELECT in phases or segments[-1][3] < end:
            return None
        if phases == {Phase.PRUNED}:
            return "pruned"
        return "dense" if phases == {Phase.DENSE} else None if Phase.DENSE in phases else "masked"

    def _run_loop(
        self, kind: str, first: int, known: Any, state: TrainState, metrics: Any, order: Any, key: Any
    ) -> tuple[TrainState, Any]:
        way, structures = "dense", {}
        args = (state, metrics, self._images(self._batch), order, np.int32(first), key)
        if kind == "dense" and self.schedule is not None:
            self._prepare_masked(args)
        if kind != "dense":
            self._prepare_pruned(known, state, metrics, order, key)
        if kind == "pruned":
            choice = self._choose_pruned(state, metrics, order, key)
            way, structures = choice.way, choice.structures
            kind = "masked" if way == "dense" else "pruned"
            self.images_by_pattern += self.loop_length * self.config.batch_size * bool(structures)
            structures = self._sending(structures)
        return self._loop(kind, way, (*args, structures))(*args, structures)

    def _run_segment(
        self,
        segment: Segment,
        known: Any,
        state: TrainState,
        metrics: Any,
        order: Any,
        key: Any,
        on_step: Callable[[int], None],
    ) -> tuple[TrainState, Any]:
        phase, gathers, first, end = segment
        way, structures = "dense", {}
        if phase >= Phase.REGULARIZE:
            self._prepare_pruned(known, state, metrics, order, key)
        # Known also where loops that ran before the run was resumed used it.
        choice = None
        if phase == Phase.PRUNED and (self.images_by_pattern or not self.loop_length):
            choice = self._choose_pruned(state, metrics, order, key)
        by_pattern = False
        # Where there are loops, updates that fit none share the dense gradient: no program for a few updates.
        if choice is not None and not self.loop_length:
            way, by_pattern = choice.way, bool(choice.structures)
            structures = self._sending(choice.structures)
        kind = "gather" if gathers else phase.name.lower()
        for begin, stop, batch in self.by_batch_size(first, end):
            self.images_by_pattern += (stop - begin) * batch * by_pattern
            for index in range(begin, stop):
                images = self._feed.take(state.step) if self.streams else self._images(batch)
                args = (state, metrics, images, order, np.int32(index), key, structures)
                state, metrics = self._program(kind, batch, way, args)(*args)
                on_step(index + 1)
        return state, metrics

    def evaluate(self, state: TrainState) -> tuple[float, float]:
        """``(mean loss, top-1)`` on the evaluation set, in float32 sums."""
        count = self.dataset.eval_examples
        totals = []
        for images, begin, batch in eval_batches(self):
            args = (state.params, state.batch_stats, images, np.int32(begin))
            build = functools.partial(evaluation_of, self, batch)
            key = ("eval", batch, *self._shapes(state.params))
            totals.append(self.programs.get(key, build, args, counts=False)(*args))
            if self.streams:  # a batch waits on the device at most
                jax.block_until_ready(totals[-2:-1])
        loss, correct = np.sum([np.asarray(total) for total in totals], axis=0, dtype=np.float64)
        return loss / count, correct / count

    def between_epochs(self, state: TrainState, epoch: int) -> tuple[TrainState, dict[str, Any] | None]:
        """What happens before an epoch's first update: PruneTrain's smaller net, and facts about it."""
        channels = self.channels
        if channels is None or not channels.is_due(epoch):
            return state, None
        state, facts = channels.reconfigure(state)
        return self.devices.whole(state), facts

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
