"""ClickTrain's own settings: what goes, in what shapes, and when."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from clicktrain_jax.importance import CRITERIA
from clicktrain_jax.methods import Method

# "random": masks of like shapes that know nothing.
Importance = Literal[(*CRITERIA, "random")]


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """How ClickTrain prunes a run. The defaults are the choices of the authors' code.

    Attributes:
        fractions: share of kernels to remove in each prunable convolution, in network order (first
            convolution and shortcuts left out), or a single number for all of them; each in [0, 1). Empty when
            ``target`` decides.
        coeff: weight of the group lasso in the loss.
        select_epoch: masks are chosen at this epoch's first update.
        prune_epoch: masked weights are zero from this epoch's first update on; at select_epoch, from the update after
            the selecting one on. Where no update is left for it, both fall on the run's last updates.
        num_patterns: size of the pattern set; 4, 8 or 12 of the published one.
        importance: criterion of the selection: one of `clicktrain_jax.importance.CRITERIA`, or "random".
        tile: (filters, channels) that share one pattern and one removal; None for all.
        target: compression to reach, 8.0 for 8x, instead of fractions.
        target_of: what is counted: the weights of all convolutions, of the whole model, multiply-adds, or the
            seconds of a call of the net for inference on this device, "latency".
        reselect_epoch: masks are chosen a second time at this epoch's first update; None for never.
        reselect_every_epochs: masks are chosen anew so many epochs after each selection, until the prune: what was
            marked and has grown since stays. None for never.
        coeff_ramp_epochs: the lasso's weight rises from 0 to ``coeff`` in so many epochs after the selection.
        latency_batch: images a call for "latency", whose layers the run measures as it begins (and caches).
        patterns: "fixed": the published set. "coverage", "frequency": generated at the selection. "all": every
            pattern of ``entries`` taps (126 of 4), whatever ``num_patterns`` says.
        entries: taps that a generated pattern keeps.
        centre: generated patterns all keep the centre tap.
        per_layer: a set for each layer; otherwise one for the net.
        importance_steps: scores are the mean over so many updates, the selecting one being the last.
        removal_tile: (filters, channels) that are removed together; None for ``tile``.
        superset: each tile keeps so many taps, and every kernel in it its own pattern among them; None for off.
        quads: the patterns of 4 neighbouring input channels are chosen jointly, 2:4 sparse at every tap.
        removal_score: kernels compete by their "whole" score or by what their pattern has "retained".
        removal_scope: kernels compete within the "layer", or the same share goes in each "filter" or each "tile".
        floor: no filter and no input channel is emptied; None: on with a target, off with fractions.
    """

    kind: ClassVar[str] = "clicktrain"
    epochs_after: ClassVar[int] = 0

    fractions: tuple[float, ...]
    coeff: float
    select_epoch: int
    prune_epoch: int
    num_patterns: int = 4
    importance: Importance = "taylor"
    tile: tuple[int | None, int | None] = (1, 1)
    target: float | None = None
    target_of: Literal["convolutions", "model", "multiply_adds", "latency"] = "convolutions"
    reselect_epoch: int | None = None
    patterns: Literal["fixed", "coverage", "frequency", "all"] = "fixed"
    entries: int = 4
    centre: bool = False
    per_layer: bool = False
    importance_steps: int = 1
    removal_tile: tuple[int | None, int | None] | None = None
    superset: int | None = None
    quads: bool = False
    removal_score: Literal["whole", "retained"] = "whole"
    removal_scope: Literal["layer", "filter", "tile"] = "layer"
    floor: bool | None = None
    reselect_every_epochs: int | None = None
    coeff_ramp_epochs: int = 0
    latency_batch: int = 8

    def __post_init__(self) -> None:
        if bool(self.fractions) == (self.target is not None):
            raise ValueError(
                f"prune.fractions={self.fractions}, prune.target={self.target}: give one fraction, or one for each "
                "prunable convolution, or else leave them empty and give a target"
            )
        if not 0 <= self.select_epoch <= self.prune_epoch:
            raise ValueError(
                f"prune.select_epoch={self.select_epoch}, prune.prune_epoch={self.prune_epoch}: "
                "expected 0 <= select_epoch <= prune_epoch"
            )
        if self.reselect_epoch is not None and not self.select_epoch < self.reselect_epoch < self.prune_epoch:
            raise ValueError(
                f"prune.reselect_epoch={self.reselect_epoch}: expected it between select_epoch={self.select_epoch} "
                f"and prune_epoch={self.prune_epoch}"
            )
        if self.reselect_every_epochs is not None and (
            self.reselect_every_epochs < 1 or self.reselect_epoch is not None
        ):
            raise ValueError(
                f"prune.reselect_every_epochs={self.reselect_every_epochs}: expected 1 or more, and no reselect_epoch "
                f"beside it, got {self.reselect_epoch}"
            )
        if self.coeff_ramp_epochs < 0 or self.latency_batch < 1:
            raise ValueError(
                f"prune.coeff_ramp_epochs={self.coeff_ramp_epochs}, prune.latency_batch={self.latency_batch}: expected "
                "0 or more, and 1 or more"
            )
        if not all(0 <= fraction < 1 for fraction in self.fractions):
            raise ValueError(f"prune.fractions={self.fractions}: one is outside [0, 1)")
        if not 0 <= self.coeff < math.inf:
            raise ValueError(f"prune.coeff={self.coeff}: expected a finite number >= 0")
        if self.patterns == "fixed" and (self.entries != 4 or self.centre or self.per_layer):
            raise ValueError("prune.entries, centre and per_layer are for generated patterns, not for 'fixed'")
        if self.importance_steps < 1:
            raise ValueError(f"prune.importance_steps={self.importance_steps}: expected at least 1")

    def check(self, epochs: int) -> None:
        """Raise a ValueError where a run of so many epochs would not come to its prune."""
        if self.prune_epoch >= epochs:
            raise ValueError(
                f"prune.prune_epoch={self.prune_epoch} is not before epochs={epochs}: nothing would be pruned; "
                "lengthen the run or prune earlier"
            )

    def begins_at(self, steps_per_epoch: int) -> int:
        """The first update whose scores count."""
        return max(0, self.select_epoch * steps_per_epoch - (self.importance_steps - 1))

    def make(self, run: Any) -> Method:
        """The plain optimizer: the phases are the trainer's affair (`experiments.train.step`)."""
        return Method(run.inner, begins_at=self.begins_at(run.steps_per_epoch))
