"""Commands that measure side by side."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from experiments.commands.arguments import PROGRAM, DataDir, Run, call

Command = Callable[..., int]
USAGE = f"""usage: {PROGRAM} bench WHAT ...

  collectives  bytes of an update's all-reduce, whole gradients against retained weights
  steps        VGG-16 updates of every phase against the plain optax step, and the selection
  step         whole training updates, dense against pruned by patterns
  loop         an epoch as one compiled loop against one call an update
  selection    the choice of the masks alone, with each option
  conv         convolutions and their gradients by patterns against the dense ones, layer by layer
  gpu          what is still to be measured on a GPU, in order of worth; goes on where it stopped
  deploy PATH  an export beside dense engines: latency, throughput, memory, startup, size
  dtypes RUN   what storing a run's weights in fewer bits costs
  input        images a second of the input pipeline for large sets, against decoding alone
  latency      whole nets as fast as a target in time asked, on an idle machine
  sizes        bytes of the exports of every published recipe
  torch        training in images a second beside an eager PyTorch loop with a host loader

`{PROGRAM} bench WHAT --help` lists the options of each.
"""


def bench(arguments: list[str]) -> int:
    """Measure ratios side by side, and save them as a record when asked to."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    what, *rest = arguments or ["steps"]
    if what.startswith("-"):
        what, rest = "steps", arguments
    made = {"deploy": _deploy, "torch": _torch}
    made |= {name: functools.partial(_updates, name) for name in ("steps", "step", "loop", "selection")}
    plain = {
        "collectives": _collectives,
        "conv": _conv,
        "dtypes": _dtypes,
        "input": _input,
        "latency": _latency,
        "sizes": _sizes,
    }
    if what not in made | plain:
        raise ValueError(f"unknown bench {what!r}: expected one of gpu, {', '.join(sorted(made | plain))}")
    return call(plain[what] if what in plain else made[what](), rest, f"bench {what}")


def _updates(what: str) -> Command:
    from experiments.bench import updates

    def run(
        net: str | None = None,
        width: float | None = None,
        batch_size: int | None = None,
        repeats: int = 7,
        out: Path | None = None,
    ) -> int:
        """Measure whole updates side by side in one process.

        Args:
            net: vgg16 of width 1 in batches of 64 by default; step measures a slim VGG-11, VGG-13 and ResNet-18 when no
                net is named.
            width: of the net.
            batch_size: images an update.
            repeats: samples of each function.
            out: a JSON file to save the record in.
        """
        print(updates.run(what, net, width, batch_size, repeats, out))
        return 0

    return run


def _conv(
    which: Literal["cpu", "portable", "gpu", "auto"] = "auto",
    filter: str = "",
    rounds: int = 20,
    engines_python: str | None = None,
    chain: int = 1,
    out: Path | None = None,
) -> int:
    """Convolutions and their gradients by patterns against the dense ones, layer by layer.

    Args:
        which: list of layers; cpu is that of the native kernels.
        filter: only layers whose name holds this regular expression.
        rounds: samples of each function.
        engines_python: with --which cpu, an interpreter that has onnx, onnxruntime and PyTorch, to be compared with.
        chain: with --which cpu, calls of a layer one after the other in one program, as in a net.
        out: a JSON file to save the record in.
    """
    from experiments.bench import conv

    print(conv.run(which, filter, rounds, out, engines_python, chain))
    return 0


def _deploy() -> Command:
    from experiments.bench import deploy

    def run(
        path: Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]],
        latency: tuple[int, ...] = deploy.LATENCY,
        throughput: tuple[int, ...] = deploy.THROUGHPUT,
        rounds: int = deploy.ROUNDS,
        starts: int = deploy.STARTS,
        quick: bool = False,
        tuned: bool = False,
        cores: int | None = None,
        engines_python: str | None = None,
        out: Path | None = None,
    ) -> int:
        """An exported net beside itself in C and dense engines: native kernels, XLA, onnxruntime and OpenVINO.

        Args:
            path: an export, or a net such as vgg13-8x-64x1.
            latency: batch sizes for which seconds a call are of interest.
            throughput: batch sizes for which images a second are.
            rounds: samples of every form of every engine.
            starts: how often each engine is started anew.
            quick: few rounds, and no throughput.
            tuned: measure this net's own ways too, for each batch size; that takes minutes, once.
            cores: that engines may use; all by default.
            engines_python: an interpreter that has onnxruntime or OpenVINO, where this one has not.
            out: a JSON file to save the record in.
        """
        print(
            deploy.run(
                path,
                latency=latency,
                throughput=throughput,
                rounds=rounds,
                starts=starts,
                quick=quick,
                tuned=tuned,
                cores=cores,
                engines_python=engines_python,
                out=out,
            )
        )
        return 0

    return run


def _collectives(out: Path | None = None) -> int:
    """Bytes of an update's all-reduce, whole gradients against retained weights, recipe by recipe. Nothing is trained.

    Args:
        out: a JSON file to save the record in.
    """
    from experiments.bench import collectives

    print(collectives.run(out))
    return 0


def _input(photos: int = 256, batch_size: int = 64, threads: int | None = None, out: Path | None = None) -> int:
    """Images a second that the input pipeline brings to the device, against decoding alone. Takes a minute or two.

    Args:
        photos: files of ImageNet's size that are made for it.
        batch_size: images.
        threads: that read and decode; one for each core by default, 16 at most.
        out: a JSON file to save the record in.
    """
    from experiments.bench import input as input_bench

    print(input_bench.run(out, photos=photos, batch_size=batch_size, threads=threads))
    return 0


def _latency(out: Path | None = None) -> int:
    """Ask nets for a speed, and measure what they reach. Takes a quarter of an hour on an idle machine.

    Args:
        out: a JSON file to save the record in.
    """
    from experiments.bench import latency_target

    print(latency_target.run(out))
    return 0


def _sizes(out: Path | None = None) -> int:
    """Bytes of the exports of every published recipe; nothing is trained. Takes 20 minutes.

    Args:
        out: a JSON file to save the record in.
    """
    from experiments.bench import sizes

    print(sizes.run(out))
    return 0


def _dtypes(run: Run, data_dir: DataDir = None, out: Path | None = None) -> int:
    """Accuracy and size of a finished run's weights, stored in each dtype.

    Args:
        run: the run folder.
        data_dir: where the images are now, if not where they were.
        out: a JSON file to save the record in.
    """
    from experiments.studies import dtypes

    print(dtypes.run(run, data_dir, out))
    return 0


def _torch() -> Command:
    from experiments.bench import torch_epochs

    def run(
        torch_python: str | None = None,
        net: str = "vgg13",
        width: float = 0.25,
        batch_size: int = 128,
        images: int = 2560,
        rounds: int = torch_epochs.ROUNDS,
        workers: int | None = None,
        out: Path | None = None,
    ) -> int:
        """The training loop beside an eager PyTorch loop with a host loader, in images a second.

        Args:
            torch_python: an interpreter that has PyTorch, NumPy and Pillow, where this one has not.
            net: which is trained.
            width: of the net.
            batch_size: images an update.
            images: of an epoch.
            rounds: epochs of each that count.
            workers: processes of PyTorch's loader; one for each core by default.
            out: a JSON file to save the record in.
        """
        print(
            torch_epochs.run(
                torch_python=torch_python,
                net=net,
                width=width,
                batch_size=batch_size,
                images=images,
                rounds=rounds,
                workers=workers,
                out=out,
            )
        )
        return 0

    return run
