"""The recipes that ClickTrain's authors publish, one config each, and the dense run beside them.

Command: python -m experiments train vgg13-cifar10-9.0x --data.dir DIR
Expected: the authors' best test top-1 over all epochs, where they print one (the epochs before the hard prune
count there; compare it with this project's ``best_top1``, and look at ``final_top1``).
Names carry the conv compression over ALL convolutions, shortcuts included, as this project computes it. The
authors leave shortcuts out: their ResNet-50 of 8.35x is 4.5x here, their ResNet-32 of 8.6x is 8.1x.
Each recipe's coefficient is the best published one.
"""

import dataclasses

from experiments.configs.base import PruneConfig, TrainConfig
from experiments.data import DataConfig


@dataclasses.dataclass(frozen=True)
class _Schedule:
    epochs: int
    batch_size: int
    milestones: tuple[int, ...]
    select_epoch: int
    prune_epoch: int
    num_patterns: int


_VGG11 = _Schedule(190, 128, (55, 131), 65, 143, 4)
_VGG13 = _Schedule(190, 128, (55, 131), 60, 148, 4)
_VGG16 = _Schedule(190, 128, (55, 131), 150, 163, 12)
_VGG16_100 = _Schedule(190, 128, (55, 131), 54, 149, 4)
_RESNET = _Schedule(190, 128, (55, 130), 61, 141, 4)
_IMAGENET = _Schedule(95, 256, (31, 61, 75), 35, 78, 4)


def _runs(*runs: tuple[int, int]) -> tuple[int, ...]:
    """``(percent, how many layers)`` pairs, written out."""
    return tuple(percent for percent, count in runs for _ in range(count))


# net, data set, schedule, {compression: (percent of kernels to remove in each layer, coefficient, best top-1)}.
_TABLE: tuple[tuple[str, str, _Schedule, dict[str, tuple[tuple[int, ...], float, float | None]]], ...] = (
    (
        "vgg11",
        "cifar10",
        _VGG11,
        {
            "5.8x": ((35, 45, 45, 55, 55, 65, 75), 2.5e-4, 92.14),
            "8.7x": ((45, 55, 55, 65, 65, 85, 85), 3.5e-4, 92.09),
            "10.3x": ((35, 45, 65, 75, 80, 80, 85), 3.5e-4, 91.69),
            "11.5x": ((45, 65, 66, 75, 78, 85, 88), 2.5e-4, 91.58),
        },
    ),
    (
        "vgg13",
        "cifar10",
        _VGG13,
        {
            "4.0x": ((16, 26, 35, 35, 36, 45, 46, 46, 46), 6.5e-4, 93.70),
            "6.2x": ((25, 45, 55, 55, 55, 65, 65, 65, 65), 7.5e-4, 93.70),
            "9.0x": ((40, 50, 55, 60, 65, 70, 75, 75, 85), 6.5e-4, 93.52),
        },
    ),
    (
        "vgg16",
        "cifar10",
        _VGG16,
        {
            "5.8x": ((35, *_runs((45, 6), (55, 2)), 65, 75, 75), 1.5e-4, None),
            "8.8x": ((35, 45, *_runs((55, 3), (65, 3)), 75, 80, 85, 85), 1.5e-4, None),
        },
    ),
    (
        "resnet32_wide",
        "cifar10",
        _RESNET,
        {
            "8.1x": (_runs((55, 6), (65, 10), (75, 14)), 2.5e-4, None),
            "12.5x": (_runs((65, 6), (75, 10), (85, 14)), 2.5e-4, None),
        },
    ),
    (
        "resnet50_cifar",
        "cifar10",
        _RESNET,
        {
            "4.5x": (_runs((55, 9), (65, 9), (75, 6), (80, 6), (85, 18)), 2.5e-4, None),
            "5.2x": (_runs((65, 6), (75, 9), (80, 9), (85, 6), (90, 18)), 2.5e-4, None),
        },
    ),
    (
        "vgg11",
        "cifar100",
        _VGG11,
        {
            "5.8x": ((35, 45, 45, 55, 55, 65, 75), 8.5e-4, 70.78),
            "7.9x": ((45, 55, 55, 65, 65, 75, 85), 1.2e-3, 69.91),
            "8.4x": ((40, 55, 60, 65, 70, 75, 85), 7.5e-4, 69.60),
            "10.3x": ((45, 55, 65, 75, 75, 80, 88), 1.2e-3, 69.44),
        },
    ),
    (
        "vgg13",
        "cifar100",
        _VGG13,
        {
            "4.3x": ((15, 30, 35, 35, 40, 45, 45, 50, 55), 8.5e-4, None),
            "6.2x": ((25, 45, 55, 55, 55, 65, 65, 65, 65), 2.5e-4, 73.35),
            "8.5x": ((35, 55, 65, 65, 65, 75, 75, 75, 75), 7.5e-4, 72.70),
        },
    ),
    (
        "vgg16",
        "cifar100",
        _VGG16_100,
        {
            "5.8x": ((35, *_runs((45, 6), (55, 2)), 65, 75, 75), 8e-4, None),
            "8.8x": ((35, 45, *_runs((55, 3), (65, 3)), 75, 80, 85, 85), 8e-4, None),
        },
    ),
    ("resnet50", "imagenet2012", _IMAGENET, {"2.3x": (_runs((25, 18), (35, 9), (45, 12), (55, 9)), 2.5e-4, None)}),
)


def _dense(net: str, dataset: str, schedule: _Schedule) -> TrainConfig:
    # ImageNet is streamed, in random-resized crops.
    streamed = dataset == "imagenet2012"
    return TrainConfig(
        name=f"{net}-{dataset}-dense",
        net=net,
        data=DataConfig(dataset, image_size=224 if streamed else None),
        crop_padding=0 if streamed else 4,
        epochs=schedule.epochs,
        batch_size=schedule.batch_size,
        lr_milestones=schedule.milestones,
        # The dense run gets the same mixup schedule as the pruned ones: the comparison must be fair.
        mixup_epoch=schedule.prune_epoch,
        expected="not published; the dense run beside the pruned ones",
    )


def configs() -> list[TrainConfig]:
    """All published recipes, each group with its dense run."""
    made = []
    for net, dataset, schedule, variants in _TABLE:
        dense = _dense(net, dataset, schedule)
        made.append(dense)
        for compression, (percents, coeff, best) in variants.items():
            prune = PruneConfig(
                fractions=tuple(percent / 100 for percent in percents),
                coeff=coeff,
                select_epoch=schedule.select_epoch,
                prune_epoch=schedule.prune_epoch,
                num_patterns=schedule.num_patterns,
            )
            expected = "not published" if best is None else f"best test top-1 {best:.2f} published"
            name = f"{net}-{dataset}-{compression}"
            made.append(dataclasses.replace(dense, name=name, method=prune, expected=expected))
    return made
