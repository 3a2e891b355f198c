"""Sizes of a net: widths that scale, layers in network order, output sizes, weights.

A Flax parameter tree is a dict, and its order is not the order in which the layers run. Recipes
name layers "in network order", and multiply-adds need output sizes, so both are read off one
abstract call of the model: `jax.eval_shape` runs no arithmetic, and an interceptor sees each module
as it is called. Nothing here knows a particular net, and nothing asks for `nn.Conv`: whatever owns
a 4-dimensional parameter named ``kernel`` is a convolution, so an injected class counts too.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

# Called as nn.Conv is, with (features, kernel_size, strides=, padding=, use_bias=, dtype=,
# kernel_init=, name=) and nothing else but layout=, where it has such a parameter; padding is
# ((top, bottom), (left, right)).
ModuleDef = Callable[..., nn.Module]

_WIDTH_STEP = 8  # narrow nets stay friendly to vector units and to tiles of 8 filters


@dataclass(frozen=True)
class ConvLayer:
    """One convolution of a net.

    Attributes:
        path: "/"-joined path below the collection ``params``, such as ``"Conv_3/kernel"``.
        kernel_shape: ``(kh, kw, cin, cout)``.
        output_size: ``(height, width)`` of what the convolution puts out.
    """

    path: str
    kernel_shape: tuple[int, int, int, int]
    output_size: tuple[int, int]


def scaled_width(features: int, width: float) -> int:
    """Returns ``features * width``, rounded to a multiple of 8 and at least 8.

    Raises:
        ValueError: if `width` is not positive and finite.
    """
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive number, got {width!r}")
    return max(_WIDTH_STEP, round(features * width / _WIDTH_STEP) * _WIDTH_STEP)


def check_images(x: jax.Array, *, size: tuple[int, int] | None = None) -> None:
    """Refuses what is not a batch of normalised images.

    Args:
        x: should be floating point, of shape (batch, height, width, channels).
        size: the ``(height, width)`` the net is made for; None when any will do.

    Raises:
        ValueError: if rank, dtype or size is another; the message names what came.
    """
    if x.ndim != 4:
        raise ValueError(f"images must have shape (batch, height, width, channels), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating-point (normalised) images, got {x.dtype}")
    height, width = x.shape[1:3]
    if size is not None and (height, width) != size:
        raise ValueError(f"this net takes images of {size[0]}x{size[1]}, got {height}x{width}")


def abstract_variables(model: nn.Module, image_shape: Sequence[int]) -> Mapping[str, Any]:
    """Returns what ``model.init`` would, as `jax.ShapeDtypeStruct` leaves and without computing.

    Args:
        model: any linen module that takes a batch of images; ``train=False`` is passed where its
            ``__call__`` has a parameter of that name.
        image_shape: ``(height, width, channels)`` of one image.

    Raises:
        ValueError: if `image_shape` is not three positive integers.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape!r}")
    takes_train = "train" in inspect.signature(type(model).__call__).parameters
    options: dict[str, Any] = {"train": False} if takes_train else {}

    # A fresh closure each time: a cached trace would never reach the interceptor of `_trace`.
    def init() -> Mapping[str, Any]:
        return model.init(jax.random.key(0), jnp.zeros((1, *shape), jnp.float32), **options)

    return jax.eval_shape(init)


def _trace(model: nn.Module, image_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], tuple[int, int]]]:
    """Returns ``path -> (kernel shape, output size)`` of 2-D and 4-D kernels, in call order."""
    sizes: dict[str, tuple[int, int]] = {}

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            # (H, W) of a map, nothing after a flattened Dense.
            in_hwnc = out.ndim == 4 and getattr(module, "layout", "NHWC") == "HWNC"
            positions = out.shape[:2] if in_hwnc else out.shape[1:-1]
            size = (math.prod(positions[:-1]), math.prod(positions[-1:]))
            path = "/".join((*module.path, "kernel"))
            if sizes.setdefault(path, size) != size:
                raise ValueError(
                    f"{path!r} is applied at two output sizes, {sizes[path]} and {size}: one size cannot describe it"
                )
        return out

    with nn.intercept_methods(record):
        variables = abstract_variables(model, image_shape)

    leaves: dict[str, Any] = dict(flatten_dict(variables.get("params", {}), sep="/"))
    kernels = {
        path: leaf.shape
        for path, leaf in leaves.items()
        if path.rpartition("/")[2] == "kernel" and len(leaf.shape) in (2, 4)
    }
    unseen = sorted(kernels.keys() - sizes.keys())
    if unseen:  # e.g. applied by a method other than __call__: better said than left out of a count
        raise ValueError(f"no module call was seen for the kernels {unseen}")
    return {path: (kernels[path], size) for path, size in sizes.items() if path in kernels}


def conv_layers(model: nn.Module, image_shape: Sequence[int]) -> tuple[ConvLayer, ...]:
    """Lists the convolutions of `model` in the order in which they are first called.

    Args:
        model: any linen module that takes a batch of images (see `abstract_variables`).
        image_shape: ``(height, width, channels)`` of one image.

    Returns:
        One `ConvLayer` for each 4-D parameter named ``kernel``; one that is applied several times
        (always at one size) is listed once.

    Raises:
        ValueError: if `image_shape` is malformed, if a kernel is applied at two output sizes, or if
            no call of the module that owns it was seen.
    """
    return tuple(
        ConvLayer(path, shape, size) for path, (shape, size) in _trace(model, image_shape).items() if len(shape) == 4
    )


def output_sizes(model: nn.Module, image_shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Returns how many places each kernel is applied at, which multiply-adds are counted from.

    Args:
        model: any linen module that takes a batch of images (see `abstract_variables`).
        image_shape: ``(height, width, channels)`` of one image.

    Returns:
        ``path -> (height, width)`` for convolutions and 2-D Dense kernels, in call order; a Dense
        on flattened features has ``(1, 1)``. Weights times ``height * width``, summed, are the
        multiply-adds of one image (of a net that applies each kernel once).

    Raises:
        ValueError: as `conv_layers`.
    """
    return {path: size for path, (_, size) in _trace(model, image_shape).items()}


def prunable_convs(model: nn.Module, image_shape: Sequence[int]) -> tuple[str, ...]:
    """Returns the paths of the convolutions that a ClickTrain recipe lists, in network order.

    That is all of them but the first and the shortcuts (paths with ``shortcut`` in them): 7, 9 and
    12 for VGG-11, 13 and 16, 30 for the wide ResNet-32, 48 for ResNet-50. Arguments and errors are
    those of `conv_layers`.
    """
    paths = [layer.path for layer in conv_layers(model, image_shape)]
    return tuple(path for path in paths[1:] if "shortcut" not in path)


def parameter_count(tree: Any) -> int:
    """Returns the number of values in `tree`, whose leaves are arrays or `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
