"""A small net for small images, such as the 8x8 digits that come with scikit-learn.

It is the net of the project's quick runs and tests: 1.2 million multiply-adds an 8x8 image, few
enough to train in seconds on two CPU cores, and 129,312 convolution weights on grey images, more
than digits need, so that seven eighths of them can go. The first convolution, which stays dense,
has 0.2% of the weights and so does not limit the compression. This project's own design.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clicktrain_jax.models.blocks import conv_norm_relu
from clicktrain_jax.models.layout import Layout, conv_in_layout, from_nhwc, spatial_axes
from clicktrain_jax.models.norm import Norm, norm_of
from clicktrain_jax.models.sizes import ModuleDef, check_images, scaled_width

_WIDTHS = (32, 64, 64, 128)
_POOL_AFTER = (0, 2)  # indices of the convolutions after which the image is halved
_SMALLEST_IMAGE = 4  # two halvings must leave a pixel

_conv_init = nn.initializers.he_normal()


class SmallCNN(nn.Module):
    """Four 3x3 convolutions with BatchNorm, a global average and one linear layer.

    On 8x8 images the convolutions put out maps of 8x8, 4x4, 4x4 and 2x2. Parameter paths:
    ``Conv_0`` ... ``Conv_3``, ``BatchNorm_0`` ... ``BatchNorm_3``, ``Dense_0``.

    Attributes:
        num_classes: number of logits.
        width: multiplies every width (`scaled_width`).
        dtype: what the layers compute in; parameters, BatchNorm statistics and logits are float32.
        conv: the convolution, called as `nn.Conv` is.
        norm: the normalisation, called as `Norm` is.
        layout: of the maps inside; a convolution for HWNC must take it (`layout.conv_in_layout`).
    """

    num_classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    conv: ModuleDef = nn.Conv
    norm: ModuleDef = Norm
    layout: Layout = "NHWC"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images to logits.

        Args:
            x: normalised images, floating point, (batch, height, width, channels), 4x4 or larger.
            train: whether BatchNorm uses the batch and updates ``batch_stats``.

        Returns:
            float32 logits, (batch, num_classes).

        Raises:
            ValueError: if `x` is not a batch of floating-point images of at least 4x4, or if `conv`
                does not know the layout.
        """
        check_images(x)
        if min(x.shape[1:3]) < _SMALLEST_IMAGE:
            raise ValueError(
                f"this net takes images of {_SMALLEST_IMAGE}x{_SMALLEST_IMAGE} or larger, got {x.shape[1]}x{x.shape[2]}"
            )
        conv = conv_in_layout(self.conv, self.layout)
        norm = norm_of(self.norm, train, self.dtype, self.layout)
        x = from_nhwc(x, self.layout)
        for index, features in enumerate(_WIDTHS):
            width, pool = scaled_width(features, self.width), index in _POOL_AFTER
            x = conv_norm_relu(conv, norm, x, width, 3, index, pool, dtype=self.dtype, init=_conv_init)
        x = jnp.mean(x, axis=spatial_axes(self.layout), dtype=jnp.float32)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="Dense_0")(x)
