"""Commands about single runs: training, evaluating, exporting and looking at them, and the data."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from experiments import configs
from experiments.commands.arguments import PROGRAM, DataDir, Run, parse
from experiments.configs import TrainConfig
from experiments.data import DataConfig, load
from experiments.records import RunFolder, read_metrics, setting
from experiments.report import results
from experiments.report.overview import overview
from experiments.report.pace import Pace, hours

_EXAMPLE = "digits-clicktrain"


def train(arguments: list[str]) -> int:
    """Train a named config, resume it, or lengthen it."""
    from experiments.train import lengthen, loop, processes

    if arguments[:1] in (["-h"], ["--help"]):
        parse(_train_fields(configs.get(_EXAMPLE)), ["--help"], "train NAME", config=(tyro.conf.AvoidSubcommands,))
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"train needs a config NAME first: {PROGRAM} train NAME ...")
    name, *rest = arguments
    fields = _train_fields(configs.get(name))
    asked = parse(fields, rest, f"train {name}", config=(tyro.conf.AvoidSubcommands,))
    config = asked.config
    processes.join(config.loop)
    workdir = asked.workdir or Path("runs") / f"{config.name}-seed{config.seed}"
    folder = RunFolder(workdir)
    processes.check_config(config, lengthen=asked.lengthen)
    if asked.lengthen:
        # A missing data set is said before the folder is changed.
        processes.from_first(lambda: load(config.data) and lengthen.lengthen(folder, config))
    was_finished = folder.summary() is not None
    if not was_finished and processes.is_first():
        _say_if_long(config, done=len(read_metrics(workdir)))
    try:
        summary = loop.train(config, workdir)
    except loop.Interrupted as stop:
        # Given again it would ask for what is done by then.
        again = shlex.join(argument for argument in arguments if argument != "--lengthen")
        saved = f"{stop.epochs_saved} whole epochs are saved in {workdir}"
        print(f"{stop}: {saved}; to resume: {PROGRAM} train {again}", file=sys.stderr)
        raise
    if not processes.is_first():
        return 0
    if was_finished:
        print(
            f"{workdir} is finished: all {config.total_epochs} epochs were trained before, nothing was done now "
            f"(--lengthen --epochs N trains it further)"
        )
    print(describe(summary))
    print(f"run folder: {workdir}")
    return 0


def _train_fields(default: TrainConfig) -> type:
    @dataclasses.dataclass(frozen=True)
    class Train:
        """Train a named config; every field can be changed. Defaults are those of the config that is named; without a
        name they are those of digits-clicktrain."""

        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default
        workdir: Path | None = None
        """Run folder; by default runs/NAME-seedN."""
        lengthen: bool = False
        """Give the run in the folder more epochs (--epochs N): it goes on from its newest checkpoint under the schedule
        of the longer run, and what it recorded so far is kept in before-N-epochs."""

    return Train


def _say_if_long(config: TrainConfig, done: int) -> None:
    """A line about a run that will take more than an hour."""
    pace = Pace.of(results.records(), setting())
    seconds = pace.seconds(config)
    left = None if seconds is None else seconds * (1 - done / config.total_epochs)
    if left is not None and left > 3600:
        source = "as measured here before" if pace.has(config) else f"an estimate: {pace.source}"
        print(
            f"{config.name} takes about {hours(left)} on this machine ({source}). It may be stopped at any time, the "
            "same command goes on.",
            file=sys.stderr,
        )


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


def evaluate(path: Annotated[Run, tyro.conf.arg(metavar="PATH")], data_dir: DataDir = None) -> int:
    """Accuracy of a run folder's newest checkpoint, or of an export, on the run's own evaluation set.

    Args:
        path: a run folder or an export.
        data_dir: where the images are now, if not where the run found them; an export outside its run's folder does not
            know.
    """
    from experiments.studies import export as exports

    if exports.is_export(path):
        found = exports.evaluate_export(path, data_dir)
        print(exports.describe_evaluation(found))
        return 0 if found["top1"] == found["exported_top1"] else 1
    run = exports.restore(path, data_dir)
    loss, top1 = run.trainer.evaluate(run.state)
    split = f"{run.dataset.eval_split} set of {run.dataset.eval_examples}"
    done = f"{run.config.name} after {run.epochs_done} of {run.config.total_epochs} epochs"
    print(f"{done}, {split}: top-1 {100 * top1:.2f}, loss {loss:.4f}")
    return 0


def export(
    run: Run,
    out: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    stablehlo: bool = True,
    onnx: bool = False,
    c: bool = False,
    timing: bool = True,
    data_dir: DataDir = None,
) -> int:
    """Export a finished run: compact weights, StableHLO, and a page about it.

    Args:
        run: the run folder.
        out: the export's folder; by default RUN/export.
        dtype: of the stored weights; what it costs in accuracy is measured.
        stablehlo: add net.stablehlo; layers that run dense are dense in it.
        onnx: add net.onnx (dense; wants jax2onnx).
        c: add net.c and net.h: the net in C for one image a call, patterns compiled in.
        timing: measure the net on this machine, for the page and for later loads.
        data_dir: where the images are now, if not where the run found them.
    """
    from experiments.studies import export as exports

    out = out or run / "export"
    manifest = exports.export_run(
        run, out, dtype=dtype, data_dir=data_dir, stablehlo=stablehlo, onnx=onnx, c=c, is_timed=timing
    )
    print(exports.describe(out, manifest))
    print(f"  page: {out / exports.REPORT}")
    return 0


def list_configs(word: Positional[Annotated[str, tyro.conf.arg(metavar="WORD")]] = "") -> int:
    """The named configs, a line each: how long it takes on this machine, what it is expected to reach and what it did.

    Args:
        word: only those that have it in their name, net or data set.
    """
    print(overview(word))
    return 0


def demo(workdir: Path = Path("demo"), seeds: int = 3) -> int:
    """Dense and ClickTrain on scikit-learn's digits: a table, a plot, an export and its page.

    Args:
        workdir: where the runs, the table and the plot go; an earlier demo's are replaced.
        seeds: how many.
    """
    from experiments.studies import demo as studies_demo

    print(studies_demo.run(workdir, seeds))
    return 0


def patterns(run: Run, out: Path | None = None) -> int:
    """Draw a finished run's patterns, and where each is used.

    Args:
        run: the run folder.
        out: the PNG to write; by default RUN/patterns.png.
    """
    from experiments.report import pattern_sheet

    summary = RunFolder(run).summary()
    if summary is None:
        raise ValueError(f"{run} holds no summary.json: give the folder of a finished run")
    path = out or run / "patterns.png"
    pattern_sheet.draw(summary, path)
    print(f"patterns: {path}")
    return 0


def pack_data(out: Path, parts: int = 1, data: DataConfig = DataConfig("cifar10")) -> int:  # noqa: B008  (frozen)
    """Pack a data set's encoded images into one file, losslessly; it is readable without TFDS.

    Args:
        out: the archive to write.
        parts: cut it into so many files of one size, OUT.part0 and so on.
        data: which data set.
    """
    from experiments.data import pack

    for path in pack(data, out, parts):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def prepare_data(
    source: Annotated[Path, tyro.conf.arg(name="from")],
    name: str,
    data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir", aliases=["--out"])] = None,
    any_size: bool = False,
) -> int:
    """Make a TFDS data set of a folder of images, file by file as they are.

    Args:
        source: holds train/CLASS/FILE and test/CLASS/FILE (or val/): PNG, JPEG, WebP, BMP or PPM, all of one size.
        name: of the data set, as data.name says it later.
        data_dir: the TFDS directory to write NAME into; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
        any_size: the images are of any size, for runs that stream them (data.image_size).
    """
    from experiments.data import is_lossy, prepare_folder, tfds_source

    folder, images = prepare_folder(source, name, tfds_source.data_dir(data_dir), any_size=any_size)
    counts = ", ".join(f"{len(files):,} {split}" for split, files in images.files.items())
    if images.image_shape is None:
        what = f"of any size, {images.encoding}"
    else:
        height, width, channels = images.image_shape
        decoded = sum(map(len, images.files.values())) * height * width * channels
        colour = "grey" if channels == 1 else "colour"
        what = f"{width}x{height}, {colour}, {images.encoding}; {decoded / 1e6:.0f} MB in memory"
    print(f"{folder}: {counts} images of {len(images.classes)} classes, {what}")
    if name.startswith("cifar") and is_lossy(images.encoding):
        print(f"{images.encoding} is lossy, CIFAR's originals are not: accuracies do not compare with published ones")
    for unused in images.left_out:
        print(f"{unused} is left out")
    streamed = "" if images.image_shape else " --data.image-size 224"
    print(f"train on it: --data.name {name} --data.dir {folder.parent.parent}{streamed}")
    return 0
