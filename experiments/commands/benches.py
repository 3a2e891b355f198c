"""Commands that measure side by side."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.commands.arguments import name_argument, parse


def bench(arguments: list[str]) -> int:
    """Measure ratios side by side, and save them as a record when asked to."""
    from experiments.bench import conv as bench_conv
    from experiments.bench import updates as benches

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
        net: str | None = None
        """Of steps, step, loop and selection, as the next three: vgg16 of width 1 in batches of 64 by default; step
        measures a slim VGG-11, VGG-13 and ResNet-18 when no net is named."""
        width: float | None = None
        batch_size: int | None = None
        repeats: int = 7
        which: Literal["cpu", "portable", "gpu", "auto"] = "auto"
        """Of conv, as the next three: which list of layers; cpu is that of the native kernels."""
        filter: str = ""
        """Only layers whose name holds this regular expression."""
        rounds: int = 20
        """Samples of each function."""
        engines_python: str | None = None
        """With --which cpu, an interpreter that has onnx, onnxruntime and PyTorch, to be compared with."""
        chain: int = 1
        """With --which cpu, calls of a layer one after the other in one program, as in a net."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = parse(Bench, arguments, "bench")
    if asked.what == "conv":
        print(bench_conv.run(
            asked.which, asked.filter, asked.rounds, asked.out, asked.engines_python, asked.chain
        ))
    else:
        sizes = (asked.net, asked.width, asked.batch_size, asked.repeats)
        print(benches.run(asked.what, *sizes, asked.out))
    return 0


def _bench_deploy(arguments: list[str]) -> int:
    from experiments.bench import deploy as deployed

    path, rest = name_argument(arguments, "bench deploy", "an export PATH, or a net such as vgg13-8x-64x1")

    @dataclasses.dataclass(frozen=True)
    class BenchDeploy:
        """An exported net beside itself in C and dense engines: the native kernels, XLA, and whichever of onnxruntime,
        OpenVINO and PyTorch are here."""

        latency: tuple[int, ...] = deployed.LATENCY
        """Batch sizes for which seconds a call are of interest."""
        throughput: tuple[int, ...] = deployed.THROUGHPUT
        """Batch sizes for which images a second are."""
        rounds: int = deployed.ROUNDS
        """Samples of every form of every engine."""
        starts: int = deployed.STARTS
        """How often each engine is started anew."""
        quick: bool = False
        """Few rounds, and no throughput."""
        tuned: bool = False
        """Measure this net's own ways too, for each batch size; that takes minutes, once."""
        cores: int | None = None
        """That engines may use; all by default."""
        engines_python: str | None = None
        """An interpreter that has onnx, onnxruntime and PyTorch, where this one has not."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = parse(BenchDeploy, rest, f"bench deploy {path}")
    print(deployed.run(path, **dataclasses.asdict(asked)))
    return 0


def _bench_sizes(arguments: list[str]) -> int:
    from experiments.bench import sizes

    @dataclasses.dataclass(frozen=True)
    class BenchSizes:
        """Bytes of the exports of every published recipe; nothing is trained. Takes 20 minutes."""

        out: Path | None = None
        """A JSON file to save the record in."""

    print(sizes.run(parse(BenchSizes, arguments, "bench sizes").out))
    return 0


def _bench_dtypes(arguments: list[str]) -> int:
    from experiments.studies import dtypes

    run, rest = name_argument(arguments, "bench dtypes", "a run folder RUN")

    @dataclasses.dataclass(frozen=True)
    class BenchDtypes:
        """Accuracy and size of a finished run's weights, stored in each dtype."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are now, if not where they were."""
        out: Path | None = None
        """A JSON file to save the record in."""

    asked = parse(BenchDtypes, rest, f"bench dtypes {run}")
    print(dtypes.run(Path(run), asked.data_dir, asked.out))
    return 0


def _bench_torch(arguments: list[str]) -> int:
    from experiments.bench import torch_epochs as bench_torch

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

    asked = parse(BenchTorch, arguments, "bench torch")
    print(bench_torch.run(**dataclasses.asdict(asked)))
    return 0
