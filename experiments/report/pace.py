"""How long a run takes: as its records say, at the pace of other records from the same machine, or by assumption."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments import configs
from experiments.configs import TrainConfig
from experiments.configs.work import SET_SIZES, planned_multiply_adds
from experiments.report import published, results

# Assumed until something was measured on the machine: a card's share of its peak in bfloat16; the peak of one that is
# not in `published.PEAK_FLOPS`; what a CPU core does; seconds of compiling.
SHARE_OF_PEAK = 0.15
OTHER_PEAK_FLOPS = 150e12
CPU_CORE_FLOPS = 4e10
COMPILE_S = 60.0
_SETS = ("cifar10", "cifar100")
_RECORDS = "records of this machine"
_ASSUMED = "no record of this machine: an assumed pace"


class Pace(NamedTuple):
    """What is known of this machine's pace.

    Attributes:
        found: records that were made on it, alone on their device.
        where: `experiments.records.setting` of it.
    """

    found: Sequence[dict[str, Any]]
    where: dict[str, Any]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], where: dict[str, Any]) -> "Pace":
        """Of a machine, from all records."""
        here = results.machine({"setting": where})
        alone = [
            record
            for record in records
            if record["setting"].get("runs_at_once", 1) == 1 and not record["setting"].get("shared_cores")
        ]
        return cls([record for record in alone if results.machine(record) == here], where)

    @property
    def source(self) -> str:
        """Where its figures come from."""
        return _RECORDS if self.found else _ASSUMED

    def seconds(self, config: TrainConfig) -> float | None:
        """Of a whole run; None for a data set whose size is not known before it is read."""
        if config.data.train_examples is None and config.data.name not in SET_SIZES:
            return None
        device = self.where["device"]
        return estimate_seconds(config, device["platform"], device["kind"], self.found, self.where["cpu"]["cores"])

    def has(self, config: TrainConfig) -> bool:
        """Whether this very run was made here: its time is measured."""
        return any((one["name"], one["epochs"]) == (config.name, config.total_epochs) for one in self.found)


def hours(seconds: float) -> str:
    """``5000.0`` -> ``"1.4 h"``; below an hour in minutes."""
    whole = seconds / 3600
    if whole < 1:
        return f"{max(seconds / 60, 1):.0f} min"
    return f"{whole:,.1f} h" if whole < 100 else f"{whole:,.0f} h"


def estimate_seconds(config: TrainConfig, kind: str, device: str, found: Sequence[dict[str, Any]], cores: int) -> float:
    """Seconds of a whole run, compiling and evaluation among them.

    Args:
        config: the run.
        kind: "gpu" or "cpu".
        device: jax's name of it.
        found: records made on this machine; of the same config they are the estimate, of the same net, or else of any,
            they give the pace in multiply-adds.
        cores: of a CPU.
    """

    def whole(record: dict[str, Any]) -> float:
        return record["train_and_compile_seconds"] + record["eval_seconds"]

    same = [record for record in found if (record["name"], record["epochs"]) == (config.name, config.total_epochs)]
    if same:
        return statistics.fmean(map(whole, same))
    work = planned_multiply_adds(config)
    known = configs.all_configs()
    measured = [record for record in found if record["name"] in known and known[record["name"]].data.name in _SETS]
    near = [record for record in measured if record["net"] == config.net] or measured
    if near:
        return work * sum(map(whole, near)) / sum(planned_multiply_adds(known[record["name"]]) for record in near)
    if kind == "gpu":
        flops = SHARE_OF_PEAK * (published.peak_flops(device) or OTHER_PEAK_FLOPS)
    else:
        flops = cores * CPU_CORE_FLOPS
    return 2 * work / flops + COMPILE_S
