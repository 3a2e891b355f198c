"""Nets by name. They know nothing of pruning: the convolution they use is handed to them.

    model = build("vgg13", num_classes=10, width=0.5)
    variables = model.init(key, images, train=False)
    prunable_convs(model, default_image_shape("vgg13"))  # ("Conv_1/kernel", ..., "Conv_9/kernel")

Images are NHWC.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

try:
    import flax.linen as nn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"clicktrain_jax.models needs {error.name}: pip install 'clicktrain-jax[models]'", name=error.name
    ) from error

from clicktrain_jax.models.conv import (
    NarrowConv,
    PatchConv,
    PatternConv,
    gpu_convolution,
    patch_convolution,
    xla_convolution,
)
from clicktrain_jax.models.layout import Layout, conv_in_layout
from clicktrain_jax.models.norm import Norm
from clicktrain_jax.models.resnet import ResNet
from clicktrain_jax.models.sizes import (
    ConvLayer,
    ModuleDef,
    abstract_variables,
    conv_layers,
    output_sizes,
    parameter_count,
    prunable_convs,
    scaled_width,
)
from clicktrain_jax.models.small import SmallCNN
from clicktrain_jax.models.vgg import VGG, VGG11_STAGES, VGG13_STAGES, VGG16_STAGES

__all__ = [
    "VGG",
    "ConvLayer",
    "Layout",
    "ModuleDef",
    "NarrowConv",
    "Norm",
    "PatchConv",
    "PatternConv",
    "ResNet",
    "SmallCNN",
    "abstract_variables",
    "build",
    "conv_layers",
    "default_image_shape",
    "gpu_convolution",
    "names",
    "output_sizes",
    "parameter_count",
    "patch_convolution",
    "prunable_convs",
    "scaled_width",
    "xla_convolution",
]

_SMALL_IMAGE = (32, 32, 3)


class _Net(NamedTuple):
    module: type[nn.Module]
    settings: Mapping[str, Any]
    image_shape: tuple[int, int, int]


_NETS: dict[str, _Net] = {
    "vgg11": _Net(VGG, {"convs_per_stage": VGG11_STAGES}, _SMALL_IMAGE),
    "vgg13": _Net(VGG, {"convs_per_stage": VGG13_STAGES}, _SMALL_IMAGE),
    "vgg16": _Net(VGG, {"convs_per_stage": VGG16_STAGES}, _SMALL_IMAGE),
    "resnet18": _Net(ResNet, {"blocks_per_stage": (2, 2, 2, 2)}, _SMALL_IMAGE),
    # The "ResNet-32" of the ClickTrain experiments.
    "resnet32_wide": _Net(ResNet, {"blocks_per_stage": (3, 4, 5, 3)}, _SMALL_IMAGE),
    # The ResNet-32 of He et al., section 4.2.
    "resnet32": _Net(
        ResNet, {"blocks_per_stage": (5, 5, 5), "stage_widths": (16, 32, 64), "shortcut": "pad"}, _SMALL_IMAGE
    ),
    "resnet50_cifar": _Net(ResNet, {"blocks_per_stage": (3, 4, 6, 3), "kind": "bottleneck"}, _SMALL_IMAGE),
    "resnet50": _Net(
        ResNet, {"blocks_per_stage": (3, 4, 6, 3), "kind": "bottleneck", "stem": "imagenet"}, (224, 224, 3)
    ),
    "small": _Net(SmallCNN, {}, (8, 8, 1)),
}


def names() -> tuple[str, ...]:
    """Returns the names that `build` knows."""
    return tuple(_NETS)


def _net(name: str) -> _Net:
    if name not in _NETS:
        close = difflib.get_close_matches(str(name), _NETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown net {name!r}{hint} Known nets: {', '.join(_NETS)}")
    return _NETS[name]


def build(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    dtype: Any = jnp.float32,
    conv: ModuleDef = nn.Conv,
    norm: ModuleDef = Norm,
    dropout: float | None = None,
    layout: Layout = "NHWC",
) -> nn.Module:
    """Makes a net, called as ``model.apply(variables, x, train=...)``.

    Args:
        name: one of `names()`.
        num_classes: number of logits.
        width: multiplies every width; each becomes a multiple of 8, at least 8.
        dtype: what the layers compute in; parameters, BatchNorm statistics and logits are float32.
        conv: the convolution, called as `nn.Conv` is; parameter paths do not depend on it.
        norm: the normalisation and what follows it, called as `Norm` is; names and shapes of what is kept are flax's.
        dropout: rate in [0, 1) of a net that has dropout (the VGGs); None for its own.
        layout: of the maps inside, "NHWC" or "HWNC". Images are NHWC and parameters and logits the
            same in either; HWNC takes a convolution with a parameter `layout`, such as `PatternConv`.

    Raises:
        ValueError: if the name is unknown, `num_classes` or `width` is not positive, or `dropout` is
            given for a net without dropout or is outside [0, 1); if the layout is unknown, or `conv`
            does not know it.
    """
    net = _net(name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes!r}")
    scaled_width(1, width)  # refuses a bad width here rather than at the first call
    conv_in_layout(conv, layout)  # refuses what does not go together
    settings = dict(net.settings)
    if dropout is not None:
        if not hasattr(net.module, "dropout"):
            raise ValueError(f"dropout={dropout!r}: {name} has no dropout; leave it None")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout!r}: expected a rate in [0, 1)")
        settings["dropout"] = dropout
    settings |= {"conv": conv, "norm": norm, "layout": layout}
    return net.module(num_classes=num_classes, width=width, dtype=dtype, **settings)


def default_image_shape(name: str) -> tuple[int, int, int]:
    """Returns the ``(height, width, channels)`` that the net of that name is meant for.

    Raises:
        ValueError: if the name is unknown.
    """
    return _net(name).image_shape
