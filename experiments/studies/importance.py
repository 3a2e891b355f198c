"""How well does each importance criterion predict what the removal of a kernel does to the loss?

    python -m experiments importance --data.dir DIR --out experiments/results/importance/slim-vgg11.json

Three measurements on nets trained dense to the epoch where a selection happens:

truth       single kernels are set to zero; the change of the loss on held-out validation images, BatchNorm in inference
            mode, summed in float64 over paired per-example differences. The test set is never read.
criteria    every criterion on N training batches, several independent draws of them: gradients of the train step itself
            (augmentation, BatchNorm on the batch), at fixed weights, so that N alone differs. (`ct.clicktrain` gathers
            over consecutive updates, between which the weights move.) Their rank correlation with the truth.
fine-tuning the same nets pruned hard to each criterion's masks, then trained with the masks on: validation accuracy.

Each part of the work is saved in a folder of its own; the same command goes on where it was stopped.
"""

import copy
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.states import fill_masks
from clicktrain_jax.trees import named_leaves
from experiments import configs
from experiments.configs import TrainConfig
from experiments.configs.base import to_dict
from experiments.data import load
from experiments.data.splits import balanced_subset
from experiments.records import plain, setting, write_json
from experiments.studies.kernel_removal import draw_kernels, kernel_sums, loss_changes, score_program, summarise
from experiments.studies.parts import Parts
from experiments.train.recipe import make_optimizer, prune_rules
from experiments.train.state import TrainState
from experiments.train.step import Trainer

# The net, and the recipe whose fractions, one for each prunable layer, are used for fine-tuning.
_NET, _FRACTIONS_OF = "slim-vgg11-cifar10-dense", "slim-vgg11-cifar10-8.6x"
GRADIENT_CRITERIA = ("taylor", "group_taylor")
# Streams of random numbers beside those of training.
_BATCHES, _RANDOM, _TUNING = 101, 102, 103


@dataclasses.dataclass(frozen=True)
class Study:
    """How much is measured.

    Attributes:
        checkpoint_epochs: nets are taken after so many epochs of the run; kernels are removed from all of them,
            the first is also pruned and fine-tuned.
        seeds: training runs, seeds 0 to seeds - 1.
        truth_seeds: kernels are removed one by one in the nets of so many of them.
        kernels: kernels drawn uniformly in each prunable layer.
        images: validation images, balanced over the classes.
        batches: numbers N of batches that a score is the mean of.
        draws: at most so many disjoint draws of N batches; the largest N has two at most.
        tune_epochs: of fine-tuning after hard pruning.
        tune_rate: its learning rate, cosine to zero after a tenth of warm-up.
    """

    checkpoint_epochs: tuple[int, ...] = (3,)
    seeds: int = 3
    truth_seeds: int = 1
    kernels: int = 50
    images: int = 5000
    batches: tuple[int, ...] = (1, 4, 16, 64)
    draws: int = 8
    tune_epochs: int = 1
    tune_rate: float = 0.03

    def __post_init__(self) -> None:
        for field in ("seeds", "truth_seeds", "kernels", "images", "draws", "tune_epochs"):
            if getattr(self, field) < (0 if field == "truth_seeds" else 1):
                raise ValueError(f"{field}={getattr(self, field)}: expected at least 1 (truth_seeds: 0)")
        for field in ("checkpoint_epochs", "batches"):
            values = getattr(self, field)
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise ValueError(f"{field}={values}: expected numbers from 1 up, each larger than the one before")
        if self.truth_seeds > self.seeds:
            raise ValueError(f"truth_seeds={self.truth_seeds} of seeds={self.seeds}: expected no more than there are")


_QUICK = Study(seeds=1, kernels=2, images=200, batches=(1, 4), draws=2)


def run(
    data_dir: str | None, out: Path, *, workdir: Path | None = None, study: Study | None = None, quick: bool = False
) -> dict[str, Any]:
    """The study of the slim net; writes the record to ``out`` and returns it.

    Args:
        data_dir: as `DataConfig.dir`.
        out: the JSON file to write.
        workdir: parts already measured are kept here; by default runs/importance-NAME, NAME being that of ``out``.
        study: how much is measured.
        quick: a small part of it, on few images, to see that it works.

    Raises:
        ValueError: missing data, ``workdir`` of another study.
    """
    config, prune = configs.get(_NET), configs.get(_FRACTIONS_OF).prune
    data = dataclasses.replace(config.data, dir=data_dir, eval_split="validation")
    study = study or (_QUICK if quick else Study())
    if quick:
        data = dataclasses.replace(data, train_examples=1000)
    command = ["python", "-m", "experiments", "importance", "--data.dir", str(data_dir), "--out", str(out)]
    for field, usual in vars(_QUICK if quick else Study()).items():
        value = getattr(study, field)
        if value != usual:
            command += [f"--study.{field.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    name = f"importance-{Path(out).stem}" + ("-quick" if quick else "")
    record = measure(
        dataclasses.replace(config, data=data), prune.fractions, study, workdir or Path("runs") / name, print
    )
    record = {"command": shlex.join(command + ["--quick"] * quick), "quick": quick, **record}
    write_json(Path(out), record)
    return record


def measure(
    config: TrainConfig,
    fractions: tuple[float, ...],
    study: Study,
    workdir: Path,
    log: Callable[[str], None] = lambda _: None,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """The record of a study on one dense config whose data have a validation split; ``trainer`` is the config's.

    Raises:
        ValueError: a pruned config, a config that evaluates on the test set, checkpoint epochs beyond the run, more
            batches than an epoch has, ``workdir`` of another study.
    """
    if config.prune is not None:
        raise ValueError(f"{config.name} prunes: kernels are removed from nets trained dense, name a dense config")
    if config.data.eval_split != "validation":
        raise ValueError("eval_split='test': decisions are taken on validation data; set eval_split='validation'")
    if config.data.image_size is not None:
        raise ValueError(
            f"data.image_size={config.data.image_size}: the study holds its images in memory; leave it unset"
        )
    if study.checkpoint_epochs[-1] > config.epochs:
        raise ValueError(f"checkpoint_epochs={study.checkpoint_epochs}: {config.name} has {config.epochs} epochs")
    trainer = trainer or Trainer(config, load(config.data))
    dataset = trainer.dataset
    full = len(dataset.train_labels) // config.batch_size
    if study.batches[-1] > full:
        raise ValueError(f"batches={study.batches}: an epoch has {full} full batches, take no more")
    # Where the images lie, and what is published of the run, change nothing.
    fields = {key: value for key, value in to_dict(config).items() if key not in ("data", "loop", "expected")}
    asked = {"config": fields, "fractions": fractions, "study": vars(study), "data_fingerprint": dataset.fingerprint}
    parts = Parts(workdir, asked, log)
    layers = models.prunable_convs(trainer.model, trainer.image_shape)
    plan = ct.make_plan(trainer.abstract_params, prune_rules(fractions, layers, config.net))
    bench = _Bench(trainer, plan, layers, study, parts)
    nets = [net for seed in range(study.seeds) for net in bench.nets_of(seed)]
    return {
        "what": "importance",
        "setting": setting(),
        **plain(asked),
        "eval_split": dataset.eval_split,
        "dataset": dataset.name,
        "encoding": dataset.encoding,
        "eval_examples": len(dataset.eval_labels),
        "train_examples": len(dataset.train_labels),
        "seconds": parts.seconds,
        "nets": nets,
    }


class _Bench:
    """Everything measured on the nets of one seed; each part is saved once it is done."""

    def __init__(self, trainer: Trainer, plan: Any, layers: tuple[str, ...], study: Study, parts: Parts) -> None:
        self.trainer, self.plan, self.layers, self.study, self.parts = trainer, plan, layers, study, parts
        self.patterns = ct.patterns.fixed_set(4)
        self.indices = {
            name: draw_kernels(_shape(trainer, name), study.kernels, seed) for seed, name in enumerate(layers)
        }
        count = min(study.images, len(trainer.dataset.eval_labels))
        self.images = np.sort(balanced_subset(trainer.dataset.eval_labels, count))
        self.score_batch = score_program(trainer, self.indices, GRADIENT_CRITERIA)
        self.tune_step, self.tuner = self._tuning_program()
        self.cells: list[tuple[str, int | None]] = [("dense", None), ("magnitude", None), ("random", None)]
        self.cells += [(name, count) for name in GRADIENT_CRITERIA for count in study.batches]
        # In training epochs, roughly; the forward pass is a third of an update.
        forward = len(trainer.train_data.labels) * 3
        sizes = models.output_sizes(trainer.model, trainer.image_shape)
        adds = {name: np.prod(sizes[name]) * np.prod(_shape(trainer, name)) for name in sizes}
        # Of the multiply-adds, those after a layer; the kept activations are read and written too.
        rest = {name: 0.05 + sum(list(adds.values())[at + 1 :]) / sum(adds.values()) for at, name in enumerate(adds)}
        self.costs = {
            "train": 1.0,
            **{name: study.kernels * count * rest[name] / forward for name in layers},
            "scores": self.batch_count / trainer.steps_per_epoch,
            "tune": study.tune_epochs + 2 * len(trainer.eval_data.labels) / forward,
        }
        nets, truths = (number * len(study.checkpoint_epochs) for number in (study.seeds, study.truth_seeds))
        parts.expect(
            study.seeds * study.checkpoint_epochs[-1]
            + truths * sum(self.costs[name] for name in layers)
            + nets * self.costs["scores"]
            + study.seeds * len(self.cells) * self.costs["tune"]
        )

    @property
    def _full_batches(self) -> int:
        return len(self.trainer.train_data.labels) // self.trainer.config.batch_size

    @property
    def batch_count(self) -> int:
        """Batches scored in each net: two draws of the largest N where the epoch has them."""
        return min(2 * self.study.batches[-1], self._full_batches)

    def nets_of(self, seed: int) -> list[dict[str, Any]]:
        """The measurements on each checkpoint of one training run."""
        nets = []
        state = self.trainer.init(seed)
        done = 0
        for epochs in self.study.checkpoint_epochs:
            state = self._trained(state, seed, done, epochs)
            done = epochs
            loss, top1 = self.trainer.evaluate(state)
            per_batch, means = self._scores(state, seed)
            self.parts.passed(self.costs["scores"], f"seed {seed}, epoch {epochs}: scores of {len(per_batch)} batches")
            truth, tuned = None, None
            if seed < self.study.truth_seeds:
                truth = self._truth(state, seed, epochs, per_batch)
            if epochs == self.study.checkpoint_epochs[0]:
                tuned = [self._tuned(state, seed, cell, means) for cell in self.cells]
            nets.append({"seed": seed, "epochs": epochs, "top1": top1, "loss": loss, "truth": truth, "tuned": tuned})
        return nets

    def _trained(self, state: TrainState, seed: int, first: int, end: int) -> TrainState:
        def compute() -> dict[str, np.ndarray]:
            nonlocal state
            for epoch in range(first, end):
                state, metrics = self.trainer.run_epoch(state, epoch, seed)
                if not np.isfinite(metrics[:, 0]).all():
                    raise ValueError(f"seed {seed}: the loss is not finite in epoch {epoch}; lower learning_rate")
                self.parts.passed(self.costs["train"], f"seed {seed}: epoch {epoch} trained")
            return {str(at): np.asarray(leaf) for at, leaf in enumerate(jax.tree.leaves(state))}

        structure = jax.tree.structure(state)
        stored = self.parts.once(f"net-seed{seed}-epoch{end}", (end - first) * self.costs["train"], compute)
        return structure.unflatten([jnp.asarray(stored[str(at)]) for at in range(structure.num_leaves)])

    def _truth(self, state: TrainState, seed: int, epochs: int, per_batch: list[Any]) -> dict[str, Any]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        data = self.trainer.dataset
        changes = {}
        for name in self.layers:
            cost = self.costs[name]
            label = f"truth-seed{seed}-epoch{epochs}-{name.replace('/', '.')}"

            def compute(name: str = name, cost: float = cost) -> dict[str, np.ndarray]:
                found = loss_changes(
                    self.trainer.model,
                    variables,
                    data.eval_images[self.images],
                    data.eval_labels[self.images],
                    data.mean,
                    data.std,
                    name,
                    self.indices[name],
                )
                self.parts.passed(cost, f"seed {seed}, epoch {epochs}: {len(found)} kernels of {name} removed")
                return {"changes": found}

            changes[name] = self.parts.once(label, cost, compute)["changes"]
        scores = self._sampled(state, seed, per_batch)
        return {
            **summarise(changes, scores),
            "layers": [
                {
                    "name": name,
                    "kernels": self.indices[name].tolist(),
                    "mean": _short(changes[name].mean(axis=1)),
                    "standard_error": _short(changes[name].std(axis=1, ddof=1) / np.sqrt(changes[name].shape[1])),
                    "scores": {_label(*cell): _short(draws[name].mean(axis=0)) for cell, draws in scores.items()},
                }
                for name in self.layers
            ],
        }

    def _scores(self, state: TrainState, seed: int) -> tuple[list[Any], dict[tuple[str, int], Any]]:
        """Scores of the drawn kernels in each batch, and trees of mean scores over the first N batches."""
        key = jax.random.fold_in(jax.random.key(seed), _BATCHES)
        order = jax.random.permutation(key, len(self.trainer.train_data.labels))
        frozen = state._replace(opt_state=jax.tree.map(jnp.zeros_like, state.params))
        sums, means, per_batch = None, {}, []
        for index in range(self.batch_count):
            trees, drawn = self.score_batch(frozen, self.trainer.train_data, order, np.int32(index), key)
            per_batch.append(drawn)
            sums = trees if sums is None else jax.tree.map(jnp.add, sums, trees)
            if index + 1 in self.study.batches:
                for name, tree in sums.items():
                    means[name, index + 1] = jax.tree.map(lambda total, n=index + 1: total / n, tree)
        return jax.device_get(per_batch), means

    def _sampled(self, state: TrainState, seed: int, per_batch: list[Any]) -> dict[tuple[str, int | None], Any]:
        """``{(criterion, N): {layer: (draws, kernels)}}``, float64."""
        study, scores = self.study, {}
        for name in GRADIENT_CRITERIA:
            for count in study.batches:
                draws = min(study.draws, self.batch_count // count)
                scores[name, count] = {
                    layer: np.mean(
                        np.asarray([batch[name][layer] for batch in per_batch[: draws * count]], np.float64).reshape(
                            draws, count, -1
                        ),
                        axis=1,
                    )
                    for layer in self.layers
                }
        weights = kernel_sums(ct.importance.magnitude(state.params), self.indices)
        scores["magnitude", None] = {name: np.asarray(value, np.float64)[None] for name, value in weights.items()}
        draw = np.random.default_rng([_RANDOM, seed])
        scores["random", None] = {name: draw.random((study.draws, len(self.indices[name]))) for name in self.layers}
        return scores

    def _tuning_program(self) -> tuple[Callable[..., Any], Trainer]:
        """The masked update of the pruned phase, and a trainer with its optimizer; data and model are shared."""
        tuner = copy.copy(self.trainer)
        tuner.config = dataclasses.replace(
            self.trainer.config,
            epochs=self.study.tune_epochs,
            learning_rate=self.study.tune_rate,
            lr_schedule="cosine",
            lr_milestones=(),
            mixup_epoch=None,
        )
        tuner.optimizer = make_optimizer(tuner.config, self._full_batches)
        tuner.updates = ct.phase_updates(tuner.optimizer, self.plan, coeff=0.0, patterns=self.patterns)
        return jax.jit(tuner.update_step("pruned", tuner.config.batch_size), donate_argnums=0), tuner

    def _masks(self, state: TrainState, seed: int, cell: tuple[str, int | None], means: Any) -> ct.Masks:
        name, _ = cell
        if name in GRADIENT_CRITERIA:
            scores = means[cell]
        elif name == "random":
            draw = np.random.default_rng([_RANDOM, seed])
            scores = jax.tree.map(lambda leaf: jnp.asarray(draw.random(leaf.shape, np.float32)), state.params)
        else:
            scores = ct.importance.magnitude(state.params)
        masks = ct.select_masks(scores, self.plan, self.patterns)
        return jax.tree.map(jnp.ones_like, masks) if name == "dense" else masks

    def _tuned(self, state: TrainState, seed: int, cell: tuple[str, int | None], means: Any) -> dict[str, Any]:
        """Validation accuracy of the net pruned by a cell's scores, before and after training with the masks on."""

        def compute() -> dict[str, np.ndarray]:
            tuner = self.tuner
            masks = self._masks(state, seed, cell, means)
            params, statistics = jax.tree.map(jnp.copy, (ct.apply_masks(state.params, masks), state.batch_stats))
            held = tuner.updates.init(params)
            # Updates are given the state for good, and the masks are needed once more.
            layers = jax.tree.map(jnp.copy, masks.layers)
            pruned = state._replace(
                step=jnp.zeros([], jnp.int32),
                params=params,
                batch_stats=statistics,
                opt_state=held._replace(masks=fill_masks(held.masks, layers)),
            )
            before = tuner.evaluate(pruned)[1]
            metrics = jnp.zeros((tuner.steps_per_epoch, 2), jnp.float32)
            key = jax.random.fold_in(jax.random.key(seed), _TUNING)
            for epoch in range(self.study.tune_epochs):
                # The same order, crops and flips in every cell of a seed: their differences are paired.
                order = jax.random.permutation(jax.random.fold_in(key, epoch), len(tuner.train_data.labels))
                for index in range(self._full_batches):
                    pruned, metrics = self.tune_step(pruned, metrics, tuner.train_data, order, np.int32(index), key, {})
            report = ct.report(pruned.params, masks)
            loss, top1 = tuner.evaluate(pruned)
            self.parts.passed(self.costs["tune"], f"seed {seed}: pruned by {_label(*cell)}, top-1 {100 * top1:.2f}")
            return {"before": before, "after": top1, "loss": loss, "conv_compression": report.conv_compression}

        stored = self.parts.once(f"tuned-seed{seed}-{_label(*cell)}", self.costs["tune"], compute)
        return {"criterion": cell[0], "batches": cell[1], **{name: float(value) for name, value in stored.items()}}


def _shape(trainer: Trainer, name: str) -> tuple[int, ...]:
    return dict(named_leaves(trainer.abstract_params))[name].shape


def _label(criterion: str, batches: int | None) -> str:
    return criterion if batches is None else f"{criterion}-{batches}"


def _short(values: np.ndarray) -> list[float]:
    """Six digits are more than the noise leaves, and keep a record readable."""
    return [float(f"{value:.6g}") for value in values]
