"""From a finished run to an export: the folder, its accuracy, its speed here, and a page about all of it."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax.deploy import storage
from clicktrain_jax.deploy.storage.manifest import MANIFEST, WEIGHTS
from experiments.bench import timing
from experiments.configs.base import TrainConfig, to_dict
from experiments.data import DataConfig, Dataset, StreamedDataset, load
from experiments.records import RunFolder, read_config, read_json, read_metrics
from experiments.report import page
from experiments.train.checkpoints import Checkpoints
from experiments.train.feed import EVAL_BATCH
from experiments.train.loop import template
from experiments.train.step import Trainer

REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run as its newest checkpoint has it.

    Attributes:
        config: of the run.
        dataset: that it was trained on.
        trainer: its programs.
        epochs_done: of the checkpoint.
        state: `experiments.train.state.TrainState`.
    """

    config: TrainConfig
    dataset: Dataset | StreamedDataset
    trainer: Trainer
    epochs_done: int
    state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the net answers with, on the host."""
        return jax.tree.map(np.asarray, jax.device_get(self.trainer.variables(self.state)))

    @property
    def masks(self) -> ct.Masks | None:
        """Of whichever method; None for a dense run."""
        return jax.device_get(self.trainer.masks(self.state))


def restore(run: Path, data_dir: str | None = None) -> Restored:
    """Read a run folder's newest checkpoint.

    Args:
        run: the folder.
        data_dir: where the images are now, if not where they were.

    Raises:
        ValueError: no run folder, no checkpoint, or other images.
    """
    config = read_config(run)
    folder = RunFolder(run)
    dataset = load(folder.data(config) if data_dir is None else dataclasses.replace(config.data, dir=data_dir))
    folder.check(config, dataset.fingerprint)
    trainer = Trainer(config, dataset)
    if not folder.checkpoints.exists():
        raise ValueError(f"{run} holds no checkpoint")
    checkpoints = Checkpoints(folder.checkpoints, read_only=True)
    restored = checkpoints.restore_newest(template(trainer, folder, trainer.init(config.seed)))
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{run} holds no checkpoint")
    return Restored(config, dataset, trainer, *restored)


def top1(net: Any, dataset: Dataset | StreamedDataset) -> float:
    """Fraction of the evaluation set that an exported net classifies as labelled."""
    correct = 0
    for images, labels in dataset.eval_batches(EVAL_BATCH):
        correct += int((np.asarray(net(images)).argmax(axis=-1) == labels).sum())
    return correct / dataset.eval_examples


def export_run(
    run: Path,
    out: Path,
    *,
    dtype: str = "float32",
    data_dir: str | None = None,
    stablehlo: bool = True,
    onnx: bool = False,
    c: bool = False,
    is_timed: bool = True,
) -> dict[str, Any]:
    """Export a finished run and write the page about it.

    Args:
        run: its folder.
        out: the export's folder.
        dtype: of the stored weights.
        data_dir: where the images are now, if not where they were.
        stablehlo: add ``net.stablehlo``.
        onnx: add ``net.onnx``.
        c: add ``net.c`` and ``net.h``.
        is_timed: measure the net on this machine, for the page and for later loads.

    Returns:
        The manifest.

    Raises:
        ValueError: a run that is not finished, and what `restore` and `clicktrain_jax.export` refuse.
    """
    summary = RunFolder(run).summary()
    if summary is None:
        raise ValueError(f"{run} holds no summary.json: only a finished run is exported; train it to its end first")
    found = restore(run, data_dir)
    config, dataset, model = found.config, found.dataset, found.trainer.model
    variables, masks = found.variables, found.masks

    def write(folder: Path, facts: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        return ct.export(
            folder,
            lambda variables, images: model.apply(variables, images, train=False),
            variables,
            masks,
            image_shape=found.trainer.image_shape,
            normalise={"mean": dataset.mean, "std": dataset.std},
            dtype=dtype,
            net={
                "name": config.net,
                "num_classes": dataset.num_classes,
                "width": config.width,
                "precision": config.precision,
            },
            facts=facts,
            **options,
        )

    # Where this machine keeps its images is no part of an export.
    portable = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=None, cache_dir=None))
    facts = {
        "run": {"name": config.name, "seed": config.seed, "config": to_dict(portable)},
        "data": {"name": dataset.name, "encoding": dataset.encoding, "fingerprint": dataset.fingerprint},
        "conv_compression": summary["conv_compression"],
    }
    with tempfile.TemporaryDirectory() as temporary:
        # The accuracy is of what is stored, and it is a part of what is stored.
        write(Path(temporary), facts, stablehlo=False)
        accuracy = top1(ct.load(temporary), dataset)
    facts["accuracy"] = {
        "split": dataset.eval_split,
        "examples": dataset.eval_examples,
        "top1": accuracy,
        "run_top1": summary["final_top1"],
    }
    manifest = write(out, facts, stablehlo=stablehlo, onnx=onnx, c=c)
    timed = timing.measure(ct.load(out)) if is_timed else None
    write_page(run, out, manifest, timed)
    return manifest


def write_page(run: Path, out: Path, manifest: Mapping[str, Any], timed: Mapping[str, Any] | None) -> None:
    """Write the export's page beside its files."""
    text = page.render(
        {
            "summary": RunFolder(run).summary(),
            "metrics": read_metrics(run),
            "config": read_json(run / "config.json"),
            "setting": read_json(run / "setting.json"),
            "manifest": manifest,
            "sizes": sizes(out, manifest),
            "timing": timed,
        }
    )
    (out / REPORT).write_text(text, encoding="utf-8")


def is_export(path: Path) -> bool:
    """Whether a folder is meant to be an export, sound or not."""
    return (path / MANIFEST).exists() and not (path / "config.json").exists()


def evaluate_export(path: Path, data_dir: str | None = None) -> dict[str, Any]:
    """Accuracy of an export on the evaluation set of its run.

    Args:
        path: its folder.
        data_dir: where the images are; an export within its run's folder finds them where the run did.

    Returns:
        ``{"name", "split", "examples", "top1", "exported_top1", "run_top1"}``: measured now, when it was exported, and
        of the run.

    Raises:
        ValueError: an export that is broken or was not made from a run; other images.
    """
    manifest = storage.read_manifest(path)
    facts = manifest["facts"]
    if not {"run", "data", "accuracy"} <= facts.keys():
        raise ValueError(f"{path} was not exported from a run folder: its data set is not known")
    data = DataConfig(**{**facts["run"]["config"]["data"], "dir": data_dir})
    # In its run's folder, as `export RUN` puts it.
    run = Path(path).resolve().parent
    if data_dir is None and (run / "config.json").exists():
        data = RunFolder(run).data(read_config(run))
    dataset = load(data)
    if dataset.fingerprint != facts["data"]["fingerprint"]:
        raise ValueError(
            f"{path} was evaluated on other images (fingerprint {facts['data']['fingerprint']}, "
            f"now {dataset.fingerprint}); give the same data"
        )
    accuracy = facts["accuracy"]
    return {
        "name": facts["run"]["name"],
        "split": dataset.eval_split,
        "examples": dataset.eval_examples,
        "top1": top1(ct.load(path), dataset),
        "exported_top1": accuracy["top1"],
        "run_top1": accuracy["run_top1"],
    }


def describe(out: Path, manifest: Mapping[str, Any]) -> str:
    """An export in a few lines."""
    found = storage.sizes(manifest)
    accuracy = manifest["facts"]["accuracy"]
    examples = accuracy["examples"]
    lost = round((accuracy["run_top1"] - accuracy["top1"]) * examples)
    difference = "as the run's" if not lost else f"the run's is {100 * accuracy['run_top1']:.2f}, {lost:+d} images"
    return (
        f"{out}: weights {manifest['dtype']}, {found.files[WEIGHTS] / 1e6:.2f} MB\n"
        f"  convolutions: {(found.convolutions.stored + found.headers) / 1e6:.2f} MB with indices and headers, "
        f"{found.convolution_ratio:.2f}x smaller than dense float32\n"
        f"  top-1 on the {accuracy['split']} set of {examples}: {100 * accuracy['top1']:.2f} ({difference})"
    )


def describe_evaluation(found: Mapping[str, Any]) -> str:
    """What `evaluate_export` found, in two lines."""
    same = found["top1"] == found["exported_top1"]
    exported = "as when it was exported" if same else f"{100 * found['exported_top1']:.2f} when it was exported"
    return (
        f"{found['name']}, exported, {found['split']} set of {found['examples']}: top-1 {100 * found['top1']:.2f}\n"
        f"  {exported}; of the run itself {100 * found['run_top1']:.2f}"
    )


def sizes(out: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of sizes, in bytes."""
    found = storage.sizes(manifest)
    return {
        "dense_bytes": sum(leaf.dense_float32 for leaf in found.leaves.values()),
        "conv_dense_bytes": found.convolutions.dense_float32,
        "conv_bytes": found.convolutions.stored,
        "conv_index_bytes": found.convolutions.indices + found.convolutions.scales,
        "header_bytes": found.headers,
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
        "layers": {name: leaf.stored for name, leaf in found.leaves.items()},
    }
