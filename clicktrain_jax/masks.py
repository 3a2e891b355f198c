"""Masks: which taps and which kernels stay; building, applying, combining and checking them.

Masks are two boolean trees with the parameters' containers, True where a weight stays: ``pattern`` (each
kernel keeps its pattern's taps) and ``kernel`` (whole kernels removed). The two are chosen independently
of one another and a weight stays when both say so.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clicktrain_jax.convolutions import FROM_HWIO
from clicktrain_jax.trees import Tree, map_named, placed_like, replicated


class Masks(NamedTuple):
    """Two trees like the parameters; at each leaf bool (kh, kw, cin, cout), or None where that kind does not apply.

    A 3x3 layer that is pruned has both, a 1x1 layer has ``kernel`` alone, a dense leaf has neither.
    """

    pattern: Tree
    kernel: Tree


class LayerChoice(NamedTuple):
    """What was chosen for one layer.

    Attributes:
        pattern_ids: uint8 (cin, cout), the index of each kernel's pattern; None for 1x1 layers.
        kernel: bool (cin, cout), True where the kernel stays; (cout, cin, 1, 1) for a leaf that is OIHW.
        patterns: bool (P, kh, kw), the set that the ids index; None for 1x1 layers.
    """

    pattern_ids: jax.Array | None
    kernel: jax.Array
    patterns: jax.Array | None


def expand(choice: LayerChoice) -> tuple[jax.Array | None, jax.Array]:
    """A layer's choice as full boolean masks ``(pattern or None, kernel)``, each of the leaf's shape and layout.

    That is (kh, kw, cin, cout), and OIHW where the choice's ``kernel`` is (cout, cin, 1, 1).
    """
    choice = jax.tree.map(replicated, choice)
    if choice.kernel.ndim == 4:
        masks = expand(choice._replace(kernel=choice.kernel[:, :, 0, 0].T))
        return tuple(None if mask is None else mask.transpose(FROM_HWIO["OIHW"]) for mask in masks)
    if choice.pattern_ids is None:
        return None, choice.kernel[None, None]
    patterns = jnp.asarray(choice.patterns)
    kh, kw = patterns.shape[1:]
    shape = (kh, kw, *choice.kernel.shape)
    kernel = jnp.broadcast_to(choice.kernel[None, None], shape)
    if kh * kw > 32:
        return jnp.moveaxis(patterns[choice.pattern_ids], (2, 3), (0, 1)), kernel
    # One table look-up a kernel (its taps as bits of a word), then a bit test a tap: a gather of whole
    # patterns would read nine times as many entries.
    weights = jnp.left_shift(jnp.uint32(1), jnp.arange(kh * kw, dtype=jnp.uint32))
    table = jnp.sum(
        jnp.where(patterns.reshape(-1, kh * kw), weights, jnp.uint32(0)), axis=1, dtype=jnp.uint32
    )
    words = table[choice.pattern_ids]
    taps = jnp.arange(kh * kw, dtype=jnp.uint32)[:, None, None]
    pattern = (jnp.right_shift(words[None], taps) & jnp.uint32(1)).astype(bool)
    return pattern.reshape(shape), kernel


def build_masks(tree: Tree, layer_masks: dict[str, tuple[Any, Any]]) -> Masks:
    """Masks with the containers of ``tree`` from ``{name: (pattern, kernel)}``; None elsewhere."""
    nothing = (None, None)
    return Masks(
        pattern=map_named(lambda name, _: layer_masks.get(name, nothing)[0], tree),
        kernel=map_named(lambda name, _: layer_masks.get(name, nothing)[1], tree),
    )


def combine(masks: Masks) -> Tree:
    """One boolean tree, True where a weight stays; None at dense leaves."""

    def both(_: str, pattern: Any, kernel: Any) -> Any:
        if pattern is None or kernel is None:
            return kernel if pattern is None else pattern
        return pattern & kernel

    return map_named(both, masks.pattern, masks.kernel, what="masks.kernel")


def apply_masks(params: Tree, masks: Masks) -> Tree:
    """Set every masked weight to exactly zero.

    Args:
        params: tree of arrays.
        masks: `Masks` of that tree; None leaves are left as they are.

    Returns:
        The same tree, same dtypes, +0.0 where masked (also where the weight was NaN or infinite).

    Raises:
        ValueError: masks of another tree, or of other shapes.
    """

    def mask(name: str, weight: Any, keep: Any) -> Any:
        if weight is None or keep is None:
            return weight
        check_shape(name, weight, keep)
        weight = jnp.asarray(weight)
        return jnp.where(placed_like(keep, weight), weight, jnp.zeros((), weight.dtype))

    return map_named(mask, params, combine(masks), what="masks")


def check_shape(name: str, weight: Any, mask: Any) -> None:
    """Raise a ValueError when a mask does not have its weight's shape."""
    if jnp.shape(weight) != jnp.shape(mask):
        raise ValueError(
            f"masks: belongs to another tree, {name!r} has shape {jnp.shape(weight)}, its mask {jnp.shape(mask)}"
        )
