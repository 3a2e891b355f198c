"""Configs of the methods that mask single weights: which stay is chosen once, along the run, or at random."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from clicktrain_jax import methods
from clicktrain_jax.methods import Method
from clicktrain_jax.trees import named_leaves
from experiments.configs.run import Run, check, masks_in_state


@dataclasses.dataclass(frozen=True)
class _Sparse:
    """What these have in common.

    Attributes:
        compression: over all convolutions.
        distribution: of the weights kept over the layers: "uniform" shares, or Erdos-Renyi-Kernel, "erk".
    """

    kind: ClassVar[str]
    epochs_after: ClassVar[int] = 0

    compression: float
    distribution: Literal["uniform", "erk"] = "uniform"

    def __post_init__(self) -> None:
        check(self.kind, self.compression, "compression", 1)

    def check(self, epochs: int) -> None:
        """Raise a ValueError where the run ends before the masks are done."""
        end = getattr(self, "end_epoch", 0)
        if end > epochs:
            raise ValueError(f"{self.kind}.end_epoch={end} is after the last of epochs={epochs}")

    @property
    def masks_stand_from(self) -> int:
        """The epoch from which on masks change no more."""
        return getattr(self, "end_epoch", 0)

    def begins_at(self, steps_per_epoch: int) -> int:
        """At once."""
        return 0


@dataclasses.dataclass(frozen=True)
class _Once:
    """What goes at one epoch's begin, and never again.

    Attributes:
        prune_epoch: whose first update makes it zero.
    """

    kind: ClassVar[str]
    epochs_after: ClassVar[int] = 0

    prune_epoch: int = 0

    def __post_init__(self) -> None:
        check(self.kind, self.prune_epoch, "prune_epoch", 0)

    @property
    def masks_stand_from(self) -> int:
        """The epoch after the prune's."""
        return self.prune_epoch + 1

    def check(self, epochs: int) -> None:
        """Raise a ValueError where the run ends before the prune."""
        if self.prune_epoch >= epochs:
            raise ValueError(f"{self.kind}.prune_epoch={self.prune_epoch}: expected less than epochs={epochs}")

    def begins_at(self, steps_per_epoch: int) -> int:
        """The prune."""
        return self.prune_epoch * steps_per_epoch


@dataclasses.dataclass(frozen=True)
class RandomConfig(_Sparse):
    """Masks drawn once, before the first update (Liu et al. 2022)."""

    kind: ClassVar[str] = "random"

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.random`."""
        shares = _densities(self, run)
        optimizer = _seeded_by_weights(lambda key: methods.random(run.inner, run.plan, key=key, densities=shares))
        return Method(optimizer, masks=masks_in_state)


@dataclasses.dataclass(frozen=True)
class MagnitudeConfig(_Once, _Sparse):
    """The smallest weights go at one epoch's begin (Han et al. 2015).

    Attributes:
        compression, distribution: as in `RandomConfig`.
        prune_epoch: whose first update makes them zero.
    """

    kind: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        _Sparse.__post_init__(self)
        _Once.__post_init__(self)

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.magnitude`."""
        begin = self.begins_at(run.steps_per_epoch)
        optimizer = methods.magnitude(run.inner, run.plan, prune_step=begin, densities=_densities(self, run))
        return Method(optimizer, masks=masks_in_state, begins_at=begin)


@dataclasses.dataclass(frozen=True)
class GradualConfig(_Sparse):
    """Magnitude pruning of single weights along a cubic (Zhu and Gupta 2017).

    Attributes:
        compression, distribution: as in `RandomConfig`.
        begin_epoch: density falls from here on.
        end_epoch: masks change no more from here on.
        every_updates: masks change after so many.
    """

    kind: ClassVar[str] = "gradual"

    begin_epoch: int = 0
    end_epoch: int = 1
    every_updates: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.kind, self.every_updates, "every_updates", 1)
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
            densities=_densities(self, run),
            begin_step=begin,
            end_step=self.end_epoch * run.steps_per_epoch,
            every=self.every_updates,
        )
        return Method(optimizer, masks=masks_in_state, begins_at=begin)


@dataclasses.dataclass(frozen=True)
class RiglConfig(_Sparse):
    """Sparse from the first update on, weights drop and grow (Evci et al. 2020).

    Attributes:
        compression, distribution: as in `RandomConfig`.
        end_epoch: masks change no more from here on.
        every_updates: masks change after so many.
        drop_fraction: share of the weights kept that are exchanged at first.
    """

    kind: ClassVar[str] = "rigl"
    _function: ClassVar[Callable[..., Any]] = staticmethod(methods.rigl)

    end_epoch: int = 1
    every_updates: int = 100
    drop_fraction: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.kind, self.every_updates, "every_updates", 1)
        check(self.kind, self.end_epoch, "end_epoch", 1)
        check(self.kind, self.drop_fraction, "drop_fraction", 0, 1)

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.rigl`, or the one of the kind."""
        settings = {
            "densities": _densities(self, run),
            "end_step": self.end_epoch * run.steps_per_epoch,
            "every": self.every_updates,
            "drop_fraction": self.drop_fraction,
        }
        optimizer = _seeded_by_weights(lambda key: self._function(run.inner, run.plan, key=key, **settings))
        return Method(optimizer, masks=masks_in_state)


@dataclasses.dataclass(frozen=True)
class SetConfig(RiglConfig):
    """As RigL, but what grows is drawn at random (Mocanu et al. 2018), by the same draw in runs of all seeds."""

    kind: ClassVar[str] = "set"
    _function: ClassVar[Callable[..., Any]] = staticmethod(methods.sparse_evolutionary)


@dataclasses.dataclass(frozen=True)
class NOfMOnceConfig(_Once):
    """2 of every 4 input channels, chosen once by magnitude (Mishra et al. 2021).

    Attributes:
        prune_epoch: whose first update makes the others zero.
    """

    kind: ClassVar[str] = "n_of_m_once"

    def make(self, run: Run) -> Method:
        """`clicktrain_jax.methods.n_of_m`."""
        begin = self.begins_at(run.steps_per_epoch)
        optimizer = methods.n_of_m(run.inner, run.plan, prune_step=begin)
        return Method(optimizer, masks=masks_in_state, begins_at=begin)


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
        check(self.kind, self.decay, "decay", 0)

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


def _seeded_by_weights(make: Callable[[Any], Any]) -> Any:
    """A method with random masks that depend on the run's first weights: one program serves all seeds.

    Args:
        make: key -> transformation.
    """

    def init(params: Any) -> Any:
        bits = jax.lax.bitcast_convert_type(jax.tree.leaves(params)[-1].astype(jnp.float32), jnp.uint32)
        return make(jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32))).init(params)

    return optax.GradientTransformationExtraArgs(init, make(jax.random.key(0)).update)


def _densities(config: Any, run: Run) -> dict[str, float]:
    """Shares of the planned layers, such that all convolutions together are compressed so much.

    Raises:
        ValueError: a compression that the prunable convolutions cannot reach.
    """
    total = sum(leaf.size for _, leaf in named_leaves(run.params) if len(leaf.shape) == 4)
    planned = sum(math.prod(layer.shape) for layer in run.plan.layers)
    retained = round(total / config.compression) - (total - planned)
    if not 0 < retained <= planned:
        raise ValueError(
            f"{config.kind}.compression={config.compression}: the layers that stay dense hold {total - planned} of "
            f"{total} weights; expected less than {total / max(total - planned, 1):.2f}"
        )
    return methods.densities(run.plan, retained, config.distribution)
