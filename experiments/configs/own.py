"""Recipes of our own at the authors' compressions: early, by a better score, towards one target.

Command: python -m experiments train vgg13-cifar10-own-9.0x --data.dir DIR
What is changed against `experiments.configs.published`, all of it for what small nets on lossy images showed on
validation data (not yet measured again on lossless ones): masks are chosen after a tenth of the run and pruned after a
fifth, not in its last third; scores are group Taylor over 16 updates; each layer's share follows from one target.
"64x1" shares patterns and removal by 64 filters, the shape that `pallas_kernels` runs fastest; on small nets it costs
accuracy. At full width shapes are priced by `experiments.configs.price`; the rest is not measured there.
"""

import dataclasses

from experiments.configs import published
from experiments.configs.base import TrainConfig

_BASES = (
    "vgg11-cifar10-8.7x",
    "vgg13-cifar10-9.0x",
    "vgg16-cifar10-8.8x",
    "resnet32_wide-cifar10-8.1x",
    "resnet50_cifar-cifar10-4.5x",
)


def configs() -> list[TrainConfig]:
    """One recipe a net, and the same in tiles."""
    known = {config.name: config for config in published.configs()}
    made = []
    for name in _BASES:
        base = known[name]
        net, dataset, compression = name.rsplit("-", 2)
        prune = dataclasses.replace(
            base.prune,
            fractions=(),
            target=float(compression.removesuffix("x")),
            select_epoch=base.epochs // 10,
            prune_epoch=base.epochs // 5,
            importance="group_taylor",
            importance_steps=16,
        )
        own = dataclasses.replace(
            base, name=f"{net}-{dataset}-own-{compression}", method=prune, expected="our own recipe"
        )
        tiles = dataclasses.replace(own, name=f"{own.name}-64x1", method=dataclasses.replace(prune, tile=(64, 1)))
        made += [own, tiles]
    return made
