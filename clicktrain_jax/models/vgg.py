"""VGG-11, 13 and 16 with BatchNorm for 32x32 images.

Widths and depths are those of Simonyan and Zisserman (arXiv 1409.1556, configurations A, B and D);
the form for small images is the one of the ClickTrain experiments: no bias in the convolutions, no
max pool after the last stage but a 2x2 average pool, a small classifier with dropout, BatchNorm
scale starting at 0.5. Parameter paths are flat and count in network order: ``Conv_0/kernel``,
``BatchNorm_0/scale``, ..., ``Dense_2/bias``.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clicktrain_jax.models.blocks import conv_norm_relu
from clicktrain_jax.models.layout import Layout, avg_pool, conv_in_layout, from_nhwc, to_nhwc
from clicktrain_jax.models.norm import Norm, norm_of
from clicktrain_jax.models.sizes import ModuleDef, check_images, scaled_width

_IMAGE_SIZE = (32, 32)
_STAGE_WIDTHS = (64, 128, 256, 512, 512)
_HIDDEN_WIDTH = 512

VGG11_STAGES = (1, 1, 2, 2, 2)
VGG13_STAGES = (2, 2, 2, 2, 2)
VGG16_STAGES = (2, 2, 3, 3, 3)

# Standard deviation sqrt(2 / (kh * kw * cout)).
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# As published, for the full width. The signal that gets through falls with the width: a net of a quarter of it
# stands at chance for its first few hundred updates (measured: a loss of 2.303 for all of an epoch of 156).
_dense_init = nn.initializers.normal(0.01)
# So other widths, which are this project's own, start from this.
_scaled_dense_init = nn.initializers.he_normal()


class VGG(nn.Module):
    """A VGG with BatchNorm for 32x32 images.

    Attributes:
        num_classes: number of logits.
        convs_per_stage: number of 3x3 convolutions in each of the five stages.
        width: multiplies every width, the hidden layers of the classifier too (`scaled_width`).
        dtype: what the layers compute in; parameters, BatchNorm statistics and logits are float32.
        conv: the convolution, called as `nn.Conv` is.
        norm: the normalisation, called as `Norm` is.
        layout: of the maps inside; a convolution for HWNC must take it (`layout.conv_in_layout`).
        dropout: rate before each of the classifier's first two layers.
    """

    num_classes: int
    convs_per_stage: tuple[int, ...] = VGG16_STAGES
    width: float = 1.0
    dtype: Any = jnp.float32
    conv: ModuleDef = nn.Conv
    norm: ModuleDef = Norm
    dropout: float = 0.5
    layout: Layout = "NHWC"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images to logits.

        Args:
            x: normalised images, floating point, (batch, 32, 32, channels).
            train: whether BatchNorm uses the batch (and updates ``batch_stats``) and dropout drops,
                which takes an rng named ``dropout``.

        Returns:
            float32 logits, (batch, num_classes).

        Raises:
            ValueError: if `x` is not a batch of floating-point images of 32x32, if there is not one
                entry of `convs_per_stage` for each stage, or if `conv` does not know the layout.
        """
        check_images(x, size=_IMAGE_SIZE)
        if len(self.convs_per_stage) != len(_STAGE_WIDTHS):
            raise ValueError(f"convs_per_stage needs {len(_STAGE_WIDTHS)} entries, got {self.convs_per_stage}")
        conv = conv_in_layout(self.conv, self.layout)
        norm = norm_of(self.norm, train, self.dtype, self.layout, scale_init=nn.initializers.constant(0.5))
        x = from_nhwc(x, self.layout)
        index = 0
        for stage, (count, features) in enumerate(zip(self.convs_per_stage, _STAGE_WIDTHS, strict=True)):
            for layer in range(count):
                pool = layer == count - 1 and stage < len(_STAGE_WIDTHS) - 1
                width = scaled_width(features, self.width)
                x = conv_norm_relu(conv, norm, x, width, 3, index, pool, dtype=self.dtype, init=_conv_init)
                index += 1

        # Back to NHWC, so that the classifier finds its features in one order.
        x = to_nhwc(avg_pool(x, 2, self.layout), self.layout)
        x = x.reshape(x.shape[0], -1)
        dense_init = _dense_init if self.width == 1 else _scaled_dense_init
        for layer in range(2):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.Dense(
                scaled_width(_HIDDEN_WIDTH, self.width), dtype=self.dtype, kernel_init=dense_init, name=f"Dense_{layer}"
            )(x)
            x = nn.relu(x)
        # The last layer costs next to nothing, so its logits are not rounded to a short dtype.
        return nn.Dense(self.num_classes, dtype=jnp.float32, kernel_init=dense_init, name="Dense_2")(x)
