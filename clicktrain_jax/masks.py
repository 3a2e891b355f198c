"""From scores to masks: which taps and which kernels stay; applying, combining and checking masks.

Masks are two boolean trees with the parameters' containers, True where a weight stays: ``pattern`` (each
kernel keeps its pattern's taps) and ``kernel`` (whole kernels removed). The two are chosen independently
of one another and a weight stays when both say so.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clicktrain_jax.patterns import check_set
from clicktrain_jax.plan import LayerPlan, Plan
from clicktrain_jax.trees import Tree, has_non_finite, map_named, named_leaves


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
        kernel: bool (cin, cout), True where the kernel stays.
    """

    pattern_ids: jax.Array | None
    kernel: jax.Array


def select_masks(scores: Tree, plan: Plan, patterns: Any) -> Masks:
    """Choose patterns and kernels from scores per weight. Jittable; ``plan`` is static.

    Args:
        scores: tree like the parameters, non-negative, computed in float32 (see `clicktrain_jax.importance`).
        plan: from `make_plan`.
        patterns: bool (P, kh, kw); its size must be that of every pruned kernel above 1x1.

    Returns:
        `Masks` of full (kh, kw, cin, cout) shape.

    Raises:
        ValueError: scores of another tree; patterns of another size; NaN or infinite scores (seen outside jit only).

    Source: ClickTrain's reference selection. Every kernel takes the pattern that retains the largest sum of
    scores, ties to the lowest index. Of each layer's kernels the ``ceil(round(fraction * n, 6))`` with the
    smallest sum over all taps go, ties by lowest (cout, cin) index.
    """
    patterns = check_set(patterns)
    choices = select_layers(scores, plan, patterns)
    layer_masks = {
        layer.name: expand(choices[layer.name], layer.shape, patterns if layer.has_patterns else None)
        for layer in plan.layers
    }
    return build_masks(scores, layer_masks)


def select_layers(scores: Tree, plan: Plan, patterns: jax.Array) -> dict[str, LayerChoice]:
    """`select_masks` in its compact form: the choice of each planned layer, by name."""
    plan.check_tree(scores, "scores")
    check_pattern_sizes(plan, patterns)
    by_name = dict(named_leaves(scores))
    for layer in plan.layers:
        if has_non_finite(by_name[layer.name]):
            raise ValueError(
                f"scores of {layer.name!r} hold NaN or infinite values: the loss or its gradient was not finite at "
                "the selection; lower the learning rate or look at the data before selecting"
            )
    return {layer.name: _select_layer(by_name[layer.name], layer, patterns) for layer in plan.layers}


def check_pattern_sizes(plan: Plan, patterns: Any) -> None:
    """Raise a ValueError when a planned layer's kernel has another size than the patterns."""
    size = tuple(jnp.shape(patterns)[1:])
    for layer in plan.layers:
        if layer.has_patterns and layer.shape[:2] != size:
            raise ValueError(
                f"patterns of {size[0]}x{size[1]} taps on {layer.name!r} with {layer.shape[0]}x{layer.shape[1]} "
                "kernels: leave that layer dense (None), or give patterns of its size"
            )


def _select_layer(scores: jax.Array, layer: LayerPlan, patterns: jax.Array) -> LayerChoice:
    # The barrier keeps a compiler from fusing the criterion's products into the sums with multiply-adds, whose
    # other rounding could flip a near-tie.
    taps = _tile_sums(jax.lax.optimization_barrier(scores.astype(jnp.float32)), layer)
    kernel = _keep_largest(_ordered_sum(taps), layer.num_removed)
    kernel = _untile(kernel, layer)
    if not layer.has_patterns:
        return LayerChoice(None, kernel)
    keep = jnp.asarray(patterns).reshape(patterns.shape[0], -1).T[:, :, None, None]
    # (taps, P, cin tiles, cout tiles), summed over taps one after the other, so that at tile (1, 1) a near-tie
    # falls the same way on every backend: a contraction could run in another order, or in TF32.
    retained = _ordered_sum(jnp.where(keep, taps[:, None], 0.0))
    pattern_ids = jnp.argmax(retained, axis=0).astype(jnp.uint8)
    return LayerChoice(_untile(pattern_ids, layer), kernel)


def _ordered_sum(terms: jax.Array) -> jax.Array:
    """Sum over the first axis, strictly from the first term to the last."""
    total = terms[0]
    for index in range(1, terms.shape[0]):
        total = total + terms[index]
    return total


def _tile_sums(scores: jax.Array, layer: LayerPlan) -> jax.Array:
    """(kh, kw, cin, cout) -> (kh * kw, cin tiles, cout tiles): scores summed over each tile."""
    kh, kw, cin, cout = layer.shape
    filters, channels = layer.tile
    rows, columns = layer.tile_grid
    flat = scores.reshape(kh * kw, cin, cout)
    if layer.tile == (1, 1):
        return flat
    padded = jnp.pad(flat, ((0, 0), (0, rows * channels - cin), (0, columns * filters - cout)))
    return padded.reshape(kh * kw, rows, channels, columns, filters).sum(axis=(2, 4))


def _untile(values: jax.Array, layer: LayerPlan) -> jax.Array:
    """(cin tiles, cout tiles) -> (cin, cout)."""
    filters, channels = layer.tile
    if layer.tile == (1, 1):
        return values
    wide = jnp.repeat(jnp.repeat(values, channels, axis=0), filters, axis=1)
    return wide[: layer.shape[2], : layer.shape[3]]


def _keep_largest(values: jax.Array, num_removed: int) -> jax.Array:
    """bool (cin, cout): False at the ``num_removed`` smallest values, ties by lowest (cout, cin) index.

    Sorting the values alone and breaking the ties by a running count is several times cheaper on a CPU than
    sorting indices along with them.
    """
    if num_removed == 0:
        return jnp.ones(values.shape, bool)
    # OIHW order, in which the reference breaks ties.
    flat = values.T.reshape(-1)
    threshold = jnp.sort(flat)[num_removed - 1]
    below = flat < threshold
    tied = flat == threshold
    among_tied = num_removed - below.sum()
    removed = below | (tied & (jnp.cumsum(tied) <= among_tied))
    return ~removed.reshape(values.shape[::-1]).T


def expand(
    choice: LayerChoice, shape: tuple[int, ...], patterns: jax.Array | None
) -> tuple[jax.Array | None, jax.Array]:
    """A layer's choice as full boolean masks ``(pattern or None, kernel)``, each (kh, kw, cin, cout)."""
    kh, kw = shape[:2]
    kernel = jnp.broadcast_to(choice.kernel, shape)
    if choice.pattern_ids is None:
        return None, kernel
    # One table look-up a kernel (its taps as bits of a word), then a bit test a tap: a gather of whole
    # patterns would read nine times as many entries.
    weights = jnp.left_shift(jnp.uint32(1), jnp.arange(kh * kw, dtype=jnp.uint32))
    table = jnp.sum(
        jnp.where(jnp.asarray(patterns).reshape(-1, kh * kw), weights, jnp.uint32(0)), axis=1, dtype=jnp.uint32
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
        return jnp.where(keep, weight, jnp.zeros((), weight.dtype))

    return map_named(mask, params, combine(masks), what="masks")


def check_shape(name: str, weight: Any, mask: Any) -> None:
    """Raise a ValueError when a mask does not have its weight's shape."""
    if jnp.shape(weight) != jnp.shape(mask):
        raise ValueError(
            f"masks: belongs to another tree, {name!r} has shape {jnp.shape(weight)}, its mask {jnp.shape(mask)}"
        )
