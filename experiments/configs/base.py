"""What a training run is: frozen dataclasses, validated when made.

Durations are in epochs here (the field names say so) and become optimizer updates once, in
`experiments.train.step`.
"""

import dataclasses
import math
from typing import Literal

from experiments.configs.methods import AdmmConfig, ChannelConfig, RetrainConfig, SparseConfig
from experiments.data import DataConfig


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
        importance: criterion of the selection.
        tile: (filters, channels) that share one pattern and one removal; None for all.
        target: compression to reach, 8.0 for 8x, instead of fractions.
        target_of: what is counted: the weights of all convolutions, of the whole model, or multiply-adds.
        reselect_epoch: masks are chosen a second time at this epoch's first update; None for never.
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

    fractions: tuple[float, ...]
    coeff: float
    select_epoch: int
    prune_epoch: int
    num_patterns: int = 4
    importance: Literal["taylor", "group_taylor", "magnitude", "random"] = "taylor"
    tile: tuple[int | None, int | None] = (1, 1)
    target: float | None = None
    target_of: Literal["convolutions", "model", "multiply_adds"] = "convolutions"
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
        if not all(0 <= fraction < 1 for fraction in self.fractions):
            raise ValueError(f"prune.fractions={self.fractions}: one is outside [0, 1)")
        if not 0 <= self.coeff < math.inf:
            raise ValueError(f"prune.coeff={self.coeff}: expected a finite number >= 0")
        if self.patterns == "fixed" and (self.entries != 4 or self.centre or self.per_layer):
            raise ValueError("prune.entries, centre and per_layer are for generated patterns, not for 'fixed'")
        if self.importance_steps < 1:
            raise ValueError(f"prune.importance_steps={self.importance_steps}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How the host runs it; changes neither the data nor the mathematics.

    Attributes:
        epoch_program: "scan": an epoch is one compiled loop on the device, or several of 512 updates at most; the epoch
            of a selection, and a smaller last batch, are called update by update. "steps": all updates are. "auto":
            scan, but steps on a CPU, where an epoch can take minutes: the progress bar moves and Ctrl-C is heeded
            between updates, at no measurable cost.
        convolution: "xla": `flax.linen.Conv`. "direct": `pallas_kernels.dense_conv`, XLA's without its slow cases on a
            CPU. "patches": `clicktrain_jax.models.PatchConv`, for compiled loops on a CPU, where XLA's is far slower.
            "auto": on a CPU patches in a loop and direct otherwise, elsewhere xla.
        pruned_convolution: how the pruned phase runs its convolutions. "dense": as before, under masks. "pattern": by
            `pallas_kernels.pattern_conv`, where a layer should gain by it. "pattern_hwnc": so, with the batch inside.
            "auto": whichever is the fastest on whole updates, measured at the phase's begin and cached; a run whose
            masks promise no gain, such as those of the paper's form on a CPU, stays dense.
        checkpoint_every_epochs: save after every so many epochs, and after the last; a resumed run repeats the
            epochs since.
        keep_checkpoints: how many of the newest epochs' checkpoints stay on disk.
        eval_every_epochs: evaluate after every so many epochs, and after the last.
        progress: show a progress bar.
        tensorboard: write TensorBoard events too (needs tensorboardX).
    """

    epoch_program: Literal["auto", "scan", "steps"] = "auto"
    convolution: Literal["auto", "xla", "direct", "patches"] = "auto"
    pruned_convolution: Literal["auto", "dense", "pattern", "pattern_hwnc"] = "auto"
    checkpoint_every_epochs: int = 1
    keep_checkpoints: int = 2
    eval_every_epochs: int = 1
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in ("checkpoint_every_epochs", "keep_checkpoints", "eval_every_epochs"):
            if getattr(self, field) < 1:
                raise ValueError(f"loop.{field}={getattr(self, field)}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: the recipe's name.
        net: one of `clicktrain_jax.models.names()`.
        width: multiplies every width of the net.
        dropout: the net's dropout rate; None for its own (0.5 in the VGGs).
        data: which images.
        epochs: length of the run, or of the dense run that ``admm`` and ``retrain`` come after.
        batch_size: images an update.
        partial_batch: what becomes of an epoch's last, smaller batch (391 updates a CIFAR epoch at 128). "keep": it is
            run, as the published recipes have it; on a GPU, where one program does all batches, it is filled with the
            first images of the next epoch. "partial": smaller on a GPU too, at the price of another program. "fill":
            filled on a CPU too. "drop": left out (390 updates).
        learning_rate: at the start.
        lr_schedule: "step": times lr_gamma at each milestone. "cosine": to zero over the run, after a linear
            warm-up of one tenth of it.
        lr_milestones: epochs, for "step".
        lr_gamma: factor at a milestone.
        momentum: of SGD, not Nesterov.
        weight_decay: on every parameter, BatchNorm's too.
        crop_padding: pixels of zero padding for random crops; 0 for no crops.
        flip: random horizontal flips.
        mixup_alpha: of mixup's Beta distribution; 0 for no mixup.
        mixup_epoch: mixup is on from this epoch, in pruned and in dense runs alike; None for never.
        precision: what the net computes in; parameters, optimizer and losses stay float32.
        seed: decides initialisation, order of images, augmentation, dropout and mixup.
        prune: None trains dense.
        admm: ADMM epochs after the dense ones; the masks are chosen at their end.
        retrain: epochs after these, with the masks on.
        sparse: another kind of sparse training instead of ``prune``.
        channels: PruneTrain instead of ``prune``.
        loop: how the host runs it.
        expected: what is published about the run; `python -m experiments list` shows it beside what was measured.
    """

    name: str
    net: str
    epochs: int
    data: DataConfig = DataConfig()
    width: float = 1.0
    dropout: float | None = None
    batch_size: int = 128
    partial_batch: Literal["keep", "partial", "fill", "drop"] = "keep"
    learning_rate: float = 0.1
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_milestones: tuple[int, ...] = ()
    lr_gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    flip: bool = True
    mixup_alpha: float = 0.3
    mixup_epoch: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    prune: PruneConfig | None = None
    admm: AdmmConfig | None = None
    retrain: RetrainConfig | None = None
    sparse: SparseConfig | None = None
    channels: ChannelConfig | None = None
    loop: LoopConfig = LoopConfig()
    expected: str = "not published"

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: expected at least 1")
        for field in ("learning_rate", "width"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field}={value}: expected a positive number")
        for field in ("mixup_alpha", "weight_decay", "crop_padding", "momentum"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)}: expected 0 or more")
        if self.lr_schedule == "cosine" and self.lr_milestones:
            raise ValueError(f"lr_milestones={self.lr_milestones} with lr_schedule='cosine': they are for 'step'")
        if not all(0 < milestone for milestone in self.lr_milestones) or not self.lr_gamma > 0:
            raise ValueError(f"lr_milestones={self.lr_milestones}, lr_gamma={self.lr_gamma}: expected positive numbers")
        if self.mixup_epoch is not None and self.mixup_epoch < 0:
            raise ValueError(f"mixup_epoch={self.mixup_epoch}: expected 0 or more, or None for never")
        if self.admm is not None and self.retrain is None:
            raise ValueError("admm without retrain: say how long the pruned net is trained (retrain.epochs, 0 for not)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected 0 to 2**32 - 1")
        if self.retrain is not None:
            self._check_pruning_after()
        elif self.prune is not None and self.prune.prune_epoch >= self.epochs:
            raise ValueError(
                f"prune.prune_epoch={self.prune.prune_epoch} is not before epochs={self.epochs}: nothing would be "
                "pruned; lengthen the run or prune earlier"
            )
        if sum(part is not None for part in (self.prune, self.sparse, self.channels)) > 1:
            raise ValueError("prune, sparse and channels are methods of their own: give one of them")
        if self.sparse is not None and self.sparse.method != "n_of_m" and self.sparse.end_epoch > self.epochs:
            raise ValueError(f"sparse.end_epoch={self.sparse.end_epoch} is after the last of epochs={self.epochs}")

    def _check_pruning_after(self) -> None:
        if self.prune is None:
            raise ValueError("retrain without prune: there is nothing to prune before retraining")
        after = self.epochs + (self.admm.epochs if self.admm else 0)
        if not self.prune.select_epoch == self.prune.prune_epoch == after:
            raise ValueError(
                f"prune.select_epoch={self.prune.select_epoch}, prune.prune_epoch={self.prune.prune_epoch} with "
                f"retrain: expected both {after}, where the dense epochs and those of ADMM end"
            )
        if self.retrain.schedule == "rewind" and self.retrain.epochs > self.epochs:
            raise ValueError(
                f"retrain.epochs={self.retrain.epochs} with 'rewind': expected at most the dense run's {self.epochs}"
            )

    @property
    def total_epochs(self) -> int:
        """Length of the whole run: the dense epochs, ADMM's and retraining's."""
        return self.epochs + sum(part.epochs for part in (self.admm, self.retrain) if part is not None)


# Fields that are no more, with the value that meant nothing: records that have it stay readable.
_RETIRED = {"PruneConfig": {"reorder": False}}


def to_dict(config: TrainConfig) -> dict:
    """Plain data, as it is written to config.json (tuples become lists there)."""
    return dataclasses.asdict(config)


def from_dict(data: dict) -> TrainConfig:
    """The inverse of `to_dict`.

    Raises:
        ValueError: fields that do not exist in this version, or are missing.
    """

    def build(cls: type, values: dict) -> object:
        known = {field.name for field in dataclasses.fields(cls)}
        retired = _RETIRED.get(cls.__name__, {})
        values = {key: value for key, value in values.items() if key not in retired or value != retired[key]}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown config field {unknown[0]!r} for {cls.__name__}; known: {sorted(known)}")
        parts = {
            "data": DataConfig, "loop": LoopConfig, "prune": PruneConfig, "admm": AdmmConfig,
            "retrain": RetrainConfig, "sparse": SparseConfig, "channels": ChannelConfig,
        }
        fields = {}
        for key, value in values.items():
            if cls is TrainConfig and key in parts and value is not None:
                value = build(parts[key], value)
            elif isinstance(value, list):
                value = tuple(value)
            fields[key] = value
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    return build(TrainConfig, data)
