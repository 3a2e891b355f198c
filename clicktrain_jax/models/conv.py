"""Convolutions to hand to the nets in place of `flax.linen.Conv`, called the same way and with its parameters.

`PatternConv` runs the layers that have a structure by a function that was handed in, and the others dense.

`NarrowConv` has as many filters as its stored kernel: for nets that lose channels while they are trained.

`PatchConv` is for CPUs, where XLA's own convolutions are slow on images smaller than the kernel and inside every
compiled loop (jax issue 12868: some 60 times slower there). As slices and a matrix product the same function trains a
VGG several times faster, in a loop or out of one (`python -m experiments bench loop`, `bench step`); out of one,
`pallas_kernels.dense_conv` is faster still. Its price is memory: the patches, kh * kw times the input, are kept for
the backward pass. On a GPU, cuDNN is the right choice: hand `flax.linen.Conv` to the models there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from clicktrain_jax.models.layout import Layout, Pads, per_axis, spatial_axes

STRUCTURES = "structures"  # the variable collection that PatternConv reads its structure from


class DenseConvolution(Protocol):
    """A convolution with all weights: x in the layout, w (kh, kw, cin, cout) of its dtype -> y in the layout."""

    def __call__(
        self, x: jax.Array, w: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], layout: Layout
    ) -> jax.Array:
        """Convolves."""
        ...


def xla_convolution(
    x: jax.Array, w: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], layout: Layout
) -> jax.Array:
    """XLA's own convolution. Arguments are those of `DenseConvolution`."""
    spatial_axes(layout)  # refuses an unknown one
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=(layout, "HWIO", layout))


def gpu_convolution(
    x: jax.Array, w: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], layout: Layout
) -> jax.Array:
    """XLA's own convolution, but for the weights' gradient where a kernel reaches every pixel from every pixel.

    Of 2x2 images under 3x3 kernels XLA's GPU compiler makes no call of the library's weight gradient but a convolution
    by the slopes, between transposes of the weights' size. Here it is one product of whole images, all pixels of one by
    all pixels of the other, and sums of its parts. Arguments are those of `DenseConvolution`.
    """
    (height, width), (kh, kw) = (x.shape[axis] for axis in spatial_axes(layout)), w.shape[:2]
    sides = ((height, kh, padding[0]), (width, kw, padding[1]))
    reaches = all(size - 1 <= before and size + before <= taps for size, taps, (before, _) in sides)
    same = all(before + after == taps - 1 for _, taps, (before, after) in sides)
    if layout != "NHWC" or tuple(strides) != (1, 1) or not (reaches and same):
        return xla_convolution(x, w, strides=strides, padding=padding, layout=layout)
    return _tiny_images(x, w, tuple(map(tuple, padding)))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tiny_images(x: jax.Array, w: jax.Array, padding: Pads) -> jax.Array:
    return xla_convolution(x, w, strides=(1, 1), padding=padding, layout="NHWC")


def _tiny_images_forward(x: jax.Array, w: jax.Array, padding: Pads) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _tiny_images(x, w, padding), (x, w)


def _tiny_images_backward(padding: Pads, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple:
    x, w = kept
    (kh, kw, cin, cout), (top, left) = w.shape, (before for before, _ in padding)
    height, width = x.shape[1:3]
    products = jnp.einsum("nijc,nklf->klfijc", x, dy)

    def between_pixels(w: jax.Array) -> jax.Array:
        """(cout, kh, kw, cin) -> of each pixel of the result the weights of each of the image, as in ``products``."""
        rows = [w[:, top - row : top - row + height] for row in range(height)]
        return jnp.stack(
            [jnp.stack([w[:, :, left - column : left - column + width] for column in range(width)]) for w in rows]
        )

    # Added up as that is transposed: where the weights are changed too, in the same kernel of a GPU.
    wide = jax.ShapeDtypeStruct((cout, kh, kw, cin), jnp.promote_types(w.dtype, jnp.float32))
    (dw,) = jax.linear_transpose(between_pixels, wide)(products.astype(wide.dtype))
    (dx,) = jax.linear_transpose(lambda x: xla_convolution(x, w, strides=(1, 1), padding=padding, layout="NHWC"), x)(dy)
    return dx, jnp.transpose(dw.astype(w.dtype), (1, 2, 3, 0))


_tiny_images.defvjp(_tiny_images_forward, _tiny_images_backward)


def patch_convolution(
    x: jax.Array, w: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], layout: Layout
) -> jax.Array:
    """Patches gathered by slicing, then one matrix product. Arguments are those of `DenseConvolution`."""
    kh, kw, _, features = w.shape
    row_axis, column_axis = spatial_axes(layout)
    x = jnp.pad(x, per_axis(layout, padding[0], padding[1], (0, 0)))
    row_stride, column_stride = strides
    last_row, last_column = x.shape[row_axis] - kh, x.shape[column_axis] - kw
    taps = [
        x[
            per_axis(
                layout,
                slice(row, row + last_row + 1, row_stride),
                slice(column, column + last_column + 1, column_stride),
                slice(None),
            )
        ]
        for row in range(kh)
        for column in range(kw)
    ]
    patches = jnp.concatenate(taps, axis=-1)
    return jnp.einsum("abck,kf->abcf", patches, w.reshape(-1, features))


class PatternConv(nn.Module):
    """A convolution that runs by its structure where it has one, and dense where it has none.

    The structure is the variable "kernel" of the collection "structures", beside "params", so that one net serves
    every choice of layers. It is whatever ``convolve`` takes, a pytree::

        net = build("vgg13", num_classes=10, layout="HWNC", conv=partial(PatternConv, convolve=pattern_conv))
        net.apply({"params": p, "batch_stats": b, "structures": {"Conv_1": {"kernel": structure}}}, x, train=False)

    Attributes:
        features: number of filters.
        kernel_size: (kh, kw).
        strides: (rows, columns).
        padding: ((top, bottom), (left, right)).
        use_bias: must be False; the nets here have BatchNorm instead.
        dtype: what is computed in; the kernel is kept in float32.
        kernel_init: initializer of the kernel.
        layout: of the input and of the output; the nets say theirs.
        convolve: called as ``convolve(x, w, structure, strides=, padding=, layout=)``, with x and w of ``dtype``.
        dense: a `DenseConvolution` for a layer without structure: `xla_convolution` or `patch_convolution`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] = (1, 1)
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    layout: Layout = "NHWC"
    convolve: Callable[..., jax.Array] | None = None
    dense: DenseConvolution = xla_convolution

    def filters(self) -> int:
        """Number of filters."""
        return self.features

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, cin) -> (batch, rows, columns, features) in ``dtype``; or both in HWNC.

        Raises:
            ValueError: if a bias is asked for, the layout is unknown, or there is a structure but no ``convolve``.
        """
        kernel = _kernel(self, x)
        settings = {"strides": self.strides, "padding": self.padding, "layout": self.layout}
        structure = self.get_variable(STRUCTURES, "kernel")
        if structure is None:
            return self.dense(x.astype(self.dtype), kernel, **settings)
        if self.convolve is None:
            raise ValueError(
                f"{'/'.join(self.path)!r} has a structure but no function that uses it: hand in "
                "partial(PatternConv, convolve=...), such as pallas_kernels.pattern_conv"
            )
        return self.convolve(x.astype(self.dtype), kernel, structure, **settings)


class NarrowConv(PatternConv):
    """`PatternConv` with the number of filters of its stored kernel, whatever ``features`` says.

    A net whose parameters and statistics were sliced to fewer channels runs as it is: BatchNorm and linear layers
    take their widths from their inputs. Without a stored kernel, as in ``init``, ``features`` holds::

        net = build("vgg13", num_classes=10, conv=partial(NarrowConv, dense=patch_convolution))
    """

    def filters(self) -> int:
        """Of the stored kernel; ``features`` where there is none."""
        kernel = self.get_variable("params", "kernel")
        return self.features if kernel is None else jnp.shape(kernel)[-1]


class PatchConv(PatternConv):
    """`PatternConv` whose dense form is patches: in place of `flax.linen.Conv` where XLA's convolutions are slow."""

    dense: DenseConvolution = patch_convolution


def _kernel(module: PatternConv, x: jax.Array) -> jax.Array:
    """A module's kernel in the dtype that it computes in; the kept one is float32."""
    if module.use_bias:
        raise ValueError(f"{type(module).__name__} has no bias: use_bias=True is for flax.linen.Conv")
    shape = (*module.kernel_size, x.shape[-1], module.filters())
    return module.param("kernel", module.kernel_init, shape, jnp.float32).astype(module.dtype)
