"""What there is to run: every named config, what it costs and what it is expected to reach."""

from collections.abc import Sequence
from typing import Any

from experiments import configs
from experiments.configs import TrainConfig
from experiments.records import setting
from experiments.report import results
from experiments.report.pace import Pace, hours
from experiments.report.statistics import coding, mean_spread


def overview(word: str = "") -> str:
    """A line for each config: its time on this machine, its figures from what is published and from the records.

    Args:
        word: only configs that have it in their name, net or data set.

    Raises:
        ValueError: there are none.
    """
    records = results.records()
    pace = Pace.of(records, setting())
    chosen = [config for config in configs.all_configs().values() if word.lower() in _words(config)]
    if not chosen:
        raise ValueError(f"no recipe has {word!r} in its name, net or data set; without a word all are listed")
    width = 2 + max(len(config.name) for config in chosen)
    lines = [f"{'name':<{width}}{'net':<16}{'epochs':>6}  {'time here':<11}expected"]
    for config in chosen:
        net = config.net if config.width == 1 else f"{config.net} x{config.width:g}"
        lines.append(
            f"{config.name:<{width}}{net:<16}{config.total_epochs:>6}  {_time(config, pace):<10} "
            f"{config.expected}; {measured(config, records)}"
        )
    lines.append(
        f"\nTime here: of one run on this machine, with all its epochs; ~ is an estimate ({pace.source}). Published "
        "figures are best epochs; measured ones are final epochs, mean ± standard deviation."
    )
    return "\n".join(lines)


def _words(config: TrainConfig) -> str:
    return f"{config.name} {config.net} {config.data.name}".lower()


def _time(config: TrainConfig, pace: Pace) -> str:
    seconds = pace.seconds(config)
    return "unknown" if seconds is None else f"{'' if pace.has(config) else '~'}{hours(seconds)}"


def measured(config: TrainConfig, records: Sequence[dict[str, Any]]) -> str:
    """What the committed records say of a config as it stands (its seed and where its data lie apart)."""
    mine = [record for record in records if record["name"] == config.name and results.is_record_of(record, config)]
    if not mine:
        return "not measured here"
    top1 = mean_spread([record["final_top1"] for record in mine], scale=100)
    text = f"measured {top1} (n={len(mine)}, {coding(mine[0]['encoding'])} images)"
    # Those of runs whose cores did other work say nothing.
    alone = [record for record in mine if not record["setting"].get("shared_cores")]
    if alone:
        seconds = mean_spread([record["train_and_compile_seconds"] for record in alone], digits=0)
        text += f", {seconds} s on {results.machine(alone[0])}"
    return text
