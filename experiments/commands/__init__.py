"""What each command of the command line does: from its arguments to the exit code."""

import functools
from collections.abc import Callable

from experiments.commands import benches, runs, studies
from experiments.commands.arguments import call

_PLAIN = {
    "evaluate": runs.evaluate,
    "export": runs.export,
    "list": runs.list_configs,
    "demo": runs.demo,
    "patterns": runs.patterns,
    "ablation": studies.ablation,
    "compare": studies.compare,
    "table": studies.table,
    "pack-data": runs.pack_data,
    "prepare-data": runs.prepare_data,
}
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": runs.train,
    "bench": benches.bench,
    "importance": studies.importance,
    **{name: functools.partial(call, function, command=name) for name, function in _PLAIN.items()},
}

__all__ = ["COMMANDS"]
