"""Group lasso on what is marked for removal: its value and its gradient in closed form.

    R = sum over kernels sqrt(sum over taps (w * not_pattern)^2 + eps)
      + sum over kernels sqrt(sum over taps (w * removed_kernel)^2 + eps),      eps = 1e-8

(ClickTrain's reference code; the total loss is cross entropy + coeff * R.) Every kernel of a pruned layer
counts in both sums, so one with nothing to push adds sqrt(eps) = 1e-4 to each.
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.masks import Masks, layers_for
from clicktrain_jax.patterns.kernels import ordered_sum
from clicktrain_jax.plan.convolutions import Axes, cout_axis, tap_axes
from clicktrain_jax.trees import Tree, map_named, named_leaves, placed_like, replicated

EPSILON = 1e-8


def _norms(weight: jax.Array, axes: Axes | None) -> jax.Array:
    """sqrt(sum of squares over the taps + eps), the taps' axes kept as 1."""
    taps, spec = tap_axes(weight.shape, axes), jax.typeof(weight).sharding.spec
    squares = jnp.square(weight if all(spec[axis] is None for axis in taps) else replicated(weight))
    # Tap by tap it is one loop over kernels: XLA's reduction over leading axes takes four times as long on a CPU.
    for axis in taps:
        squares = ordered_sum(jnp.split(squares, squares.shape[axis], axis))
    return jnp.sqrt(squares + EPSILON)


def _marked(weight: jax.Array, keep: jax.Array | None) -> jax.Array:
    """The part of a weight that its mask marks for removal; nothing where there is no mask."""
    return jnp.zeros_like(weight) if keep is None else jnp.where(placed_like(keep, weight), 0.0, weight)


def group_lasso(params: Tree, masks: Masks, *, axes: Axes | None = None) -> tuple[jax.Array, jax.Array]:
    """The two sums of the group lasso.

    Args:
        params: tree of arrays.
        masks: `Masks` of that tree, or of a part of it.
        axes: the layout of the kernels, "HWIO" or "OIHW"; None goes by their shapes.

    Returns:
        ``(pattern_sum, kernel_sum)``, float32 scalars, before any coefficient. A pruned 1x1 layer, which has no
        patterns, still adds its constant 1e-4 a kernel to the first.

    Raises:
        ValueError: masks of another tree, or of other shapes.
    """
    sums = [jnp.float32(0), jnp.float32(0)]
    leaves = dict(named_leaves(params))
    layers = layers_for(params, masks)
    for name in leaves:
        if name not in layers or leaves[name] is None:
            continue
        weight = jnp.asarray(leaves[name], jnp.float32)
        for which, mask in enumerate(layers[name].full()):
            # Row sums first: one long float32 sum of many 1e-4 drifts.
            rows = tuple(axis for axis in range(4) if axis != cout_axis(weight.shape, axes))
            sums[which] += _norms(_marked(weight, mask), axes).sum(axis=rows).sum()
    return sums[0], sums[1]


def check_coeff(coeff: Any) -> None:
    """Raise a ValueError for what is no scalar, negative or not finite; of a traced one the shape is all that shows."""
    traced = isinstance(coeff, jax.core.Tracer)
    number = np.ndim(coeff) == 0 and (traced or jnp.issubdtype(np.asarray(coeff).dtype, jnp.number))
    if not number or not (traced or 0 <= np.asarray(coeff) < math.inf):
        raise ValueError(
            f"coeff={coeff!r}: expected a finite number >= 0, the weight of the group lasso in the loss, or a "
            "function of the updates done"
        )


def inverse_norms(params: Tree, masks: Masks, *, axes: Axes | None = None) -> dict[str, list[jax.Array]]:
    """For each pruned leaf, and each of its masks, 1 / the norm of what is marked, float32: an entry a kernel."""
    layers, found = layers_for(params, masks), {}
    for name, weight in named_leaves(params):
        if name in layers and weight is not None:
            parts = _marked_parts(weight, layers[name])
            found[name] = [jnp.squeeze(1 / _norms(part, axes), tap_axes(part.shape, axes)) for part in parts]
    return found


def _marked_parts(weight: Any, layer: Any) -> list[jax.Array]:
    weight = jnp.asarray(weight, jnp.float32)
    return [_marked(weight, mask) for mask in layer.full() if mask is not None]


def add_group_lasso(
    grads: Tree,
    params: Tree,
    masks: Masks,
    coeff: float | jax.Array,
    *,
    axes: Axes | None = None,
    where: bool | jax.Array = True,
    inverses: dict[str, list[jax.Array]] | None = None,
) -> Tree:
    """Add ``coeff * dR/dw`` to the gradients of the pruned leaves; the others pass through untouched.

    Args:
        grads: tree like ``params``.
        params: tree of arrays.
        masks: `Masks` of that tree, or of a part of it.
        coeff: weight of the group lasso in the loss, a scalar.
        axes: as in `group_lasso`.
        where: whether it is added, a scalar.
        inverses: of `inverse_norms`; read where ``where`` is True alone. None computes them.

    Returns:
        A tree like ``grads``, each leaf in its own dtype; the sum is formed in float32 or wider.

    Raises:
        ValueError: trees or shapes that do not belong together; a coefficient that is negative or not finite.
    """
    check_coeff(coeff)
    layers = layers_for(params, masks)
    found = inverse_norms(params, masks, axes=axes) if inverses is None else inverses
    if where is not True:
        # Scalars that are made once, not in each loop over weights.
        where, coeff = jax.lax.optimization_barrier((where, coeff))

    def over_taps(kernels: jax.Array, like: jax.Array) -> jax.Array:
        taps = tap_axes(like.shape, axes)
        return jax.lax.broadcast_in_dim(kernels, like.shape, [axis for axis in range(4) if axis not in taps])

    def add(name: str, grad: Any, weight: Any) -> Any:
        if name not in layers:
            return grad
        if grad is None or weight is None:
            raise ValueError(f"{name!r} is pruned, but its {'gradient' if grad is None else 'weight'} is None")
        parts = _marked_parts(weight, layers[name])
        push = sum(part * over_taps(inverse, part) for part, inverse in zip(parts, found[name], strict=True))
        wide = jnp.promote_types(grad.dtype, jnp.float32)
        pushed = (grad.astype(wide) + jnp.asarray(coeff, jnp.float32) * push).astype(grad.dtype)
        return pushed if where is True else jnp.where(where, pushed, grad)

    return map_named(add, grads, params, what="params")
