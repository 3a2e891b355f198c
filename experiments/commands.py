"""What each command of the command line does. Each takes its arguments and returns the exit code."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import configs
from experiments.configs import TrainConfig
from experiments.data import DataConfig
from experiments.tables.overview import overview


def _parse(kind: Any, arguments: list[str], command: str, **options: Any) -> Any:
    return tyro.cli(kind, args=arguments, prog=f"python -m experiments {command}", **options)


def _name_argument(arguments: list[str], command: str, what: str) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"{command} needs {what} first: python -m experiments {command} {what.split()[-1]} ...")
    return arguments[0], arguments[1:]


def train(arguments: list[str]) -> int:
    """Train a named config, or resume it."""
    from experiments import loop

    name, rest = _name_argument(arguments, "train", "a config NAME")
    default = configs.get(name)

    @dataclasses.dataclass(frozen=True)
    class Train:
        """Train a named config; every field can be changed."""

        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default
        workdir: Path | None = None
        """Run folder; by default runs/NAME-seedN."""

    asked = _parse(Train, rest, f"train {name}", config=(tyro.conf.AvoidSubcommands,))
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
    from experiments.deployment import export as exports

    path, rest = _name_argument(arguments, "evaluate", "a run folder or an export PATH")

    @dataclasses.dataclass(frozen=True)
    class Evaluate:
        """Evaluate a run folder's newest checkpoint, or an export."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are now; a run folder knows where they were, an export does not."""

    asked = _parse(Evaluate, rest, f"evaluate {path}")
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
    from experiments.deployment import export as exports

    run, rest = _name_argument(arguments, "export", "a run folder RUN")

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
        timing: bool = True
        """Measure the net on this machine, for the page and for later loads."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are now, if not where they were."""

    asked = _parse(Export, rest, f"export {run}")
    out = asked.out or Path(run) / "export"
    manifest = exports.export_run(
        Path(run),
        out,
        dtype=asked.dtype,
        data_dir=asked.data_dir,
        stablehlo=asked.stablehlo,
        onnx=asked.onnx,
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

    _parse(List, arguments, "list")
    print(overview())
    return 0


def demo(arguments: list[str]) -> int:
    """Dense and ClickTrain on digits, three seeds: a table and a plot."""
    from experiments.tables import demo as demo_table

    @dataclasses.dataclass(frozen=True)
    class Demo:
        """Dense and ClickTrain on scikit-learn's digits."""

        workdir: Path = Path("demo")
        """Where the runs, the table and the plot go; an earlier demo's are replaced."""
        seeds: int = 3
        """How many seeds."""

    asked = _parse(Demo, arguments, "demo")
    print(demo_table.run(asked.workdir, asked.seeds))
    return 0


def patterns(arguments: list[str]) -> int:
    """Draw a finished run's patterns, and where each is used."""
    from experiments.records import RunFolder
    from experiments.tables import pattern_sheet

    run, rest = _name_argument(arguments, "patterns", "a run folder RUN")

    @dataclasses.dataclass(frozen=True)
    class Patterns:
        """Draw a finished run's patterns, and where each is used."""

        out: Path | None = None
        """The PNG to write; by default RUN/patterns.png."""

    asked = _parse(Patterns, rest, f"patterns {run}")
    summary = RunFolder(Path(run)).summary()
    if summary is None:
        raise ValueError(f"{run} holds no summary.json: give the folder of a finished run")
    path = asked.out or Path(run) / "patterns.png"
    pattern_sheet.draw(summary, path)
    print(f"patterns: {path}")
    return 0


def ablation(arguments: list[str]) -> int:
    """Run the ablation of the selection, and collect its records."""
    from experiments import ablation as harness
    from experiments.configs.ablation import families

    known = {family.prefix: family for family in families()}

    @dataclasses.dataclass(frozen=True)
    class Ablation:
        """Run the ablation of the selection, by successive halving; a second call goes on."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are."""
        workdir: Path = Path("runs/ablation")
        """Run folders."""
        records: Path | None = None
        """Copy the records of finished runs into this folder."""
        family: Literal["ablation", "ablation-full"] = "ablation"
        """The slim net, or the full width for a GPU."""
        seeds: tuple[int, ...] = (0, 1, 2)
        minutes: float | None = None
        """Start no new run after so many."""
        workers: int = 1
        """Processes at a time; several get one core each."""

    asked = _parse(Ablation, arguments, "ablation")
    result = harness.run(
        known[asked.family], asked.workdir, seeds=asked.seeds, minutes=asked.minutes, workers=asked.workers,
        data_dir=asked.data_dir,
    )
    if asked.records is not None:
        harness.collect(asked.workdir, asked.records)
    print(f"{result['finished']} runs finished, {result['missing']} to do")
    for run, error in result["failed"].items():
        print(f"{run} failed: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


def compare(arguments: list[str]) -> int:
    """Train the methods of a study, each tuned alike, and time their nets side by side."""
    from experiments.comparison import run as harness
    from experiments.configs.compare import study

    name, rest = _name_argument(arguments, "compare", "a STUDY")
    asked_study = study(name)

    @dataclasses.dataclass(frozen=True)
    class Compare:
        """Tune every method of a study, train every cell with every seed, time the nets; a second call goes on."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are."""
        workdir: Path | None = None
        """Run folders; by default runs/compare-STUDY."""
        records: Path | None = None
        """Copy the records of finished runs into this folder, below compare-STUDY."""
        seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
        """Of the final runs."""
        tuning_seeds: tuple[int, ...] = (100,)
        """Of the trials on validation data."""
        only: str = ""
        """Only cells whose name holds this regular expression, and the dense one."""
        minutes: float | None = None
        """Start no new run after so many."""
        workers: int = 1
        """Processes at a time; several get one core each."""
        timing: bool = True
        """Measure the latency of the first seed's nets."""

    asked = _parse(Compare, rest, f"compare {name}")
    workdir = asked.workdir or Path("runs") / f"compare-{name}"
    options = {
        field: value for field, value in dataclasses.asdict(asked).items() if field not in ("workdir", "records")
    }
    result = harness.run(asked_study, workdir, **options)
    if asked.records is not None:
        harness.collect(asked_study, workdir, asked.records)
    print(f"{result['finished']} runs finished, {result['missing']} to do")
    for run, error in result["failed"].items():
        print(f"{run} failed: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


def importance(arguments: list[str]) -> int:
    """Measure how well each criterion predicts the true change of loss."""
    from experiments import importance_study
    from experiments.tables import importance as importance_table

    @dataclasses.dataclass(frozen=True)
    class Importance:
        """Remove single kernels of a trained net, and compare the change of loss with each criterion."""

        out: Path
        """The record to write, a JSON file."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are."""
        workdir: Path | None = None
        """Parts already measured; by default runs/importance-NAME."""
        quick: bool = False
        """A small part on few images, to see that it works; the study's numbers are then its own."""
        study: importance_study.Study = importance_study.Study()

    asked = _parse(Importance, arguments, "importance")
    record = importance_study.run(
        asked.data_dir, asked.out, workdir=asked.workdir, study=None if asked.quick else asked.study, quick=asked.quick
    )
    print(importance_table.generate(record))
    return 0


def bench(arguments: list[str]) -> int:
    """Measure ratios side by side, and save them as a record when asked to."""
    from experiments import bench as benches
    from experiments import bench_conv

    others = {"deploy": _bench_deploy, "dtypes": _bench_dtypes, "sizes": _bench_sizes, "torch": _bench_torch}
    if arguments and arguments[0] in others:
        return others[arguments[0]](arguments[1:])

    @dataclasses.dataclass(frozen=True)
    class Bench:
        """Measure side by side in one process."""

        what: tyro.conf.Positional[Literal["steps", "step", "loop", "selection", "conv"]] = "steps"
        """steps: VGG-16 updates of every phase against the plain optax step, and the selection.
        step: whole training updates, dense against pruned by patterns.
        loop: an epoch as one compiled loop against one call an update.
        selection: the choice of the masks alone, with each option.
        conv: convolutions and their gradients by patterns against the dense ones, layer by layer."""
        net: str = "vgg16"
        """Of steps, step, loop and selection, as the next three."""
        width: float = 1.0
        batch_size: int = 64
        repeats: int = 7
        which: Literal["cpu", "gpu", "auto"] = "auto"
        """Of conv, as the next two: which list of layers."""
        filter: str = ""
        """Only layers whose name holds this regular expression."""
        rounds: int = 20
        """Samples of each function."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = _parse(Bench, arguments, "bench")
    if asked.what == "conv":
        print(bench_conv.run(asked.which, asked.filter, asked.rounds, asked.out))
    else:
        sizes = (asked.net, asked.width, asked.batch_size, asked.repeats)
        print(benches.run(asked.what, *sizes, asked.out))
    return 0


def _bench_deploy(arguments: list[str]) -> int:
    from experiments.deployment import bench as deployed

    path, rest = _name_argument(arguments, "bench deploy", "an export PATH")

    @dataclasses.dataclass(frozen=True)
    class BenchDeploy:
        """An exported net beside dense engines: XLA, and whichever of onnxruntime, OpenVINO and PyTorch are here."""

        latency: tuple[int, ...] = deployed.LATENCY
        """Batch sizes for which seconds a call are of interest."""
        throughput: tuple[int, ...] = deployed.THROUGHPUT
        """Batch sizes for which images a second are."""
        rounds: int = deployed.ROUNDS
        """Samples of every form of every engine."""
        quick: bool = False
        """Few rounds, and no throughput."""
        torch_python: str | None = None
        """An interpreter that has PyTorch and NumPy, where this one has not."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = _parse(BenchDeploy, rest, f"bench deploy {path}")
    print(deployed.run(Path(path), **dataclasses.asdict(asked)))
    return 0


def _bench_sizes(arguments: list[str]) -> int:
    from experiments.deployment import sizes

    @dataclasses.dataclass(frozen=True)
    class BenchSizes:
        """Bytes of the exports of every published recipe; nothing is trained. Takes 20 minutes."""

        out: Path | None = None
        """A JSON file to save the record in."""

    print(sizes.run(_parse(BenchSizes, arguments, "bench sizes").out))
    return 0


def _bench_dtypes(arguments: list[str]) -> int:
    from experiments.deployment import dtypes

    run, rest = _name_argument(arguments, "bench dtypes", "a run folder RUN")

    @dataclasses.dataclass(frozen=True)
    class BenchDtypes:
        """Accuracy and size of a finished run's weights, stored in each dtype."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are now, if not where they were."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = _parse(BenchDtypes, rest, f"bench dtypes {run}")
    print(dtypes.run(Path(run), asked.data_dir, asked.out))
    return 0


def _bench_torch(arguments: list[str]) -> int:
    from experiments import bench_torch

    @dataclasses.dataclass(frozen=True)
    class BenchTorch:
        """The training loop beside an eager PyTorch loop with a host loader, in images a second."""

        torch_python: str | None = None
        """An interpreter that has PyTorch, NumPy and Pillow, where this one has not."""
        net: str = "vgg13"
        width: float = 0.25
        batch_size: int = 128
        images: int = 2560
        """Of an epoch."""
        rounds: int = bench_torch.ROUNDS
        """Epochs of each that count."""
        workers: int | None = None
        """Processes of PyTorch's loader; one for each core by default."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = _parse(BenchTorch, arguments, "bench torch")
    print(bench_torch.run(**dataclasses.asdict(asked)))
    return 0


def table(arguments: list[str]) -> int:
    """Generate RESULTS.md, BENCHMARKS.md and the CSV files from records; first run what is missing, when asked to."""
    from experiments import gpu_plan
    from experiments.tables import documents, results

    @dataclasses.dataclass(frozen=True)
    class Table:
        """Tables from committed records."""

        write: bool = False
        """Write RESULTS.md, BENCHMARKS.md, their CSV files and pictures instead of printing the texts."""
        budget: str | None = None
        """Run what is missing of the plan for so long first, as gpu-30min or cpu-10min; a second call goes on."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are, for a budget."""
        workdir: Path | None = None
        """Run folders of a budget; by default runs/plan-KIND."""

    asked = _parse(Table, arguments, "table")
    failed = {}
    if asked.budget is not None:
        result = gpu_plan.run(asked.budget, asked.workdir, data_dir=asked.data_dir)
        failed = result["failed"]
        print(f"{result['finished']} runs finished, {result['missing']} to do; {result['collected']} records collected")
        if not asked.write:
            if result["collected"]:
                print("python -m experiments table --write puts them into the tables")
            return 1 if failed else 0
    elif asked.data_dir is not None or asked.workdir is not None:
        raise ValueError("--data.dir and --workdir are for --budget: without it nothing is run")
    if asked.write:
        documents.draw()
    for path, text in documents.generate().items():
        if asked.write:
            print(f"{path.name}: {'written' if results.write(text, path) else 'unchanged'}")
        elif path.suffix == ".md":
            print(text)
    return 1 if failed else 0


def pack_data(arguments: list[str]) -> int:
    """Pack a TFDS data set into one archive."""
    from experiments.data import pack

    @dataclasses.dataclass(frozen=True)
    class PackData:
        """Pack a data set's encoded images into one file."""

        out: Path
        """The archive to write."""
        data: DataConfig = DataConfig("cifar10")

    asked = _parse(PackData, arguments, "pack-data")
    path = pack(asked.data, asked.out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
