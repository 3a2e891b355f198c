"""n:m sparsity along the input channels, trained with a straight-through estimator (SR-STE).

Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" (arXiv 2102.04010). Of every m
neighbouring input channels n weights stay, those of largest magnitude at the moment. The dense weights are trained:
the net computes with the masked ones, the gradient passes the mask as if it were not there, and weights that are masked
are pulled to zero.
"""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from clicktrain_jax.baselines.states import check_axes, check_integer, planned
from clicktrain_jax.plan import Plan
from clicktrain_jax.trees import KERNEL_AXES, Tree, map_named

_CIN = KERNEL_AXES.index("cin")


def n_of_m_mask(w: jax.Array, n: int = 2, m: int = 4, axis: int = 2) -> jax.Array:
    """Which weights stay: of every m neighbours along an axis the n of largest magnitude.

    Args:
        w: float array; by default a kernel (kh, kw, cin, cout), grouped along cin.
        n: weights that stay, 1 <= n <= m.
        m: neighbours in a group.
        axis: along which groups are formed, from its start.

    Returns:
        bool, like ``w``; exactly n True in each group, ties to the lower index.

    Raises:
        ValueError: n and m out of range; an axis that is not a multiple of m.
    """
    _check(n, m)
    shape = jnp.shape(w)
    if shape[axis] % m:
        raise ValueError(f"axis {axis} of shape {shape} has {shape[axis]} entries: expected a multiple of m={m}")
    magnitude = jnp.moveaxis(jnp.abs(w), axis, -1)
    moved = magnitude.shape
    groups = magnitude.reshape(*moved[:-1], moved[-1] // m, m)
    # With so few members every one is held against every other: no sort is needed.
    mine, other = groups[..., :, None], groups[..., None, :]
    place = jnp.arange(m)
    before = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    return jnp.moveaxis((before.sum(axis=-1) < n).reshape(moved), -1, axis)


def n_of_m_masks(params: Tree, plan: Plan, n: int = 2, m: int = 4) -> dict[str, jax.Array]:
    """The masks of every planned layer, for accounting: bool (kh, kw, cin, cout) by layer name.

    Raises:
        ValueError: n and m out of range; parameters of another tree; a planned layer whose input channels are not a
            multiple of m.
    """
    _check_layers(params, plan, n, m)
    return {name: n_of_m_mask(weight, n, m) for name, weight in planned(params, plan).items()}


def straight_through(params: Tree, plan: Plan, n: int = 2, m: int = 4, decay: float = 2e-4) -> Tree:
    """The parameters with n:m sparse kernels, for use inside the loss: ``net(straight_through(params, plan), x)``.

    Args:
        params: tree of arrays, dense weights.
        plan: from `clicktrain_jax.make_plan`; its layers' kernels are masked along their input channels. Fractions
            are not read.
        n: weights that stay of every ``m`` neighbouring input channels.
        m: neighbours.
        decay: weight of the pull on masked weights, >= 0; 0 is the plain straight-through estimator.

    Returns:
        A tree like ``params``, same dtypes, masked weights exactly zero. Its derivative in reverse mode is
        ``dL/dw = dL/d(masked w) + decay * (1 - mask) * w``; forward mode is not defined.

    Raises:
        ValueError: n, m or decay out of range; parameters of another tree; a planned layer whose input channels are
            not a multiple of m.

    Source: Zhou et al. 2021 (arXiv 2102.04010), SR-STE, there with decay 2e-4.
    """
    _check_layers(params, plan, n, m)
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real) or not 0 <= decay < math.inf:
        raise ValueError(f"decay={decay!r}: expected a finite number >= 0")
    layers = plan.by_name()
    return map_named(
        lambda name, leaf: _masked(leaf, int(n), int(m), float(decay)) if name in layers else leaf, params
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _masked(w: jax.Array, n: int, m: int, decay: float) -> jax.Array:
    return _forward(w, n, m, decay)[0]


def _forward(w: jax.Array, n: int, m: int, decay: float) -> tuple[jax.Array, Any]:
    mask = n_of_m_mask(w, n, m)
    zero = jnp.zeros((), w.dtype)
    return jnp.where(mask, w, zero), jnp.where(mask, zero, w)


def _backward(n: int, m: int, decay: float, removed: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    wide = jnp.promote_types(grad.dtype, jnp.float32)
    return ((grad.astype(wide) + decay * removed.astype(wide)).astype(removed.dtype),)


_masked.defvjp(_forward, _backward)


def _check(n: int, m: int) -> None:
    check_integer("m", m, 1)
    if check_integer("n", n, 1) > m:
        raise ValueError(f"n={n}, m={m}: expected at most m weights to stay of m")


def _check_layers(params: Tree, plan: Plan, n: int, m: int) -> None:
    _check(n, m)
    check_axes("n:m pruning", plan)
    plan.check_tree(params)
    for layer in plan.layers:
        if layer.shape[_CIN] % m:
            raise ValueError(
                f"{layer.name!r} has {layer.shape[_CIN]} input channels, which is no multiple of m={m}: leave that "
                "layer out of the plan"
            )
