"""The host side of a run: epochs, evaluation, records, checkpoints, resuming and stopping."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax import models
from experiments.configs.base import TrainConfig, to_dict
from experiments.data import Dataset, StreamedDataset, load
from experiments.records import RunFolder, differences, read_metrics
from experiments.train import processes
from experiments.train.checkpoints import Checkpoints, digest
from experiments.train.checkpoints_within import Within
from experiments.train.costs import multiply_adds
from experiments.train.devices import devices_of
from experiments.train.memory import keep_freed
from experiments.train.programs import keep_on_disk
from experiments.train.progress import Hook, ask, telling
from experiments.train.signals import Interrupted, heeded
from experiments.train.state import Begun, NonFinite, TrainState
from experiments.train.step import Trainer

__all__ = ["Interrupted", "NonFiniteLoss", "summarise", "template", "train"]


class NonFiniteLoss(RuntimeError):
    """The loss, a weight or a score became NaN or infinite; the last good checkpoint is kept."""


def train(
    config: TrainConfig,
    workdir: Path,
    *,
    dataset: Dataset | StreamedDataset | None = None,
    trainer: Trainer | None = None,
    on_epoch: Hook | None = None,
) -> dict[str, Any]:
    """Train one run to its end, from wherever its folder stands.

    Args:
        config: the run.
        workdir: its folder. One of the same config is resumed from its last saved epoch, or from where the epoch after
            it was saved within; a finished one is returned as it is.
        dataset: what `experiments.data.load` returns for the config; loaded when None.
        trainer: compiled programs to share between seeds, of the same config but for the seed; made when None.
        on_epoch: called after every epoch with its line of metrics.jsonl (``epoch`` from 0, ``phases``, ``train_loss``,
            ``train_top1``, ``sparsity``, ``learning_rate``, seconds, and ``eval_loss``, ``eval_top1`` where it was
            evaluated) and ``layers``, the share of zeros by convolution. Returning True stops the run, and so does an
            exception, which is raised again; the epoch is saved first, and the same call goes on after it.

    Returns:
        The summary, as in summary.json; of a run that its hook stopped, the same of the epochs so far, which is not
        written, with ``stopped_after_epochs``.

    Raises:
        ValueError: bad config, missing data, a folder of another run, a trainer of another config, checkpoints
            none of which can be read.
        Interrupted: SIGINT or SIGTERM came.
        NonFiniteLoss: training diverged.
        ConnectionError: of several processes another one is gone.
        Exception: whatever ``on_epoch`` raises.
    """
    if trainer is not None and any(field != "seed" for field, _, _ in differences(to_dict(trainer.config), config)):
        raise ValueError(f"the trainer was made for another config, {trainer.config.name!r}: make one for this run")
    processes.join(config.loop)
    processes.check_config(config)
    if dataset is None:
        dataset = processes.together(
            lambda: trainer.dataset if trainer is not None else load(config.data),
            lambda data: data and data.fingerprint,
        )
    folder = RunFolder(workdir)
    is_old = processes.from_first(lambda: folder.check(config, dataset.fingerprint))
    finished = processes.from_first(folder.summary) if is_old else None
    if finished is not None:
        return finished
    if jax.default_backend() == "cpu":
        keep_freed()
    # Whatever is wrong with the config shows here, before anything is written.
    trainer = trainer or processes.together(lambda: _trainer(config, dataset))
    compiled_before = trainer.compile_seconds
    state = trainer.init(config.seed)
    compiled_for_init = trainer.compile_seconds - compiled_before
    with contextlib.ExitStack() as stack:
        checkpoints, within, told = None, None, config
        if not processes.is_first():
            # The first one's records are the run's.
            folder = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run")
            told = dataclasses.replace(config, loop=dataclasses.replace(config.loop, progress=False, tensorboard=False))
        folder.open(config, dataset.fingerprint)
        if processes.is_first():
            checkpoints = Checkpoints(folder.checkpoints, config.loop.keep_checkpoints)
            stack.callback(checkpoints.close)
            if config.loop.checkpoint_every_steps is not None or folder.within.exists():
                within = Within(folder.within)
                stack.callback(within.close)
        saved, state, begun = _newest(checkpoints, within, trainer, folder, state)
        lines = processes.from_first(lambda: folder.keep_epochs(saved))
        # A resumed run goes on in the way that it began, whatever would be measured now.
        before = _pruned_convolution(lines if begun is None else [*lines, begun.facts["line"]])
        # Other devices may not be able to.
        way = None if before is None else before["way"]
        trainer.pruned.begin(way if trainer.devices.mesh is None or way in trainer.pruned.ways else None)
        progress = stack.enter_context(telling(told, trainer, saved, folder.path))
        stop = stack.enter_context(heeded())

        def on_step(count: int) -> None:
            progress.step(count)
            # After an epoch's last update the epoch is finished and saved first.
            if count < trainer.steps_per_epoch:
                stop.check(saved)

        for epoch in range(saved, config.total_epochs):
            progress.begin(epoch)
            try:
                state, line = _epoch(trainer, state, epoch, config, on_step, begun, within)
                begun = None
            except jax.errors.JaxRuntimeError as error:
                processes.explain(error, saved)
                raise
            except NonFinite as error:
                raise NonFiniteLoss(
                    f"{config.name}: {error} in epoch {epoch}. The newest checkpoint, of {saved} whole epochs, is kept "
                    f"in {folder.checkpoints}. Lower learning_rate, or look at the data"
                ) from error
            if epoch == 0:
                line["compile_seconds"] += compiled_for_init
            facts, layers = progress.facts(epoch, state)
            line |= facts
            folder.append_metrics(line)
            lines.append(line)
            progress.end(line, layers)
            asked = ask(on_epoch, line | {"layers": layers})
            if asked or stop.signal_number is not None or _due(epoch, config.loop.checkpoint_every_epochs, config):
                if checkpoints is not None:
                    checkpoints.save(epoch + 1, state)
                if within is not None:
                    within.clear()
                saved = epoch + 1
            if isinstance(asked, Exception):
                raise asked
            if epoch + 1 < config.total_epochs:
                stop.check(saved)
                if asked:
                    if not any("eval_top1" in one for one in lines):
                        line["eval_loss"], line["eval_top1"] = trainer.evaluate(state)
                    return summarise(trainer, config, state, lines) | {"stopped_after_epochs": saved}
        summary = summarise(trainer, config, state, lines)
        folder.write_summary(summary)
        # One that came during the last epoch: the run is complete, but whoever sent it wants no further one.
        stop.check(saved)
    return summary


def _trainer(config: TrainConfig, dataset: Dataset | StreamedDataset) -> Trainer:
    """Of a run by itself: on all devices that it asks for, its programs kept for the next run.

    Who brings a trainer along, to compare runs say, has each of them compile for itself.
    """
    devices = devices_of(config)
    # What divides a native convolution has another text in each process: such programs would be kept and never found.
    if devices.mesh is None or jax.default_backend() != "cpu":
        keep_on_disk()
    return Trainer(config, dataset, devices=devices)


def _newest(
    checkpoints: Checkpoints | None, within: Within | None, trainer: Trainer, folder: RunFolder, fresh: TrainState
) -> tuple[int, TrainState, Begun | None]:
    """``(epochs done, state, what is done of the next one)`` of the newest checkpoint that the first process has.

    None done, the fresh state and None where it has none.
    """
    per_epoch, made = trainer.steps_per_epoch, template(trainer, folder, fresh)
    metrics = trainer.devices.whole(jnp.zeros((per_epoch, 2), jnp.float32))
    tree = fresh, metrics

    def shaped(facts: dict[str, Any]) -> tuple[TrainState, jax.Array]:
        line = facts["line"]
        if "channels" in line:
            return trainer.devices.whole(trainer.channels.template(fresh, line["channels"])), metrics
        return made(line["epoch"]) if callable(made) else made, metrics

    def read() -> tuple[int, dict[str, Any] | None]:
        nonlocal tree
        updates = 0
        if (restored := checkpoints.restore_newest(made)) is not None:
            updates, tree = restored[0] * per_epoch, (restored[1], metrics)
        found = None if within is None else within.newest(updates, shaped)
        if found is None:
            return updates, None
        updates, tree, facts = found
        return updates, facts

    updates, facts = processes.from_first(read)
    if updates and jax.process_count() > 1:
        tree = trainer.devices.whole(processes.bytes_from_first(tree))
    state, metrics = tree
    saved, done = divmod(updates, per_epoch)
    return saved, state, None if facts is None else Begun(done, metrics, facts)


def template(trainer: Trainer, folder: RunFolder, fresh: TrainState) -> Any:
    """What `experiments.train.checkpoints.Checkpoints.restore_newest` wants for a run.

    Args:
        trainer: of the run.
        folder: where its epochs' lines tell how a net became smaller.
        fresh: what `Trainer.init` returns.
    """
    channels = trainer.channels
    if channels is None:
        return fresh
    facts = {line["epoch"]: line["channels"] for line in read_metrics(folder.path) if "channels" in line}

    def shaped(epochs_done: int) -> TrainState:
        past = [epoch for epoch in facts if epoch < epochs_done]
        return trainer.devices.whole(channels.template(fresh, facts[max(past)])) if past else fresh

    return shaped


def _due(epoch: int, every: int, config: TrainConfig) -> bool:
    return (epoch + 1) % every == 0 or epoch + 1 == config.total_epochs


def _epoch(
    trainer: Trainer,
    state: TrainState,
    epoch: int,
    config: TrainConfig,
    on_step: Callable[[int], None],
    begun: Begun | None,
    within: Within | None,
) -> tuple[TrainState, dict[str, Any]]:
    compiled_before, start, cpu_start = trainer.compile_seconds, time.perf_counter(), time.process_time()
    before = {} if begun is None else begun.facts["line"]
    kept = {key: before[key] for key in ("channels", "convolution") if key in before}

    def so_far() -> dict[str, Any]:
        compiled = trainer.compile_seconds - compiled_before
        line: dict[str, Any] = {
            "epoch": epoch,
            "phases": list(dict.fromkeys(phase.name.lower() for phase, *_ in trainer.ran)),
            "train_seconds": before.get("train_seconds", 0.0) + time.perf_counter() - start - compiled,
            # All threads', compiling among it.
            "cpu_seconds": before.get("cpu_seconds", 0.0) + time.process_time() - cpu_start,
            "compile_seconds": before.get("compile_seconds", 0.0) + compiled,
        }
        if trainer.pruned.choice is not None and "pruned" in line["phases"]:
            line["convolution"] = trainer.pruned.choice.record()
        return line | kept

    def save(state: TrainState, metrics: jax.Array) -> None:
        if not _all_finite(metrics, state.params, state.batch_stats):
            raise NonFinite("a loss or a weight is not finite before the epoch's end")  # and is not gone on from
        ran = {"ran": trainer.ran, "images_by_pattern": trainer.images_by_pattern}
        within.save(state, metrics, {"line": so_far(), **ran})

    if begun is None:
        state, reconfigured = trainer.between_epochs(state, epoch)
        kept |= {} if reconfigured is None else {"channels": reconfigured}
    asked = {} if begun is None else {"begun": begun}
    if within is not None:
        asked |= {"save": save, "save_every": config.loop.checkpoint_every_steps}
    state, metrics = trainer.run_epoch(state, epoch, config.seed, on_step, **asked)
    state = trainer.settled(state, epoch)
    line = so_far() | {"train_loss": float(metrics[:, 0].mean()), "train_top1": float(metrics[:, 1].mean())}
    line["training_multiply_adds"] = multiply_adds(trainer, state)
    if "select" in line["phases"]:
        line["selection"] = _selection(state)
    if not np.isfinite(metrics[:, 0]).all():
        raise NonFinite(f"the loss of update {np.flatnonzero(~np.isfinite(metrics[:, 0]))[0]} is not finite")
    # The last update may be the one that diverged: its loss was taken before it.
    if not _all_finite(state.params, state.batch_stats):
        raise NonFinite("a weight is not finite after the last update")
    if _due(epoch, config.loop.eval_every_epochs, config):
        compiled_before, start = trainer.compile_seconds, time.perf_counter()
        line["eval_loss"], line["eval_top1"] = trainer.evaluate(state)
        eval_compiled = trainer.compile_seconds - compiled_before
        if not math.isfinite(line["eval_loss"]):
            raise NonFinite("the evaluation loss is not finite")
        line["eval_seconds"] = time.perf_counter() - start - eval_compiled
        line["compile_seconds"] += eval_compiled
    return state, line


def summarise(trainer: Trainer, config: TrainConfig, state: TrainState, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a finished run. Accuracies are fractions, times are seconds."""
    masks = trainer.masks(state)
    sizes = models.output_sizes(trainer.model, trainer.image_shape)
    report = ct.report(state.params, masks, output_sizes=sizes)
    evaluated = [line for line in lines if "eval_top1" in line]
    # One-shot pruning falls on the last updates of the last epoch.
    prune_epoch = min(config.prune.prune_epoch, config.total_epochs - 1) if config.prune else 0
    train_seconds = sum(line["train_seconds"] for line in lines)
    compile_seconds = sum(line["compile_seconds"] for line in lines)
    dataset = trainer.dataset
    return {
        "name": config.name,
        "net": config.net,
        "width": config.width,
        "seed": config.seed,
        "epochs": config.total_epochs,
        "dataset": dataset.name,
        "encoding": dataset.encoding,
        "eval_split": dataset.eval_split,
        "train_examples": dataset.train_examples,
        "eval_examples": dataset.eval_examples,
        "method": "dense" if config.method is None else config.method.kind,
        "final_top1": evaluated[-1]["eval_top1"],
        "best_top1": max(line["eval_top1"] for line in evaluated),
        "best_pruned_top1": max(
            (line["eval_top1"] for line in evaluated if line["epoch"] >= prune_epoch), default=None
        ),
        "final_loss": evaluated[-1]["eval_loss"],
        "conv_compression": report.conv_compression,
        "conv_compression_without_shortcuts": report.compression_without("shortcut"),
        "model_compression": report.model_compression,
        "conv_weights": report.conv_weights,
        "conv_retained": report.conv_retained,
        "model_weights": report.model_weights,
        "model_retained": report.model_retained,
        "multiply_adds": report.multiply_adds,
        "retained_multiply_adds": report.retained_multiply_adds,
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "retained": layer.retained,
                "kernels_removed": layer.kernels_removed,
                "pattern_counts": _pattern_counts(masks, layer.name),
            }
            for layer in report.convs
        ],
        "train_seconds": train_seconds,
        "compile_seconds": compile_seconds,
        "train_and_compile_seconds": train_seconds + compile_seconds,
        "cpu_seconds": sum(line.get("cpu_seconds", 0.0) for line in lines),
        "eval_seconds": sum(line.get("eval_seconds", 0.0) for line in lines),
        "training_multiply_adds": sum(line.get("training_multiply_adds", 0) for line in lines),
        "training_bytes": trainer.program_bytes,
        "pruned_convolution": _pruned_convolution(lines),
        "params_sha256": digest(state.params),
        "masks_sha256": None if masks is None else digest(masks),
        "selection": None if trainer.updates is None else _selection(state),
    }


def _selection(state: TrainState) -> dict[str, Any]:
    """`clicktrain_jax.status` as plain data."""
    status = ct.status(state.opt_state)
    return dataclasses.asdict(status) | {"by_magnitude": list(status.by_magnitude)}


def _pruned_convolution(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How the pruned phase was run from its begin on, and what was measured for it; None before."""
    return next((line["convolution"] for line in lines if "convolution" in line), None)


def _pattern_counts(masks: ct.Masks | None, name: str) -> dict[str, int] | None:
    """How many of a layer's kept kernels use each pattern, by the pattern's text."""
    layer = None if masks is None else masks.layers.get(name)
    if getattr(layer, "pattern_ids", None) is None:
        return None
    ids, kernel, patterns = jax.device_get(layer)
    counts = np.bincount(ids[kernel], minlength=len(patterns)).tolist()
    return dict(zip(map(ct.patterns.to_text, patterns), counts))


@jax.jit
def _all_finite(*trees: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trees)]))
