"""The price of a shape at full width: one recipe, its kernels removed one by one or in ever larger tiles.

Command: python -m experiments bench gpu --out DIR --data.dir PACKED   (or `train price-vgg13-dense` and so on)
VGG-13 on CIFAR-10 in bfloat16, 60 epochs with the published milestones and mixup in proportion. All nets but the dense
one keep a ninth of the convolutions' weights; masks are chosen after a tenth of the run and pruned after a fifth, as in
`experiments.configs.own`. Tiles of (filters, channels) share patterns and removal; in wide ones channels may be
emptied, or 9x would be out of reach. Two narrow nets stand beside them: of as many weights as the pruned nets keep,
and of as many multiply-adds as the one without tiles keeps, which only its finished run can tell.
"""

import bisect
import dataclasses
from typing import Any

from experiments.configs import own, published
from experiments.configs.base import LoopConfig, TrainConfig
from experiments.configs.work import conv_work, stretched

GROUP = "price"
EPOCHS = 60
TILES = ((1, 1), (64, 1), (64, 16), (64, 64))


def configs() -> list[TrainConfig]:
    """The dense net, one pruned net for each of `TILES`, and the narrow net of as many weights."""
    dense = _shortened(published, "vgg13-cifar10-dense")
    base = _shortened(own, "vgg13-cifar10-own-9.0x")
    made = [dataclasses.replace(dense, name=f"{GROUP}-vgg13-dense")]
    for tile in TILES:
        wide = tile[1] > 1
        prune = dataclasses.replace(base.prune, tile=tile, floor=False if wide else None)
        name = f"{GROUP}-vgg13-own-9.0x-{tile[0]}x{tile[1]}"
        made.append(dataclasses.replace(base, name=name, method=prune))
    weights, _ = conv_work(dense.net, 1.0)
    return [*made, narrow("weights", round(weights / base.prune.target))]


def narrow(what: str, amount: int) -> TrainConfig:
    """A dense net of as many convolution "weights" or "multiply-adds" (of one image), to the nearest width in 64ths.

    Args:
        what: which of the two.
        amount: how many.

    Raises:
        ValueError: another word; an amount that no width below the whole net comes near to.
    """
    kinds = ("weights", "multiply-adds")
    if what not in kinds:
        raise ValueError(f"what={what!r}; expected one of {kinds}")
    dense = _shortened(published, "vgg13-cifar10-dense")
    which = kinds.index(what)
    whole = conv_work(dense.net, 1.0)[which]
    if not 0 < amount <= whole:
        raise ValueError(f"amount={amount} {what}; expected 1 to {whole}, what the whole {dense.net} has")
    # The first width that has as much; the one before it may be nearer.
    channels = bisect.bisect_left(range(1, 65), amount, key=lambda count: conv_work(dense.net, count / 64)[which]) + 1
    near = [count / 64 for count in (channels - 1, channels) if count]
    width = min(near, key=lambda width: abs(conv_work(dense.net, width)[which] - amount))
    return dataclasses.replace(dense, name=f"{GROUP}-vgg13-narrow-{what}", width=width)


def _shortened(family: Any, name: str) -> TrainConfig:
    """A family's recipe in `EPOCHS` epochs, the rest in proportion, in bfloat16, last batches of 80 images dropped.

    Such a batch is a second whole program of every phase, and a GPU run of this length is half compiling as it is.
    """
    config = next(config for config in family.configs() if config.name == name)

    return dataclasses.replace(
        stretched(config, EPOCHS),
        precision="bfloat16",
        partial_batch="drop",
        expected="the price of a shape",
        loop=LoopConfig(eval_every_epochs=5, checkpoint_every_epochs=EPOCHS),
    )
