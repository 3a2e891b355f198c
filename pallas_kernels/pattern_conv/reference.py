"""The meaning: a dense convolution with masked weights, and its gradients by jax's own rules."""

import jax
import jax.numpy as jnp

from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.structure import Structure, mask_of


def why_not(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """None: everything is supported."""
    return None


def forward(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """x in the geometry's layout, w (kh, kw, cin, cout) of the same dtype -> y of that dtype, summed in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.conv_general_dilated(
        x,
        masked(w, structure),
        geometry.strides,
        geometry.padding,
        dimension_numbers=geometry.dimension_numbers,
        precision=jax.lax.Precision.HIGHEST if x.dtype == wide else None,
        preferred_element_type=None if x.dtype == wide else wide,
    )
    return y.astype(x.dtype)


def input_gradient(dy: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """dy of the output's shape -> dx of the input's."""
    shape = geometry.shape(dy.shape[geometry.batch_axis], geometry.image, structure.shape[2])
    transposed = jax.linear_transpose(
        lambda x: _wide_forward(x, masked(w, structure), geometry), jax.ShapeDtypeStruct(shape, _wide(dy.dtype))
    )
    return transposed(dy.astype(_wide(dy.dtype)))[0].astype(dy.dtype)


def weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """-> dw (kh, kw, cin, cout) in float32 or wider, exact zeros where nothing is retained."""
    wide = _wide(x.dtype)
    transposed = jax.linear_transpose(
        lambda w: _wide_forward(x.astype(wide), w, geometry), jax.ShapeDtypeStruct(structure.shape, wide)
    )
    return masked(transposed(dy.astype(wide))[0], structure)


def masked(w: jax.Array, structure: Structure) -> jax.Array:
    """w with exact zeros where nothing is retained, infinite weights there included."""
    return jnp.where(mask_of(structure), w, jnp.zeros((), w.dtype))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _wide_forward(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        w.astype(x.dtype),
        geometry.strides,
        geometry.padding,
        dimension_numbers=geometry.dimension_numbers,
        precision=jax.lax.Precision.HIGHEST,
    )
