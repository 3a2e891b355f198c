"""What there is to run: every named config, what it costs and what it is expected to reach."""

from collections.abc import Sequence
from typing import Any

from experiments import configs
from experiments.configs import TrainConfig
from experiments.configs.work import planned_multiply_adds
from experiments.report import results
from experiments.report.statistics import mean_spread


def overview() -> str:
    """A line for each config: its work from shapes, its figures from what is published and from the records."""
    records = results.records()
    lines = [f"{'name':<37}{'net':<16}{'epochs':>6}  {'select, prune':<14}{'training work':<15}expected"]
    for config in configs.all_configs().values():
        net = config.net if config.width == 1 else f"{config.net} x{config.width:g}"
        when = "" if config.prune is None else f"{config.prune.select_epoch}, {config.prune.prune_epoch}"
        lines.append(
            f"{config.name:<37}{net:<16}{config.total_epochs:>6}  {when:<14}{_work(config):<15}"
            f"{config.expected}; {measured(config, records)}"
        )
    lines.append(
        "\nTraining work: dense multiply-adds, forward and backward, 1 T = 1e12. Published figures are best epochs; "
        "measured ones are final epochs, mean ± standard deviation."
    )
    return "\n".join(lines)


def measured(config: TrainConfig, records: Sequence[dict[str, Any]]) -> str:
    """What the committed records say of a config as it stands (its seed and where its data lie apart)."""
    mine = [record for record in records if record["name"] == config.name and results.is_record_of(record, config)]
    if not mine:
        return "not measured here"
    top1 = mean_spread([record["final_top1"] for record in mine], scale=100)
    seconds = mean_spread([record["train_and_compile_seconds"] for record in mine], digits=0)
    return f"measured {top1} (n={len(mine)}, {mine[0]['encoding']} images), {seconds} s on {results.machine(mine[0])}"


def _work(config: TrainConfig) -> str:
    total = planned_multiply_adds(config)
    return f"{total / 1e12:,.1f} T" if total < 1e14 else f"{total / 1e12:,.0f} T"
