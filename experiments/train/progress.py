"""What a run tells while it trains: a bar where somebody looks, a line an epoch where not, TensorBoard's events."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from clicktrain_jax import extras
from clicktrain_jax.phases import Phase
from clicktrain_jax.trees import named_leaves
from experiments.configs.base import TrainConfig
from experiments.train.recipe import learning_rate
from experiments.train.state import TrainState
from experiments.train.step import Trainer


class Progress:
    """Tells of one run; made by `telling`.

    Args:
        config: of the run.
        trainer: of the run.
        first: the first epoch that is trained now.
        bar: tqdm's, or None.
        events: tensorboardX's writer, or None.
    """

    def __init__(self, config: TrainConfig, trainer: Trainer, first: int, bar: Any, events: Any) -> None:
        self._config, self._trainer, self._first = config, trainer, first
        self._bar, self._events = bar, events
        self._rate = learning_rate(config, trainer.steps_per_epoch)
        self._done = 0

    def begin(self, epoch: int) -> None:
        """An epoch begins."""
        self._done = 0
        if self._bar is not None:
            phase = self._trainer.segments(epoch)[0][0].name.lower()
            self._bar.set_description(f"{self._name}, epoch {epoch + 1}/{self._config.total_epochs}, {phase}")

    def step(self, count: int) -> None:
        """So many of the epoch's updates are dispatched."""
        if self._bar is not None:
            self._bar.update(count - self._done)
        self._done = count

    def facts(self, epoch: int, state: TrainState) -> tuple[dict[str, float], dict[str, float]]:
        """``({"learning_rate", "sparsity"} after an epoch, share of zeros by convolution)``."""
        layers, whole = sparsity(self._trainer, state)
        rate = float(self._rate((epoch + 1) * self._trainer.steps_per_epoch - 1))
        return {"learning_rate": rate, "sparsity": whole}, layers

    def end(self, line: dict[str, Any], layers: dict[str, float]) -> None:
        """An epoch has ended: its line of metrics.jsonl, and the share of zeros by convolution."""
        if self._bar is not None:
            top1 = 100 * line.get("eval_top1", math.nan)
            self._bar.set_postfix(loss=f"{line['train_loss']:.3f}", top1=f"{top1:.2f}")
        elif self._config.loop.progress:
            print(self._text(line), file=sys.stderr, flush=True)
        if self._events is not None:
            self._write(line, layers)

    @property
    def _name(self) -> str:
        return f"{self._config.name} seed {self._config.seed}"

    def _text(self, line: dict[str, Any]) -> str:
        total = self._config.total_epochs
        images = self._trainer.dataset.train_examples / max(line["train_seconds"], 1e-9)
        left = (total - line["epoch"] - 1) * (line["train_seconds"] + line.get("eval_seconds", 0.0))
        top1 = f"top-1 {100 * line['eval_top1']:.2f}" if "eval_top1" in line else "not evaluated"
        return (
            f"{self._name}: epoch {line['epoch'] + 1}/{total}, {'+'.join(line['phases'])}, "
            f"loss {line['train_loss']:.4f}, {top1}, sparsity {100 * line['sparsity']:.1f}%, "
            f"{images:,.0f} images/s, {_clock(left)} left"
        )

    def _write(self, line: dict[str, Any], layers: dict[str, float]) -> None:
        scalars = {key: value for key, value in line.items() if isinstance(value, float)}
        scalars["phase"] = float(Phase[line["phases"][-1].upper()])
        scalars |= {f"sparsity/{name}": share for name, share in layers.items()}
        for key, value in scalars.items():
            self._events.add_scalar(key, value, line["epoch"])
        self._events.flush()


@contextlib.contextmanager
def telling(config: TrainConfig, trainer: Trainer, first: int, folder: Path) -> Iterator[Progress]:
    """What tells of a run that goes on with epoch ``first`` in ``folder``, for as long as the context lasts.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed and the config asks for events.
    """
    with contextlib.ExitStack() as stack:
        bar = events = None
        if config.loop.progress and sys.stderr.isatty():
            with extras.brings("experiments"):
                from tqdm import tqdm

            steps = trainer.steps_per_epoch
            bar = stack.enter_context(
                tqdm(total=config.total_epochs * steps, initial=first * steps, unit="step", dynamic_ncols=True)
            )
        if config.loop.tensorboard:
            with extras.brings("tensorboard"):
                from tensorboardX import SummaryWriter

            events = stack.enter_context(SummaryWriter(str(folder / "events"), purge_step=first))
        yield Progress(config, trainer, first, bar, events)


def sparsity(trainer: Trainer, state: TrainState) -> tuple[dict[str, float], float]:
    """Share of the convolutions' weights that are zero: by name, and of all; what a net was narrowed by counts."""
    sizes = {name: leaf.size for name, leaf in named_leaves(trainer.abstract_params) if len(leaf.shape) == 4}
    params = dict(named_leaves(trainer.variables(state)["params"]))
    kept = jax.device_get(_nonzero({name: params[name] for name in sizes}))
    layers = {name: 1 - int(kept[name]) / size for name, size in sizes.items()}
    return layers, 1 - sum(int(count) for count in kept.values()) / sum(sizes.values())


@jax.jit
def _nonzero(kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.count_nonzero(kernel) for name, kernel in kernels.items()}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


Hook = Callable[[dict[str, Any]], Any]


def ask(hook: Hook | None, told: dict[str, Any]) -> bool | Exception:
    """Whether a user's hook wants the run to stop: True, or what it raised."""
    if hook is None:
        return False
    try:
        return hook(told) is True
    except Exception as error:  # raised again once the epoch is saved
        return error
