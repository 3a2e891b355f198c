"""The command line: ``python -m experiments COMMAND ...``, installed ``clicktrain COMMAND ...``.

Whatever a user gets wrong ends in one sentence and exit code 2 (CLICKTRAIN_TRACEBACK=1 shows where it came from), a
missing package too. A run stopped by a signal exits with 128 + its number, a diverged one with 1.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import clicktrain_jax
from clicktrain_jax import extras

USAGE = """usage: python -m experiments COMMAND ...

  train NAME [--seed N] [--workdir DIR] [--data.dir DIR] [any field of the config]
                       train a named config; an existing run folder of the same config is resumed
                       (--lengthen --epochs N gives one more epochs)
  evaluate PATH [--data.dir DIR]
                       accuracy of a run's newest checkpoint, or of an export, on the run's evaluation set
  export RUN [--out DIR] [--dtype float32|bfloat16|float16|int8] [--onnx] [--no-timing] [--data.dir DIR]
                       a finished run as a small folder, ready to be run, with a page about it
  list [WORD]          the named configs: how long each takes here, and what it is expected to reach
  demo                 dense and ClickTrain on embedded images, three seeds, one table, one plot
  patterns RUN [--out FILE]
                       a picture of a finished run's pattern set, and of where each pattern is used
  ablation [--data.dir DIR] [--workdir DIR] [--minutes M] [--workers W] [--records DIR]
                       what each option of the selection costs or wins, by successive halving
  compare STUDY [--data.dir DIR] [--workdir DIR] [--minutes M] [--workers W] [--records DIR]
                       ClickTrain beside dense, narrow, pruning after and during training; STUDY: digits, slim, vgg13
  importance --out FILE [--data.dir DIR] [--quick]
                       how well each criterion predicts what removing a kernel does to the loss
  bench WHAT           ratios measured side by side: steps, step, loop, selection, conv
  bench gpu --out DIR [--data.dir PACKED] [--seconds N] [--only REGEX] [--at-once N] [--smoke]
                       what is still to be measured on a GPU, in order of worth; goes on where it stopped
  bench deploy PATH [--engines-python PYTHON] [--cores N] [--tuned] [--quick] [--out FILE]
                       an export beside dense engines: latency, throughput, memory, startup, size
  bench dtypes RUN [--data.dir DIR]
                       what storing a run's weights in fewer bits costs
  bench latency        whole nets as fast as a target in time asked
  bench sizes          bytes of the exports of every published recipe
  bench torch [--torch-python PYTHON] [--net NAME] [--width W] [--out FILE]
                       training in images a second beside an eager PyTorch loop with a host loader
  table [--write]      RESULTS.md, BENCHMARKS.md and CSV files from the committed records
  table --budget KIND-Nmin [--dry-run] [--data.dir DIR] [--workdir DIR]
                       train what is missing of the published tables, in order of worth; KIND: gpu or cpu
  prepare-data --from FOLDER --name NAME [--data.dir DIR]
                       a TFDS data set of a folder of images, train/CLASS/FILE and test/CLASS/FILE (or val/)
  pack-data --out FILE --data.dir DIR [--data.name NAME] [--parts N]
                       a data set as one archive, readable without TFDS, whole or in parts

COMMAND --help lists all options of a command; --version says the version.
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"clicktrain-jax {clicktrain_jax.__version__}")
        return 0
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    # What goes wrong in a package that we use reaches the user as an error or a warning of ours.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return _run(*arguments)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("CLICKTRAIN_TRACEBACK"):
            raise
        print(f"error: {_in_a_sentence(error)}", file=sys.stderr)
        return 2


def _run(name: str, *rest: str) -> int:
    if (name, *rest[:1]) == ("bench", "gpu"):
        # Apart from the other commands: a machine with a GPU may lack what reads their arguments.
        from experiments.bench.gpu import main as command

        rest = rest[1:]
    else:
        from experiments.commands import COMMANDS

        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
        command = COMMANDS[name]
    from experiments.train.loop import Interrupted, NonFiniteLoss

    try:
        return command(list(rest))
    except Interrupted as stop:
        return 128 + stop.signal_number
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _in_a_sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and "pip install" not in str(error):
        return f"{error.name} is not installed: {extras.hint('experiments')}"
    return str(error)


def program() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    program()
