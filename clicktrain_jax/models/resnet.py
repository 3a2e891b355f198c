"""Residual nets, for 32x32 images and for ImageNet.

One module covers the nets of He et al. (arXiv 1512.03385) and those of the ClickTrain experiments;
`clicktrain_jax.models.build` knows which settings make which net. "ResNet-32" names two nets: the
usual one of widths 16, 32, 64, and the experiments' wide one of widths 64 to 512.

Padding is explicit and symmetric, kh // 2 on each side, as in PyTorch: with stride 2 "SAME" would
shift the image. Weights start as PyTorch's defaults do, uniform within 1 / sqrt(fan in).

Parameter paths: the stem is ``Conv_0``; blocks count through the whole net, ``Block_3/Conv_0``; the
1x1 convolution of a shortcut is ``Block_3/shortcut``, and no other convolution's path has the word.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from clicktrain_jax.models.blocks import conv_norm_relu, convolve
from clicktrain_jax.models.layout import Layout, conv_in_layout, from_nhwc, max_pool, per_axis, spatial_axes
from clicktrain_jax.models.norm import Norm, norm_of
from clicktrain_jax.models.sizes import ModuleDef, check_images, scaled_width

_BOTTLENECK_EXPANSION = 4

# Uniform within sqrt(3 * scale / fan_in) = 1 / sqrt(fan_in).
_fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _padded_shortcut(x: jax.Array, features: int, strides: int, layout: Layout) -> jax.Array:
    """Option A of He et al.: every strides-th pixel, new channels of zeros on both sides."""
    step = slice(None, None, strides)
    x = x[per_axis(layout, step, step, slice(None))]
    new = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class ResidualBlock(nn.Module):
    """A residual block: two 3x3 convolutions (basic), or 1x1, 3x3, 1x1 (bottleneck).

    Attributes:
        features: width of the inner convolutions; a bottleneck puts out four times as many.
        strides: stride of the first 3x3 convolution and of the shortcut.
        kind: ``"basic"`` or ``"bottleneck"``.
        shortcut: what joins input and output where their shapes differ: ``"projection"``, a 1x1
            convolution with BatchNorm, or ``"pad"``, without parameters.
        dtype: what the layers compute in.
        conv: the convolution, called as `nn.Conv` is; one that knows layouts must hold this one.
        layout: of the block's input and output.
        input_features: width of the input by design, which decides whether a shortcut is needed; None for the actual
            one. They differ in a net whose convolutions have fewer filters than ``features``.
    """

    features: int
    strides: int = 1
    kind: Literal["basic", "bottleneck"] = "basic"
    shortcut: Literal["projection", "pad"] = "projection"
    dtype: Any = jnp.float32
    conv: ModuleDef = nn.Conv
    norm: ModuleDef = Norm
    layout: Layout = "NHWC"
    input_features: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps (batch, height, width, cin) to (batch, height / strides, width / strides, cout), or both in HWNC."""
        norm = norm_of(self.norm, train, self.dtype, self.layout)
        inner, strides = self.features, self.strides
        if self.kind == "basic":
            layers = ((inner, 3, strides), (inner, 3, 1))  # (features, size, strides)
        else:
            layers = ((inner, 1, 1), (inner, 3, strides), (inner * _BOTTLENECK_EXPANSION, 1, 1))

        y, settings, last = x, {"dtype": self.dtype, "init": _fan_in_uniform}, len(layers) - 1
        for index, (features, size, step) in enumerate(layers[:-1]):
            y = conv_norm_relu(self.conv, norm, y, features, size, index, strides=step, **settings)
        features, size, _ = layers[-1]
        y = convolve(self.conv, y, features, size, f"Conv_{last}", **settings)
        if strides != 1 or (self.input_features or x.shape[-1]) != features:
            if self.shortcut == "pad":
                x = _padded_shortcut(x, features, strides, self.layout)
            else:
                x = convolve(self.conv, x, features, 1, "shortcut", strides=strides, **settings)
                x = norm(name="shortcut_BatchNorm")(x)
        return norm(relu=True, name=f"BatchNorm_{last}")(y, x)


class ResNet(nn.Module):
    """A residual net.

    Attributes:
        num_classes: number of logits.
        blocks_per_stage: number of blocks in each stage; all but the first stage halve the image.
        stage_widths: inner width of the blocks of each stage; the stem has that of the first.
        kind: ``"basic"`` or ``"bottleneck"`` blocks.
        shortcut: ``"projection"`` or ``"pad"``, see `ResidualBlock`.
        stem: ``"small"``, a 3x3 convolution, or ``"imagenet"``, a 7x7 one of stride 2 and a 3x3 max
            pool of stride 2.
        width: multiplies every width of `stage_widths` (`scaled_width`); a bottleneck's output
            stays four times its inner width.
        dtype: what the layers compute in; parameters, BatchNorm statistics and logits are float32.
        conv: the convolution, called as `nn.Conv` is.
        norm: the normalisation, called as `Norm` is.
        layout: of the maps inside; a convolution for HWNC must take it (`layout.conv_in_layout`).
    """

    num_classes: int
    blocks_per_stage: tuple[int, ...] = (2, 2, 2, 2)
    stage_widths: tuple[int, ...] = (64, 128, 256, 512)
    kind: Literal["basic", "bottleneck"] = "basic"
    shortcut: Literal["projection", "pad"] = "projection"
    stem: Literal["small", "imagenet"] = "small"
    width: float = 1.0
    dtype: Any = jnp.float32
    conv: ModuleDef = nn.Conv
    norm: ModuleDef = Norm
    layout: Layout = "NHWC"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps images to logits.

        Args:
            x: normalised images, floating point, (batch, height, width, channels). Any size
                runs: the last pool averages whatever map is left (4x4 of 32x32 with four stages).
            train: whether BatchNorm uses the batch and updates ``batch_stats``.

        Returns:
            float32 logits, (batch, num_classes).

        Raises:
            ValueError: if `x` is not a batch of floating-point images, if a setting of the net is
                not one of those listed above, or if `conv` does not know the layout.
        """
        check_images(x)
        self._check_settings()
        conv = conv_in_layout(self.conv, self.layout)
        x = from_nhwc(x, self.layout)
        widths = [scaled_width(features, self.width) for features in self.stage_widths]

        size, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        norm = norm_of(self.norm, train, self.dtype, self.layout)
        settings = {"strides": strides, "dtype": self.dtype, "init": _fan_in_uniform}
        x = conv_norm_relu(conv, norm, x, widths[0], size, 0, **settings)
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, self.layout, padding=((1, 1), (1, 1)))

        index, before = 0, widths[0]
        for stage, (count, features) in enumerate(zip(self.blocks_per_stage, widths, strict=True)):
            for block in range(count):
                x = ResidualBlock(
                    features,
                    strides=2 if stage > 0 and block == 0 else 1,
                    kind=self.kind,
                    shortcut=self.shortcut,
                    dtype=self.dtype,
                    conv=conv,
                    norm=self.norm,
                    layout=self.layout,
                    input_features=before,
                    name=f"Block_{index}",
                )(x, train=train)
                index, before = index + 1, features * (_BOTTLENECK_EXPANSION if self.kind == "bottleneck" else 1)

        x = jnp.mean(x, axis=spatial_axes(self.layout), dtype=jnp.float32)
        bound = 1 / math.sqrt(x.shape[-1])
        # The last layer costs next to nothing, so its logits are not rounded to a short dtype.
        return nn.Dense(
            self.num_classes,
            dtype=jnp.float32,
            kernel_init=_fan_in_uniform,
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound),
            name="Dense_0",
        )(x)

    def _check_settings(self) -> None:
        """Raises ValueError where a setting is unknown or stages and widths do not pair up."""
        known = {"kind": ("basic", "bottleneck"), "shortcut": ("projection", "pad"), "stem": ("small", "imagenet")}
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} must be one of {values}, got {getattr(self, field)!r}")
        if len(self.blocks_per_stage) != len(self.stage_widths):
            raise ValueError(
                "blocks_per_stage and stage_widths must be of one length, got "
                f"{self.blocks_per_stage} and {self.stage_widths}"
            )
