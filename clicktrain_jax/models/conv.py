"""A convolution for CPUs: patches gathered by slicing, then one matrix product.

XLA's own convolutions are slow on a CPU where training needs them most: their weight gradients, and every
convolution inside a compiled loop (jax issue 12868: some 60 times slower there). As slices and a matrix
product the same function trains a full-width VGG-16 3 to 4 times faster on two cores, in a loop or out of
one (`python -m experiments bench loop`). Its price is memory: the patches, kh * kw times the input, are kept
for the backward pass. On a GPU, cuDNN is the right choice: hand `flax.linen.Conv` to the models there.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class PatchConv(nn.Module):
    """`flax.linen.Conv` for NHWC images, called the same way by the models here, with the same parameters.

    Attributes:
        features: number of filters.
        kernel_size: (kh, kw).
        strides: (rows, columns).
        padding: ((top, bottom), (left, right)).
        use_bias: must be False; the nets here have BatchNorm instead.
        dtype: what is computed in; the kernel is kept in float32.
        kernel_init: initializer of the kernel.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, cin) -> (batch, rows, columns, features) in ``dtype``.

        Raises:
            ValueError: if a bias is asked for.
        """
        if self.use_bias:
            raise ValueError("PatchConv has no bias: use_bias=True is for flax.linen.Conv")
        kh, kw = self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (kh, kw, x.shape[-1], self.features), jnp.float32)
        x = jnp.pad(x.astype(self.dtype), ((0, 0), *self.padding, (0, 0)))
        row_stride, column_stride = self.strides
        last_row, last_column = x.shape[1] - kh, x.shape[2] - kw
        taps = [
            x[:, row : row + last_row + 1 : row_stride, column : column + last_column + 1 : column_stride]
            for row in range(kh)
            for column in range(kw)
        ]
        patches = jnp.concatenate(taps, axis=-1)
        return jnp.einsum("nhwk,kf->nhwf", patches, kernel.astype(self.dtype).reshape(-1, self.features))
