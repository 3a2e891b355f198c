"""The two steps of a run from its length, as shares."""

import math
import numbers


def schedule(total_steps: int, select: float = 0.1, prune: float = 0.2) -> dict[str, int]:
    """When to select and when to prune, for `clicktrain_jax.clicktrain`, in a run of so many updates.

    Pruning early leaves the pruned net the most updates to recover in. The defaults are those of this project's own
    recipes (``...-own-...``); what other shares cost is a question of ``experiments ablation``, not measured on
    lossless images. The authors' recipes select at about 0.3 and prune at about 0.75, VGG-16 on CIFAR-10 apart
    (0.79 and 0.86). A ``coeff`` to start from is 2.5e-4, the most frequent of theirs, which go from 1.5e-4 to 1.2e-3.

    Args:
        total_steps: updates of the whole run.
        select: share of them that is done when the masks are selected, in [0, 1).
        prune: share of them that is done when the marked weights become zero, above ``select`` and below 1: the
            updates after it are what the pruned net recovers in.

    Returns:
        ``{"select_step": ..., "prune_step": ...}``, both rounded down; with so few updates that they would fall
        together the prune follows the selection by one.

    Raises:
        ValueError: no positive number of updates, shares out of order or out of range, or a run that ends before its
            prune.

    Example:
        >>> schedule(10_000)
        {'select_step': 1000, 'prune_step': 2000}
        >>> # optimizer = ct.clicktrain(inner, plan, **ct.schedule(10_000), coeff=2.5e-4)
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, numbers.Integral) or total_steps < 1:
        raise ValueError(f"total_steps={total_steps!r}: expected a positive integer, the updates of the whole run")
    for name, share in (("select", select), ("prune", prune)):
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= share < 1:
            raise ValueError(f"{name}={share!r}: expected a share of the run in [0, 1), such as 0.2")
    if select >= prune:
        raise ValueError(f"select={select} is not before prune={prune}: masks are chosen first, then pruned")
    # Rounded so that a product such as 0.29 * 100 = 28.999999999999996 gives 29.
    select_step, prune_step = (math.floor(round(share * int(total_steps), 6)) for share in (select, prune))
    prune_step = max(prune_step, select_step + 1)
    if prune_step >= total_steps:
        raise ValueError(
            f"total_steps={total_steps}: the run ends before its prune (select_step={select_step}, "
            f"prune_step={prune_step}); prune earlier, or train for longer"
        )
    return {"select_step": select_step, "prune_step": prune_step}
