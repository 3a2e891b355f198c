"""Commands about single runs: training, evaluating, exporting and looking at them, and the data."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import configs
from experiments.commands.arguments import name_argument, parse
from experiments.configs import TrainConfig
from experiments.data import DataConfig
from experiments.report.overview import overview


def train(arguments: list[str]) -> int:
    """Train a named config, or resume it."""
    from experiments.train import loop

    name, rest = name_argument(arguments, "train", "a config NAME")
    default = configs.get(name)

    @dataclasses.dataclass(frozen=True)
    class Train:
        """Train a named config; every field can be changed."""

        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default
        workdir: Path | None = None
        """Run folder; by default runs/NAME-seedN."""

    asked = parse(Train, rest, f"train {name}", config=(tyro.conf.AvoidSubcommands,))
    config = asked.config
    workdir = asked.workdir or Path("runs") / f"{config.name}-seed{config.seed}"
    try:
        summary = loop.train(config, workdir)
    except loop.Interrupted as stop:
        again = shlex.join(["python", "-m", "experiments", "train", *arguments])
        saved = f"{stop.epochs_saved} whole epochs are saved in {workdir}"
        print(f"{stop}: {saved}; to resume: {again}", file=sys.stderr)
        raise
    print(describe(summary))
    print(f"run folder: {workdir}")
    return 0


def describe(summary: dict[str, Any]) -> str:
    """A finished run in four lines."""
    return (
        f"{summary['name']}, seed {summary['seed']}, {summary['dataset']} ({summary['encoding']}), "
        f"{summary['eval_split']} set of {summary['eval_examples']}\n"
        f"  top-1: final {100 * summary['final_top1']:.2f}, best {100 * summary['best_top1']:.2f}\n"
        f"  compression: convolutions {summary['conv_compression']:.2f}x, model {summary['model_compression']:.2f}x\n"
        f"  seconds: training {summary['train_seconds']:.1f}, compiling {summary['compile_seconds']:.1f}, "
        f"evaluating {summary['eval_seconds']:.1f}"
    )


def evaluate(arguments: list[str]) -> int:
    """Evaluate a run folder's newest checkpoint, or an export, on the run's own evaluation set."""
    from experiments.studies import export as exports

    path, rest = name_argument(arguments, "evaluate", "a run folder or an export PATH")

    @dataclasses.dataclass(frozen=True)
    class Evaluate:
        """Evaluate a run folder's newest checkpoint, or an export."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are now; a run folder knows where they were, an export does not."""

    asked = parse(Evaluate, rest, f"evaluate {path}")
    if exports.is_export(Path(path)):
        found = exports.evaluate_export(Path(path), asked.data_dir)
        print(exports.describe_evaluation(found))
        return 0 if found["top1"] == found["exported_top1"] else 1
    run = exports.restore(Path(path), asked.data_dir)
    loss, top1 = run.trainer.evaluate(run.state)
    split = f"{run.dataset.eval_split} set of {len(run.dataset.eval_labels)}"
    done = f"{run.config.name} after {run.epochs_done} of {run.config.total_epochs} epochs"
    print(f"{done}, {split}: top-1 {100 * top1:.2f}, loss {loss:.4f}")
    return 0


def export(arguments: list[str]) -> int:
    """Export a finished run: compact weights, StableHLO, and a page about it."""
    from experiments.studies import export as exports

    run, rest = name_argument(arguments, "export", "a run folder RUN")

    @dataclasses.dataclass(frozen=True)
    class Export:
        """Export a finished run: compact weights, StableHLO, and a page about it."""

        out: Path | None = None
        """The export's folder; by default RUN/export."""
        dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
        """Of the stored weights; what it costs in accuracy is measured."""
        stablehlo: bool = True
        """Add net.stablehlo; layers that run dense are dense in it."""
        onnx: bool = False
        """Add net.onnx (dense; wants jax2onnx)."""
        c: bool = False
        """Add net.c and net.h: the net in C for one image a call, patterns compiled in."""
        timing: bool = True
        """Measure the net on this machine, for the page and for later loads."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are now, if not where they were."""

    asked = parse(Export, rest, f"export {run}")
    out = asked.out or Path(run) / "export"
    manifest = exports.export_run(
        Path(run),
        out,
        dtype=asked.dtype,
        data_dir=asked.data_dir,
        stablehlo=asked.stablehlo,
        onnx=asked.onnx,
        c=asked.c,
        is_timed=asked.timing,
    )
    print(exports.describe(out, manifest))
    print(f"  page: {out / exports.REPORT}")
    return 0


def list_configs(arguments: list[str]) -> int:
    """Print the named configs."""

    @dataclasses.dataclass(frozen=True)
    class List:
        """List the named configs."""

    parse(List, arguments, "list")
    print(overview())
    return 0


def demo(arguments: list[str]) -> int:
    """Dense and ClickTrain on digits, three seeds: a table and a plot."""
    from experiments.studies import demo as demo_table

    @dataclasses.dataclass(frozen=True)
    class Demo:
        """Dense and ClickTrain on scikit-learn's digits."""

        workdir: Path = Path("demo")
        """Where the runs, the table and the plot go; an earlier demo's are replaced."""
        seeds: int = 3
        """How many seeds."""

    asked = parse(Demo, arguments, "demo")
    print(demo_table.run(asked.workdir, asked.seeds))
    return 0


def patterns(arguments: list[str]) -> int:
    """Draw a finished run's patterns, and where each is used."""
    from experiments.records import RunFolder
    from experiments.report import pattern_sheet

    run, rest = name_argument(arguments, "patterns", "a run folder RUN")

    @dataclasses.dataclass(frozen=True)
    class Patterns:
        """Draw a finished run's patterns, and where each is used."""

        out: Path | None = None
        """The PNG to write; by default RUN/patterns.png."""

    asked = parse(Patterns, rest, f"patterns {run}")
    summary = RunFolder(Path(run)).summary()
    if summary is None:
        raise ValueError(f"{run} holds no summary.json: give the folder of a finished run")
    path = asked.out or Path(run) / "patterns.png"
    pattern_sheet.draw(summary, path)
    print(f"patterns: {path}")
    return 0


def pack_data(arguments: list[str]) -> int:
    """Pack a TFDS data set into one archive."""
    from experiments.data import pack

    @dataclasses.dataclass(frozen=True)
    class PackData:
        """Pack a data set's encoded images into one file, losslessly."""

        out: Path
        """The archive to write."""
        parts: int = 1
        """Cut it into so many files of one size, OUT.part0 and so on."""
        data: DataConfig = DataConfig("cifar10")

    asked = parse(PackData, arguments, "pack-data")
    for path in pack(asked.data, asked.out, asked.parts):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def prepare_data(arguments: list[str]) -> int:
    """Make a TFDS data set of a folder of images."""
    from experiments.data import is_lossy, prepare_folder
    from experiments.data.tfds_source import data_dir

    @dataclasses.dataclass(frozen=True)
    class PrepareData:
        """Make a TFDS data set of a folder of images, file by file as they are."""

        source: Annotated[Path, tyro.conf.arg(name="from")]
        """Holds train/CLASS/FILE and test/CLASS/FILE (or val/): PNG, JPEG, WebP, BMP or PPM, all of one size."""
        name: str
        """Of the data set, as data.name says it later."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir", aliases=["--out"])] = None
        """The TFDS directory to write NAME into; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    asked = parse(PrepareData, arguments, "prepare-data")
    folder, images = prepare_folder(asked.source, asked.name, data_dir(asked.data_dir))
    counts = ", ".join(f"{len(files):,} {split}" for split, files in images.files.items())
    height, width, channels = images.image_shape
    decoded = sum(map(len, images.files.values())) * height * width * channels
    print(
        f"{folder}: {counts} images of {len(images.classes)} classes, {width}x{height}, "
        f"{'grey' if channels == 1 else 'colour'}, {images.encoding}; {decoded / 1e6:.0f} MB in memory"
    )
    if asked.name.startswith("cifar") and is_lossy(images.encoding):
        print(f"{images.encoding} is lossy, CIFAR's originals are not: accuracies do not compare with published ones")
    for unused in images.left_out:
        print(f"{unused} is left out")
    print(f"train on it: --data.name {asked.name} --data.dir {folder.parent.parent}")
    return 0
