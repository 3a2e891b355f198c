"""Commands that measure side by side: each is the ``run`` of a module of `experiments.bench`, with its parameters."""

import functools
from collections.abc import Callable
from pathlib import Path

import tyro

from experiments.commands.arguments import PROGRAM, DataDir, Run, call

USAGE = f"""usage: {PROGRAM} bench WHAT ...

  collectives  bytes of an update's all-reduce, whole gradients against retained weights
  steps        VGG-16 updates of every phase against the plain optax step, and the selection
  update       optimizers' updates alone, wrapped in every phase against plain ones
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
    known = _benches()
    if what not in known:
        raise ValueError(f"unknown bench {what!r}: expected one of gpu, {', '.join(sorted(known))}")
    print(call(known[what], rest, f"bench {what}", config=(tyro.conf.PositionalRequiredArgs,)))
    return 0


def _benches() -> dict[str, Callable[..., str]]:
    """What measures and returns tables, by name."""
    from experiments.bench import collectives, conv, deploy, latency_target, sizes, torch_epochs, updates
    from experiments.bench import input as input_bench

    return {
        **{name: functools.partial(updates.run, name) for name in ("steps", "update", "step", "loop", "selection")},
        "collectives": collectives.run,
        "conv": conv.run,
        "deploy": deploy.run,
        "dtypes": _dtypes,
        "input": input_bench.run,
        "latency": latency_target.run,
        "sizes": sizes.run,
        "torch": torch_epochs.run,
    }


def _dtypes(run: Run, data_dir: DataDir = None, out: Path | None = None) -> str:
    """Accuracy and size of a finished run's weights, stored in each dtype.

    Args:
        run: the run folder.
        data_dir: where the images are now, if not where they were.
        out: a JSON file to save the record in.
    """
    from experiments.studies import dtypes

    return dtypes.run(run, data_dir, out)
