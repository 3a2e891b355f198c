"""What a run may do to prune its net: ClickTrain, and the methods that it is compared with. One class a method.

Each is plain data, checked when it is made, with five things more that a run asks for: ``kind``, its name in records;
``check(epochs)``, whether it fits a run; ``begins_at(steps_per_epoch)``, the update from which a run is not a dense
one any more; ``epochs_after``, which it adds to the run; and ``make(run)``, the `clicktrain_jax.methods.Method` of the
loop. A new one is a class here and a member of `MethodConfig`; those of single weights have a module of their own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import optax

import clicktrain_jax as ct
from clicktrain_jax import methods
from clicktrain_jax.methods import Method
from experiments.configs.clicktrain import PruneConfig
from experiments.configs.run import Run, check
from experiments.configs.single_weights import (
    GradualConfig,
    MagnitudeConfig,
    NOfMConfig,
    NOfMOnceConfig,
    RandomConfig,
    RiglConfig,
    SetConfig,
)


@dataclasses.dataclass(frozen=True)
class AdmmConfig:
    """ADMM between a dense run and its pruning: weights are pulled to the nearest pruned ones.

    The patterns are those that the run is pruned with (PatDNN takes the most frequent ones of the dense net's weights).

    Attributes:
        epochs: how long, after the dense run.
        rho: weight of the penalty at first.
        rho_factor: times so much at every stage.
        stages: equal parts of the epochs.
        every_updates: projections and dual variables are renewed after so many updates.
        learning_rate: constant all along.
    """

    epochs: int
    rho: float = 1e-3
    rho_factor: float = 10.0
    stages: int = 3
    every_updates: int = 100
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        for field in ("epochs", "stages", "every_updates"):
            check("admm", getattr(self, field), field, 1)
        for field in ("rho", "learning_rate", "rho_factor"):
            if not (getattr(self, field) > 0 and math.isfinite(getattr(self, field))):
                raise ValueError(f"admm.{field}={getattr(self, field)}: expected a positive number")


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
    """Epochs after a dense run (and its ADMM), with the masks on.

    Attributes:
        epochs: how many; 0 to prune at the very end and train no more.
        schedule: "rewind": the learning rate of as many last epochs of the dense schedule once more (Renda et al.
            2020). "cosine": from ``learning_rate`` to zero.
        learning_rate: of "cosine".
    """

    epochs: int
    schedule: Literal["rewind", "cosine"] = "rewind"
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        check("retrain", self.epochs, "epochs", 0)
        if (self.schedule == "cosine") != (self.learning_rate is not None):
            raise ValueError(
                f"retrain.learning_rate={self.learning_rate} with schedule={self.schedule!r}: it is for "
                "'cosine', which needs it"
            )
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"retrain.learning_rate={self.learning_rate}: expected a positive number")


@dataclasses.dataclass(frozen=True)
class AfterConfig:
    """Pruning after training: a dense run, ADMM perhaps, the prune, and epochs under the masks.

    Attributes:
        prune: what is pruned; its epochs are where the dense ones and those of ADMM end.
        retrain: epochs after it.
        admm: ADMM epochs before it.
    """

    kind: ClassVar[str] = "pruning after training"

    prune: PruneConfig
    retrain: RetrainConfig
    admm: AdmmConfig | None = None

    @property
    def epochs_after(self) -> int:
        """ADMM's and retraining's."""
        return self.retrain.epochs + (0 if self.admm is None else self.admm.epochs)

    def check(self, epochs: int) -> None:
        """Raise a ValueError where the prune does not come at the end, or retraining rewinds past the begin."""
        after = epochs + (self.admm.epochs if self.admm else 0)
        if not self.prune.select_epoch == self.prune.prune_epoch == after:
            raise ValueError(
                f"prune.select_epoch={self.prune.select_epoch}, prune.prune_epoch={self.prune.prune_epoch} with "
                f"retrain: expected both {after}, where the dense epochs and those of ADMM end"
            )
        if self.retrain.schedule == "rewind" and self.retrain.epochs > epochs:
            raise ValueError(
                f"retrain.epochs={self.retrain.epochs} with 'rewind': expected at most the dense run's {epochs}"
            )

    def begins_at(self, steps_per_epoch: int) -> int:
        """The begin of ADMM, or the prune."""
        before = 0 if self.admm is None else self.admm.epochs * steps_per_epoch
        return self.prune.begins_at(steps_per_epoch) - before

    def make(self, run: Run) -> Method:
        """ADMM's pull around the optimizer; select and prune are the trainer's affair."""
        optimizer = run.inner
        if self.admm is not None:
            begin, length = run.epochs * run.steps_per_epoch, self.admm.epochs * run.steps_per_epoch
            jumps = {length * stage // self.admm.stages: self.admm.rho_factor for stage in range(1, self.admm.stages)}
            optimizer = methods.admm(
                run.inner,
                run.prune_plan,
                patterns=ct.patterns.fixed_set(self.prune.num_patterns),
                rho=optax.piecewise_constant_schedule(self.admm.rho, jumps),
                every=self.admm.every_updates,
                begin_step=begin,
                end_step=begin + length,
            )
        return Method(optimizer, begins_at=self.begins_at(run.steps_per_epoch), epochs_after=self.epochs_after)


@dataclasses.dataclass(frozen=True)
class ChannelConfig:
    """PruneTrain (Lym et al. 2019): a group lasso on whole channels, and a smaller net every few epochs.

    Attributes:
        ratio: the lasso's share of the loss at the first update, which fixes its coefficient.
        every_epochs: the net is reconfigured after so many.
        threshold: smaller weights count as zero.
        multiple: channels kept are rounded up to a multiple of it.
    """

    kind: ClassVar[str] = "prunetrain"
    epochs_after: ClassVar[int] = 0

    ratio: float = 0.2
    every_epochs: int = 10
    threshold: float = 1e-4
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"channels.ratio={self.ratio}: expected a share between 0 and 1")
        check("channels", self.every_epochs, "every_epochs", 1)
        check("channels", self.multiple, "multiple", 1)
        check("channels", self.threshold, "threshold", 0)

    def check(self, epochs: int) -> None:
        """It fits every run."""

    def begins_at(self, steps_per_epoch: int) -> int:
        """At once."""
        return 0

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.prunetrain`; reconfigurations are the trainer's affair."""
        return Method(methods.prunetrain(run.inner, run.nodes(), ratio=self.ratio))


# One field of a run's config (`experiments.configs.base.TrainConfig`).
MethodConfig = (
    PruneConfig
    | AfterConfig
    | MagnitudeConfig
    | GradualConfig
    | RiglConfig
    | SetConfig
    | RandomConfig
    | NOfMConfig
    | NOfMOnceConfig
    | ChannelConfig
)
KINDS: dict[str, type] = {cls.kind: cls for cls in MethodConfig.__args__}


def of_five_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with ``method``, made of the fields prune, admm, retrain, sparse and channels that it had before.

    Raises:
        ValueError: more than one method.
    """
    new = dict(stored)
    old = {field: new.pop(field, None) for field in ("prune", "admm", "retrain", "sparse", "channels")}
    given = [field for field in ("prune", "sparse", "channels") if old[field] is not None]
    if "method" in stored:
        return dict(stored)
    if not given:
        return new
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are methods of their own: a run has one of them")
    values = dict(old[given[0]])
    if old["retrain"] is not None:
        values = {"kind": AfterConfig.kind, "prune": values, "retrain": old["retrain"], "admm": old["admm"]}
    elif given == ["sparse"]:
        kind = values["method"]
        fields = {field.name for field in dataclasses.fields(KINDS[kind])}
        values = {"kind": kind, **{key: value for key, value in values.items() if key in fields}}
    else:
        values["kind"] = PruneConfig.kind if given == ["prune"] else ChannelConfig.kind
    return new | {"method": values}
