"""What a training run is: frozen dataclasses, validated when made.

Durations are in epochs here (the field names say so) and become optimizer updates once, in
`experiments.train.step`.
"""

import dataclasses
import math
from typing import Literal

from experiments.configs.clicktrain import PruneConfig
from experiments.configs.methods import KINDS, AdmmConfig, ChannelConfig, MethodConfig, RetrainConfig, of_five_fields
from experiments.data import DataConfig


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How the host runs it; changes neither the data nor the mathematics.

    Attributes:
        epoch_program: "scan": an epoch is one compiled loop on the device, or several of 512 updates at most; the epoch
            of a selection, and a smaller last batch, are called update by update. "steps": all updates are. "auto":
            scan, but steps on a CPU, where an epoch can take minutes: the progress bar moves and Ctrl-C is heeded
            between updates, at no measurable cost; and steps for a streamed set.
        convolution: "xla": `flax.linen.Conv`. "direct": `pallas_kernels.dense_conv`, XLA's without its slow cases on a
            CPU. "patches": `clicktrain_jax.models.PatchConv`, for compiled loops on a CPU, where XLA's is far slower.
            "auto": on a CPU patches in a loop and direct otherwise, elsewhere xla.
        pruned_convolution: how the pruned phase runs its convolutions. "dense": as before, under masks. "pattern": by
            `pallas_kernels.pattern_conv`, where a layer should gain by it. "pattern_hwnc": so, with the batch inside.
            "auto": whichever is the fastest on whole updates, measured at the phase's begin and cached; a run whose
            masks promise no gain, such as those of the paper's form on a CPU, stays dense.
        checkpoint_every_epochs: save after every so many epochs, and after the last; a resumed run repeats the
            epochs since.
        checkpoint_every_steps: save within an epoch too, after every so many updates of it; None for not. A resumed run
            goes on from there; the place is kept in no more than one such checkpoint, and gone once the epoch is saved.
            Compiled loops (``epoch_program``) are left at their ends alone, so they save there.
        keep_checkpoints: how many of the newest epochs' checkpoints stay on disk.
        eval_every_epochs: evaluate after every so many epochs, and after the last.
        input_threads: threads that read and decode a streamed set; None for one a core, 16 at most.
        devices: how many are used, a batch divided over them; None for all that jax sees.
        ordered: what the ``shards`` of a batch say is summed in their order, whatever the number of devices that
            divides the shards; each device is sent as many gradients as there are shards. Equal bits want a compiler
            that fuses alike, too (JAX_DISABLE_MOST_OPTIMIZATIONS=1).
        compact_gradients: from the prune on the devices send each other the gradients of retained weights alone, in one
            reduction, for the same result. It wants ``shards``: statistics of a whole batch are summed, and gradients
            with them, where the compiler likes.
        coordinator: HOST:PORT of the first of several processes that are one run, each with the same command but for
            process_id; "auto": Slurm, Open MPI or Kubernetes tell all three. None for one process.
        processes: how many there are.
        process_id: which one this is, from 0; the first keeps the run folder.
        progress: show a progress bar.
        tensorboard: write TensorBoard events too (needs tensorboardX).
    """

    epoch_program: Literal["auto", "scan", "steps"] = "auto"
    convolution: Literal["auto", "xla", "direct", "patches"] = "auto"
    pruned_convolution: Literal["auto", "dense", "pattern", "pattern_hwnc"] = "auto"
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    keep_checkpoints: int = 2
    eval_every_epochs: int = 1
    input_threads: int | None = None
    devices: int | None = None
    ordered: bool = False
    compact_gradients: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in ("checkpoint_every_epochs", "keep_checkpoints", "eval_every_epochs"):
            if getattr(self, field) < 1:
                raise ValueError(f"loop.{field}={getattr(self, field)}: expected at least 1")
        if self.input_threads is not None and self.input_threads < 1:
            raise ValueError(f"loop.input_threads={self.input_threads}: expected at least 1, or None for one a core")
        if self.checkpoint_every_steps is not None and self.checkpoint_every_steps < 1:
            raise ValueError(
                f"loop.checkpoint_every_steps={self.checkpoint_every_steps}: expected at least 1, or None for none "
                "within epochs"
            )
        if self.devices is not None and self.devices < 1:
            raise ValueError(f"loop.devices={self.devices}: expected at least 1, or none for all that jax sees")
        told = self.coordinator, self.processes, self.process_id
        if self.coordinator in (None, "auto"):
            is_whole = told[1:] == (None, None)
        else:
            is_whole = None not in told and ":" in self.coordinator and 0 <= self.process_id < self.processes
        if not is_whole:
            raise ValueError(
                f"loop.coordinator={told[0]!r}, processes={told[1]}, process_id={told[2]}: expected HOST:PORT, a "
                "number of processes and one of 0 to processes - 1; or coordinator alone, 'auto'; or none of them"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: the recipe's name.
        net: one of `clicktrain_jax.models.names()`.
        width: multiplies every width of the net.
        dropout: the net's dropout rate; None for its own (0.5 in the VGGs).
        data: which images.
        epochs: length of the run, or of the dense run that is pruned after it.
        batch_size: images an update, over all devices.
        accumulate: a batch's gradient is the mean over so many smaller batches, one after the other, for batches that
            do not fit a device. BatchNorm normalises each by its own statistics; the running ones take their mean.
        shards: a batch, or each of those, is so many parts side by side, normalised by their own statistics likewise;
            1 for those of the whole batch, whatever the number of devices. As many as there are devices: per device.
        partial_batch: what becomes of an epoch's last, smaller batch (391 updates a CIFAR epoch at 128). "keep": it is
            run, as the published recipes have it; on a GPU, where one program does all batches, it is filled with the
            first images of the next epoch. "partial": smaller on a GPU too, at the price of another program. "fill":
            filled on a CPU too. "drop": left out (390 updates).
        learning_rate: at the start. It does not follow the batch size: for k times the batch k times the rate is
            customary, with a warm-up.
        lr_schedule: "step": times lr_gamma at each milestone. "cosine": to zero over the run, after a linear
            warm-up of one tenth of it.
        warmup_epochs: length of a linear warm-up from zero, for large batches; None for the schedule's own.
        lr_milestones: epochs, for "step".
        lr_gamma: factor at a milestone.
        momentum: of SGD, not Nesterov.
        weight_decay: on every parameter, BatchNorm's too.
        crop_padding: pixels of zero padding for random crops; 0 for no crops.
        flip: random horizontal flips.
        mixup_alpha: of mixup's Beta distribution; 0 for no mixup.
        mixup_epoch: mixup is on from this epoch, in pruned and in dense runs alike; None for never.
        precision: what the net computes in; parameters, optimizer and losses stay float32.
        label_smoothing: share of each label that is spread over all classes, in training.
        ema_epochs: the run ends with an exponential moving average of weights and statistics over so many last epochs,
            in which no mask changes; 0 for none. Epochs before the last are evaluated without it.
        ema_decay: of that average, an update.
        seed: decides initialisation, order of images, augmentation, dropout and mixup.
        method: how it is pruned: one of the configs of `experiments.configs.methods`; None trains dense.
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
    accumulate: int = 1
    shards: int = 1
    partial_batch: Literal["keep", "partial", "fill", "drop"] = "keep"
    learning_rate: float = 0.1
    lr_schedule: Literal["step", "cosine"] = "step"
    warmup_epochs: int | None = None
    lr_milestones: tuple[int, ...] = ()
    lr_gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop_padding: int = 4
    flip: bool = True
    mixup_alpha: float = 0.3
    mixup_epoch: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    label_smoothing: float = 0.0
    ema_epochs: int = 0
    ema_decay: float = 0.998
    seed: int = 0
    method: MethodConfig | None = None
    loop: LoopConfig = LoopConfig()
    expected: str = "not published"

    def __post_init__(self) -> None:
        for field in ("epochs", "batch_size", "accumulate", "shards"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: expected at least 1")
        if self.batch_size % (self.accumulate * self.shards):
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided into accumulate={self.accumulate} times "
                f"shards={self.shards} equal parts: expected a multiple of {self.accumulate * self.shards}"
            )
        if self.accumulate * self.shards > 1 and self.partial_batch == "partial":
            raise ValueError("partial_batch='partial' with accumulate or shards: the last batch would have other parts")
        if self.loop.ordered and self.shards == 1:
            raise ValueError("loop.ordered with shards=1: one sum has no order; set shards, to 8 say")
        if self.loop.compact_gradients and (self.shards == 1 or self.loop.ordered or self.prune is None):
            raise ValueError(
                f"loop.compact_gradients with shards={self.shards}, loop.ordered={self.loop.ordered} and method="
                f"{self.method and self.method.kind!r}: expected shards (one for each device, say), no order, and "
                "ClickTrain, whose prune takes gradients away"
            )
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: expected 0 to {self.epochs - 1}, or None")
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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected 0 to 2**32 - 1")
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing}, ema_decay={self.ema_decay}: expected shares in [0, 1)"
            )
        if self.method is not None:
            self.method.check(self.epochs)
        self._check_average()

    def _check_average(self) -> None:
        if not 0 <= self.ema_epochs <= self.total_epochs:
            raise ValueError(f"ema_epochs={self.ema_epochs}: expected 0 to the run's {self.total_epochs} epochs")
        if not self.ema_epochs or self.method is None:
            return
        begin = self.total_epochs - self.ema_epochs
        # The epoch from which masks stand; None for a method that goes on changing them, or the net.
        fixed = self.prune.prune_epoch + 1 if self.prune else getattr(self.method, "masks_stand_from", None)
        if fixed is None:
            raise ValueError(f"ema_epochs={self.ema_epochs} with {self.method.kind}: its masks never stand still")
        if begin < fixed:
            raise ValueError(
                f"ema_epochs={self.ema_epochs} begins in epoch {begin}, and the masks change until epoch {fixed}: "
                f"average over at most {self.total_epochs - fixed} epochs"
            )

    @property
    def prune(self) -> PruneConfig | None:
        """How ClickTrain's selection and prune are done, if they are."""
        return self.method if isinstance(self.method, PruneConfig) else getattr(self.method, "prune", None)

    @property
    def admm(self) -> AdmmConfig | None:
        """ADMM epochs between the dense run and its pruning."""
        return getattr(self.method, "admm", None)

    @property
    def retrain(self) -> RetrainConfig | None:
        """Epochs after a dense run and its pruning."""
        return getattr(self.method, "retrain", None)

    @property
    def channels(self) -> ChannelConfig | None:
        """How the net becomes narrower in training."""
        return self.method if isinstance(self.method, ChannelConfig) else None

    @property
    def total_epochs(self) -> int:
        """Length of the whole run: the dense epochs and those that the method adds."""
        return self.epochs + (0 if self.method is None else self.method.epochs_after)


_PARTS = {"data": DataConfig, "loop": LoopConfig, "prune": PruneConfig, "admm": AdmmConfig, "retrain": RetrainConfig}


def to_dict(config: TrainConfig) -> dict:
    """Plain data, as it is written to config.json (tuples become lists there); ``method.kind`` tells its class."""
    plain = dataclasses.asdict(config)
    if config.method is not None:
        plain["method"] = {"kind": config.method.kind, **plain["method"]}
    return plain


def from_dict(data: dict) -> TrainConfig:
    """The inverse of `to_dict`; also of records from before there was one field for the method.

    Raises:
        ValueError: fields that do not exist in this version, or are missing; a method that is not known.
    """

    def build(cls: type, values: dict) -> object:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown config field {unknown[0]!r} for {cls.__name__}; known: {sorted(known)}")
        fields = {}
        for key, value in values.items():
            if key == "method" and value is not None:
                kind = value.get("kind")
                if kind not in KINDS:
                    raise ValueError(f"method.kind={kind!r}: expected one of {sorted(KINDS)}")
                value = build(KINDS[kind], {key: part for key, part in value.items() if key != "kind"})
            elif key in _PARTS and isinstance(value, dict):
                value = build(_PARTS[key], value)
            elif isinstance(value, list):
                value = tuple(value)
            fields[key] = value
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    return build(TrainConfig, of_five_fields(data))
