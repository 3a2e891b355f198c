"""ResNet-50 on ImageNet in large batches: the authors' schedule at a rate in proportion to the batch.

Command: python -m experiments train resnet50-imagenet2012-1024-2.3x --data.dir DIR
DIR holds train/CLASS/FILE and val/CLASS/FILE, or TFDS's imagenet2012 in array_record form. Crops of 224 pixels,
batches of 1,024 at 0.4 (0.1 for 256) after a warm-up of five epochs, as Goyal et al. (arXiv 1706.02677) have it, with
their weight decay; smoothed labels; selection, prune and coefficient are those of `experiments.configs.published`.
Expected of the dense net: 76%. Neither is measured; hours on GPUs are estimated in docs/plan-for-scale.md. A
batch that does not fit a device wants --accumulate, or a smaller --batch-size and a rate in proportion.
"""

import dataclasses

from experiments.configs import published
from experiments.configs.base import TrainConfig

BATCH_SIZE = 1024


def configs() -> list[TrainConfig]:
    """``resnet50-imagenet2012-1024-dense``, and the same pruned 2.3x over all convolutions."""
    made = []
    for config in published.configs():
        if config.data.name == "imagenet2012":
            net, dataset, what = config.name.rsplit("-", 2)
            large = dataclasses.replace(
                config,
                name=f"{net}-{dataset}-{BATCH_SIZE}-{what}",
                batch_size=BATCH_SIZE,
                partial_batch="drop",
                learning_rate=0.1 * BATCH_SIZE / 256,
                warmup_epochs=5,
                weight_decay=1e-4,
                label_smoothing=0.1,
                precision="bfloat16",
                expected="76% expected" if what == "dense" else "not known",
            )
            made.append(large)
    return made
