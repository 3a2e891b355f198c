"""Runs that begin where a dense run stands: equal seeds are equal up to the selection, so train that part once.

A fork is only a cache: random streams depend on the seed and the update alone and the dense phase is the plain
program, so a run that starts from the dense run's checkpoint ends with the bits of the same config trained from its
first update (on one machine, with one number of threads). A method that wraps the optimizer does the same arithmetic
before it begins, in another program, which may round otherwise.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from experiments.configs.base import TrainConfig, to_dict
from experiments.data import Dataset, load
from experiments.records import RunFolder, differences, read_config, read_json, read_metrics, write_json
from experiments.train.checkpoints import Checkpoints, digest
from experiments.train.loop import train
from experiments.train.step import Trainer


def fork_epoch(config: TrainConfig, steps_per_epoch: int) -> int:
    """How many whole epochs a config shares with its dense run: those before its method does anything."""
    begins = 0 if config.method is None else config.method.begins_at(steps_per_epoch)
    return min(begins // steps_per_epoch, config.epochs - (config.total_epochs == config.epochs))


def dense_of(config: TrainConfig) -> TrainConfig:
    """The dense run that a config shares its first epochs with."""
    return dataclasses.replace(config, method=None)


def train_forked(config: TrainConfig, folder: Path, trunk: Path, *, trainer: Trainer | None = None) -> dict[str, Any]:
    """Train a cell to its end from the dense run's checkpoint, or from wherever its folder stands.

    Args:
        config: the cell.
        folder: its run folder.
        trunk: run folder of the same config without pruning, of the same seed, with its epochs' checkpoints. Where
            the one that is needed is missing, the cell is trained from its first update, to the same bits.
        trainer: of this config but for the seed; made when None.

    Returns:
        The summary, as from `experiments.train.loop.train`.

    Raises:
        ValueError: the trunk is a run of another config, seed or data set; and as `experiments.train.loop.train`.
    """
    dataset = trainer.dataset if trainer is not None else load(config.data)
    run = RunFolder(folder)
    if run.check(config, dataset.fingerprint) and run.summary() is not None:
        return run.summary()
    trainer = trainer or Trainer(config, dataset)
    epochs = fork_epoch(config, trainer.steps_per_epoch)
    source = RunFolder(trunk).checkpoints / str(epochs)
    if epochs and source.exists() and not _numbers(run.checkpoints) and not run.within.exists():
        _fork(config, run, trunk, epochs, dataset, trainer)
    return train(config, folder, dataset=dataset, trainer=trainer)


def _numbers(checkpoints: Path) -> list[int]:
    return [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]


def _fork(config: TrainConfig, run: RunFolder, trunk: Path, epochs: int, dataset: Dataset, trainer: Trainer) -> None:
    """Make the run folder look as if the cell had just finished its dense epochs."""
    dense = read_config(trunk)
    for field, theirs, ours in differences(to_dict(dense), dataclasses.replace(dense_of(config), name=dense.name)):
        raise ValueError(f"{trunk} is no dense run of {config.name}: its {field} is {theirs!r}, the cell's {ours!r}")
    RunFolder(trunk).check(dense, dataset.fingerprint)
    compiled_before = trainer.compile_seconds
    state = trainer.init(config.seed)
    compiling = trainer.compile_seconds - compiled_before
    shared = _restore(dense, trunk, epochs, dataset)
    # By field: a state may hold more in a pruned run.
    state = state._replace(
        **{name: getattr(shared, name) for name in ("step", "params", "batch_stats")},
        opt_state=_adopted(state.opt_state, shared.opt_state, shared.step),
    )
    run.open(config, dataset.fingerprint)
    path = run.path / "setting.json"
    mark = {"from": f"{dense.name}-seed{dense.seed}", "epochs": epochs, "params_sha256": digest(state.params)}
    write_json(path, read_json(path) | {"forked": mark})
    run.keep_epochs(0)
    # Its dense update is another program than the trunk's, compiled for this run.
    compiling += trainer.compile_dense(state)
    for line in read_metrics(trunk)[:epochs]:
        run.append_metrics(line | {"compile_seconds": compiling if line["epoch"] == 0 else 0.0})
    # Last: with a checkpoint the fork is complete, without one it is made anew.
    checkpoints = Checkpoints(run.checkpoints, config.loop.keep_checkpoints)
    checkpoints.save(epochs, state)
    checkpoints.close()


def _adopted(fresh: Any, shared: Any, step: Any) -> Any:
    """An optimizer state as if the transformations around the shared one had done nothing but count so far."""
    if "inner_state" not in getattr(fresh, "_fields", ()):
        return shared
    inner = _adopted(fresh.inner_state, shared, step)
    return fresh._replace(count=jax.numpy.asarray(step, fresh.count.dtype), inner_state=inner)


def _restore(dense: TrainConfig, trunk: Path, epochs: int, dataset: Dataset) -> Any:
    """The state of a dense run after so many epochs."""
    trainer = Trainer(dense, dataset)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(trainer.fresh, jax.random.key(dense.seed)),
    )
    # `Checkpoints` reads the newest good one: show it this one alone.
    with tempfile.TemporaryDirectory() as alone:
        shutil.copytree(RunFolder(trunk).checkpoints / str(epochs), Path(alone) / str(epochs))
        checkpoints = Checkpoints(Path(alone))
        try:
            return checkpoints.restore_newest(template)[1]
        finally:
            checkpoints.close()
