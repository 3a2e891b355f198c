"""What there is to run: every named config, what it costs and what it is expected to reach."""

import functools
from collections.abc import Sequence
from typing import Any

from clicktrain_jax import models
from experiments import configs
from experiments.configs import TrainConfig
from experiments.tables import results
from experiments.tables.statistics import mean_spread

# Training images of the whole sets, and their classes.
_SETS = {"digits": (1_198, 10), "cifar10": (50_000, 10), "cifar100": (50_000, 100), "imagenet2012": (1_281_167, 1000)}


def overview() -> str:
    """A line for each config: its work from shapes, its figures from what is published and from the records."""
    records = results.records()
    lines = [f"{'name':<31}{'net':<16}{'epochs':>6}  {'select, prune':<14}{'training work':<15}expected"]
    for config in configs.all_configs().values():
        net = config.net if config.width == 1 else f"{config.net} x{config.width:g}"
        when = "" if config.prune is None else f"{config.prune.select_epoch}, {config.prune.prune_epoch}"
        lines.append(
            f"{config.name:<31}{net:<16}{config.total_epochs:>6}  {when:<14}{_work(config):<15}"
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


@functools.cache
def _multiply_adds(net: str, width: float, num_classes: int) -> int:
    model = models.build(net, num_classes=num_classes, width=width)
    image_shape = models.default_image_shape(net)
    kernels = {layer.path: layer for layer in models.conv_layers(model, image_shape)}
    return sum(
        layer.output_size[0] * layer.output_size[1] * functools.reduce(int.__mul__, layer.kernel_shape)
        for layer in kernels.values()
    )


def _work(config: TrainConfig) -> str:
    count, num_classes = _SETS[config.data.name]
    count = config.data.train_examples or count
    total = 3 * _multiply_adds(config.net, config.width, num_classes) * count * config.total_epochs
    return f"{total / 1e12:,.1f} T" if total < 1e14 else f"{total / 1e12:,.0f} T"
