"""What a run may do to prune its net: ClickTrain, and the methods that it is compared with. One class a method.

Each is plain data, checked when it is made, with five things more that a run asks for: ``kind``, its name in records;
``check(epochs)``, whether it fits a run; ``begins_at(steps_per_epoch)``, the update from which a run is not a dense
one any more; ``epochs_after``, which it adds to the run; and ``make(run)``, the `clicktrain_jax.methods.Method` of the
loop. A new one is a class here and a member of `MethodConfig`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import clicktrain_jax as ct
from clicktrain_jax import methods
from clicktrain_jax.methods import Method
from clicktrain_jax.trees import named_leaves
from experiments.configs.clicktrain import PruneConfig


class Run(NamedTuple):
    """What a method may ask of the run that it is made for.

    Attributes:
        inner: the plain optimizer.
        params: the net's, as `jax.ShapeDtypeStruct`.
        plan: of all prunable convolutions, for methods that read no fractions of it.
        prune_plan: of the config's `PruneConfig`; None without one.
        nodes: finds the net's groups of channels (`clicktrain_jax.channels`).
        steps_per_epoch: updates.
        epochs: of the dense run.
    """

    inner: Any
    params: Any
    plan: ct.Plan
    prune_plan: ct.Plan | None
    nodes: Callable[[], Any]
    steps_per_epoch: int
    epochs: int


def masks_in_state(params: Any, opt_state: Any) -> ct.Masks:
    """For a `Method` whose state holds its masks."""
    return ct.masks_of(opt_state)


def _check(owner: str, value: float, field: str, low: float, high: float = math.inf) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        expected = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{owner}.{field}={value}: expected {expected}")


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
            _check("admm", getattr(self, field), field, 1)
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
        _check("retrain", self.epochs, "epochs", 0)
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
class SparseConfig:
    """What methods of masks of single weights have in common.

    Attributes:
        compression: over all convolutions.
        distribution: of the weights kept over the layers: "uniform" shares, or Erdos-Renyi-Kernel, "erk".
        end_epoch: masks change no more from here on.
        every_updates: masks change after so many.
    """

    kind: ClassVar[str]
    epochs_after: ClassVar[int] = 0

    compression: float
    distribution: Literal["uniform", "erk"] = "uniform"
    end_epoch: int = 1
    every_updates: int = 100

    def __post_init__(self) -> None:
        _check(self.kind, self.compression, "compression", 1)
        _check(self.kind, self.every_updates, "every_updates", 1)

    def check(self, epochs: int) -> None:
        """Raise a ValueError where the run ends before the masks are done."""
        if self.end_epoch > epochs:
            raise ValueError(f"{self.kind}.end_epoch={self.end_epoch} is after the last of epochs={epochs}")

    def densities(self, run: Run) -> dict[str, float]:
        """Shares of the planned layers, such that all convolutions together are compressed so much.

        Raises:
            ValueError: a compression that the prunable convolutions cannot reach.
        """
        total = sum(leaf.size for _, leaf in named_leaves(run.params) if len(leaf.shape) == 4)
        planned = sum(math.prod(layer.shape) for layer in run.plan.layers)
        retained = round(total / self.compression) - (total - planned)
        if not 0 < retained <= planned:
            raise ValueError(
                f"{self.kind}.compression={self.compression}: the layers that stay dense hold {total - planned} of "
                f"{total} weights; expected less than {total / max(total - planned, 1):.2f}"
            )
        return methods.densities(run.plan, retained, self.distribution)


@dataclasses.dataclass(frozen=True)
class GradualConfig(SparseConfig):
    """Magnitude pruning of single weights along a cubic (Zhu and Gupta 2017).

    Attributes:
        begin_epoch: density falls from here on.
    """

    kind: ClassVar[str] = "gradual"

    begin_epoch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.begin_epoch < self.end_epoch:
            raise ValueError(
                f"gradual.begin_epoch={self.begin_epoch}, gradual.end_epoch={self.end_epoch}: expected 0 <= begin < end"
            )

    def begins_at(self, steps_per_epoch: int) -> int:
        """Where density begins to fall."""
        return self.begin_epoch * steps_per_epoch

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.gradual_magnitude`."""
        begin = self.begins_at(run.steps_per_epoch)
        optimizer = methods.gradual_magnitude(
            run.inner,
            run.plan,
            densities=self.densities(run),
            begin_step=begin,
            end_step=self.end_epoch * run.steps_per_epoch,
            every=self.every_updates,
        )
        return Method(optimizer, masks=masks_in_state, begins_at=begin)


@dataclasses.dataclass(frozen=True)
class RiglConfig(SparseConfig):
    """Sparse from the first update on, weights drop and grow (Evci et al. 2020).

    Attributes:
        drop_fraction: share of the weights kept that are exchanged at first.
    """

    kind: ClassVar[str] = "rigl"

    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.kind, self.end_epoch, "end_epoch", 1)
        _check(self.kind, self.drop_fraction, "drop_fraction", 0, 1)

    def begins_at(self, steps_per_epoch: int) -> int:
        """At once."""
        return 0

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.rigl`."""
        settings = {
            "densities": self.densities(run),
            "end_step": self.end_epoch * run.steps_per_epoch,
            "every": self.every_updates,
            "drop_fraction": self.drop_fraction,
        }
        optimizer = seeded_by_weights(lambda key: methods.rigl(run.inner, run.plan, key=key, **settings))
        return Method(optimizer, masks=masks_in_state)


@dataclasses.dataclass(frozen=True)
class NOfMConfig:
    """2 of every 4 input channels, with a straight-through estimator (Zhou et al. 2021).

    Attributes:
        decay: of masked weights.
    """

    kind: ClassVar[str] = "n_of_m"
    epochs_after: ClassVar[int] = 0

    decay: float = 2e-4

    def __post_init__(self) -> None:
        _check(self.kind, self.decay, "decay", 0)

    def check(self, epochs: int) -> None:
        """It fits every run."""

    def begins_at(self, steps_per_epoch: int) -> int:
        """At once."""
        return 0

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.straight_through` in the loss; the masks are read from the weights."""
        return Method(
            run.inner,
            forward=lambda params: methods.straight_through(params, run.plan, decay=self.decay),
            masks=lambda params, opt_state: methods.n_of_m_masks(params, run.plan),
        )


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
        _check("channels", self.every_epochs, "every_epochs", 1)
        _check("channels", self.multiple, "multiple", 1)
        _check("channels", self.threshold, "threshold", 0)

    def check(self, epochs: int) -> None:
        """It fits every run."""

    def begins_at(self, steps_per_epoch: int) -> int:
        """At once."""
        return 0

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.prunetrain`; reconfigurations are the trainer's affair."""
        return Method(methods.prunetrain(run.inner, run.nodes(), ratio=self.ratio))


# One field of a run's config (`experiments.configs.base.TrainConfig`).
MethodConfig = PruneConfig | AfterConfig | GradualConfig | RiglConfig | NOfMConfig | ChannelConfig
KINDS: dict[str, type] = {cls.kind: cls for cls in MethodConfig.__args__}


def seeded_by_weights(make: Callable[[Any], Any]) -> Any:
    """A method with random masks that depend on the run's first weights: one program serves all seeds.

    Args:
        make: key -> transformation.
    """

    def init(params: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(jax.tree.leaves(params)[-1].astype(jnp.float32), jnp.uint32)
        return make(jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32))).init(params)

    return optax.GradientTransformationExtraArgs(init, make(jax.random.key(0)).update)


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
