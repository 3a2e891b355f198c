"""What a run may do beside or instead of ClickTrain's phases: the methods that it is compared with."""

import dataclasses
import math
from typing import Literal


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
class SparseConfig:
    """Unstructured sparse training, and 2:4.

    Attributes:
        method: "gradual": magnitude pruning along a cubic (Zhu and Gupta 2017). "rigl": drop and grow (Evci et al.
            2020). "n_of_m": 2 of every 4 input channels with a straight-through estimator (Zhou et al. 2021).
        compression: over all convolutions; None for "n_of_m", which has its own.
        distribution: of the weights kept over the layers: "uniform" shares, or Erdos-Renyi-Kernel, "erk".
        begin_epoch: of "gradual".
        end_epoch: masks change no more from here on; not for "n_of_m".
        every_updates: masks change after so many; not for "n_of_m".
        drop_fraction: share of the weights kept that "rigl" exchanges at first.
        decay: of masked weights in "n_of_m".
    """

    method: Literal["gradual", "rigl", "n_of_m"]
    compression: float | None = None
    distribution: Literal["uniform", "erk"] = "uniform"
    begin_epoch: int = 0
    end_epoch: int = 1
    every_updates: int = 100
    drop_fraction: float = 0.3
    decay: float = 2e-4

    def __post_init__(self) -> None:
        if (self.method == "n_of_m") != (self.compression is None):
            raise ValueError(
                f"sparse.compression={self.compression} with method={self.method!r}: 'n_of_m' has its own, the others "
                "need one"
            )
        if self.compression is not None:
            _check("sparse", self.compression, "compression", 1)
        _check("sparse", self.every_updates, "every_updates", 1)
        _check("sparse", self.drop_fraction, "drop_fraction", 0, 1)
        _check("sparse", self.decay, "decay", 0)
        if not 0 <= self.begin_epoch < self.end_epoch:
            raise ValueError(
                f"sparse.begin_epoch={self.begin_epoch}, sparse.end_epoch={self.end_epoch}: expected 0 <= begin < end"
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
