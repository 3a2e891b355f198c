"""What all nets here are built of: a convolution without bias, BatchNorm, ReLU."""

from typing import Any

import jax

from clicktrain_jax.models.sizes import ModuleDef


def convolve(
    conv: ModuleDef, x: jax.Array, features: int, size: int, name: str, *, strides: int = 1, dtype: Any, init: Any
) -> jax.Array:
    """The handed convolution: size x size, padded by size // 2 on every side, without bias.

    Args:
        conv: called as `nn.Conv` is.
        x: maps in the layout that ``conv`` reads.
        features: number of filters.
        size: rows and columns of the window.
        name: of the module.
        strides: rows and columns.
        dtype: what is computed in.
        init: initializer of the kernel.
    """
    pad = (size // 2, size // 2)
    return conv(
        features,
        (size, size),
        strides=(strides, strides),
        padding=(pad, pad),
        use_bias=False,
        dtype=dtype,
        kernel_init=init,
        name=name,
    )(x)


def conv_norm_relu(
    conv: ModuleDef, norm: ModuleDef, x: jax.Array, features: int, size: int, index: int, pool: bool = False, **settings
) -> jax.Array:
    """`convolve` as ``Conv_{index}``, then ``BatchNorm_{index}`` of `norm_of`, ReLU and perhaps a 2x2 max pool."""
    x = convolve(conv, x, features, size, f"Conv_{index}", **settings)
    return norm(relu=True, pool=pool, name=f"BatchNorm_{index}")(x)
