"""The dense convolution in its best form on this device: what every other way must beat."""

import jax
import jax.numpy as jnp

from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.reference import masked
from pallas_kernels.pattern_conv.structure import Structure


def why_not(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """None: everything is supported."""
    return None


def forward(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """x in the geometry's layout, w (kh, kw, cin, cout) of the same dtype -> y of that dtype."""
    return convolve(x, masked(w, structure), geometry)


def input_gradient(dy: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """dy of the output's shape -> dx of the input's."""
    shape = geometry.shape(dy.shape[geometry.batch_axis], geometry.image, structure.shape[2])
    kept = masked(w, structure)
    transposed = jax.linear_transpose(lambda x: convolve(x, kept, geometry), jax.ShapeDtypeStruct(shape, dy.dtype))
    return transposed(dy)[0]


def weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """-> dw (kh, kw, cin, cout) in float32 or wider, exact zeros where nothing is retained."""
    if jax.default_backend() != "cpu":
        wide = jnp.promote_types(x.dtype, jnp.float32)
        transposed = jax.linear_transpose(
            lambda w: convolve(x, w, geometry), jax.ShapeDtypeStruct(structure.shape, x.dtype)
        )
        return masked(transposed(dy)[0].astype(wide), structure)
    return masked(patch_weight_gradient(x, dy, geometry), structure)


def convolve(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """The plain convolution in the geometry's layout, result in x's dtype."""
    return jax.lax.conv_general_dilated(
        x, w, geometry.strides, geometry.padding, dimension_numbers=geometry.dimension_numbers
    )


def patch_weight_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """The weight gradient as one matrix product over patches: on a CPU XLA's own is 4 to 5 times slower."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    pads = [(0, 0)] * 4
    for axis, pair in zip(geometry.spatial_axes, geometry.padding):
        pads[axis] = pair
    planes = jnp.transpose(jnp.pad(x, pads), (3, geometry.batch_axis, *geometry.spatial_axes))
    (kh, kw), (rows, columns) = geometry.window, geometry.output
    row_stride, column_stride = geometry.strides
    taps = [
        planes[
            :,
            :,
            row : row + (rows - 1) * row_stride + 1 : row_stride,
            column : column + (columns - 1) * column_stride + 1 : column_stride,
        ].reshape(x.shape[3], -1)
        for row in range(kh)
        for column in range(kw)
    ]
    dy = dy if geometry.layout == "NHWC" else jnp.transpose(dy, (2, 0, 1, 3))
    flat = dy.reshape(-1, dy.shape[3])
    product = jnp.matmul(jnp.concatenate(taps), flat, preferred_element_type=wide)
    return product.reshape(kh, kw, x.shape[3], -1)


