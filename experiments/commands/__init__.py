"""What each command of the command line does. Each takes its arguments and returns the exit code."""

from experiments.commands.benches import bench
from experiments.commands.runs import (
    demo,
    describe,
    evaluate,
    export,
    list_configs,
    pack_data,
    patterns,
    prepare_data,
    train,
)
from experiments.commands.studies import ablation, compare, importance, table

__all__ = [
    "ablation",
    "bench",
    "compare",
    "demo",
    "describe",
    "evaluate",
    "export",
    "importance",
    "list_configs",
    "pack_data",
    "patterns",
    "prepare_data",
    "table",
    "train",
]
