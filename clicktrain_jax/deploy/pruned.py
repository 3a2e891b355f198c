"""Whether weights have the zeros that their masks tell of."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import numpy as np

from clicktrain_jax.deploy.fold import Folded
from clicktrain_jax.trees import Tree, map_named, named_leaves

# Largest difference of the same image's answers, against the largest number.
_SAME = 0.05
# How many numbers of an answer are kept.
_PROBED = 16


def check_zeros(arrays: Mapping[str, Any], masks: Mapping[str, np.ndarray | None], advice: str) -> None:
    """Raise a ValueError for weights that are removed by their mask and not zero, as between selection and prune.

    Args:
        arrays: by the masks' names; traced ones cannot be looked at and are not.
        masks: bool arrays of the same shapes, or None.
        advice: what to do.
    """
    counts = {}
    for name, array in arrays.items():
        mask = masks.get(name)
        if mask is None or array is None or isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        counts[name] = int(np.count_nonzero(np.asarray(array)[~mask]))
    total = sum(counts.values())
    if total:
        worst = max(counts, key=counts.__getitem__)
        raise ValueError(
            f"{total} weights are marked by the masks, but not yet zero ({worst!r} has {counts[worst]}): the selection "
            f"is done, the prune is not. Train on to the prune, or {advice}"
        )


def zeroed(tree: Tree, masks: Mapping[str, np.ndarray]) -> Tree:
    """The tree with +0 where masks, by the tree's own names, remove."""

    def zero(name: str, leaf: Any) -> Any:
        mask = masks.get(name)
        return leaf if leaf is None or mask is None else np.where(mask, np.asarray(leaf), np.zeros((), leaf.dtype))

    return map_named(zero, tree)


def check_is_inference(folded: Folded) -> list[float]:
    """Raise a ValueError if an image's answer depends on the other images of its batch, as in training mode.

    Returns:
        The first numbers that the net answers to an image that is always the same one, for `check_probe`; none where
        they are not finite.
    """
    images = np.random.default_rng(0).random((3, *folded.image_shape), np.float32)
    import pallas_kernels

    # As loaded nets are compiled: XLA may have a net that computes in 16 bits read memory nobody has written.
    function = jax.jit(folded.function, compiler_options=pallas_kernels.compiler_options(np.float16))
    pairs = (jax.device_put(images[begin : begin + 2]) for begin in (0, 1))
    one, other = (np.asarray(function(folded.arrays, pair), np.float32) for pair in pairs)
    if len(one) == 2 and np.abs(one[1] - other[0]).max() > _SAME * max(float(np.abs(one[1]).max()), 1e-3):
        raise ValueError(
            "an image's answer depends on the images beside it: apply_fn runs in training mode. Give it as in "
            "evaluation, BatchNorm by its running statistics and without dropout (train=False, model.eval())"
        )
    probe = one[0].ravel()[:_PROBED]
    return [float(f"{value:.4g}") for value in probe] if np.isfinite(probe).all() else []


def check_probe(found: list[float], exported: list[float]) -> None:
    """Warn where a loaded function does not answer as the one that was exported did."""
    if not (found and exported):
        return
    largest = max(map(abs, exported))
    if len(found) != len(exported) or np.abs(np.subtract(found, exported)).max() > _SAME * largest:
        warnings.warn(
            "apply_fn does not answer as the function that was exported did: it is another one, or it takes the "
            "variables in another order or as other containers than nested dictionaries of their names. Give like=, a "
            "tree with its containers, or the same function",
            stacklevel=3,
        )


def by_name(tree: Tree) -> dict[str, Any]:
    """``{name: leaf}``."""
    return dict(named_leaves(tree))
