"""BatchNorm and what follows it, to hand to the nets: flax's own, or one operation that was handed in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clicktrain_jax.models.layout import Layout, max_pool, spatial_axes


class Norm(nn.BatchNorm):
    """`flax.linen.BatchNorm`, then the sum with a shortcut, ReLU and a 2x2 max pool, each where it is asked for.

    Parameters, statistics and their names are flax's, and so is what is computed, but in training with ``normalise``.

    Attributes:
        relu: whether what is negative becomes zero.
        pool: whether the largest of each 2x2 pixels is taken.
        layout: of the maps.
        normalise: None, or computes all of it in training: called as ``normalise(x, scale, bias, added=, epsilon=,
            relu=, pool=, around=, layout=)``, ``around`` being the running mean; returns (y, mean, biased variance);
            such as `pallas_kernels.batch_norm`.
    """

    relu: bool = False
    pool: bool = False
    layout: Layout = "NHWC"
    normalise: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | None = None) -> jax.Array:
        """Maps of ``dtype``, ``added`` of x's shape -> maps of half the height and width where they are pooled."""
        if self.use_running_average or self.normalise is None or self.is_initializing():
            y = super().__call__(x)
            y = y if added is None else added + y
            y = nn.relu(y) if self.relu else y
            return max_pool(y, 2, 2, self.layout) if self.pool else y
        width = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        scale = self.param("scale", self.scale_init, width, self.param_dtype)
        bias = self.param("bias", self.bias_init, width, self.param_dtype)
        even = not any(x.shape[axis] % 2 for axis in spatial_axes(self.layout))
        inside = self.pool and even and added is None
        y, *now = self.normalise(
            x.astype(self.dtype),
            scale,
            bias,
            added=None if added is None else added.astype(self.dtype),
            epsilon=self.epsilon,
            relu=self.relu,
            pool=inside,
            around=mean.value,
            layout=self.layout,
        )
        for running, found in zip((mean, var), now):
            running.value = self.momentum * running.value + (1 - self.momentum) * found
        return max_pool(y, 2, 2, self.layout) if self.pool and not inside else y


def norm_of(norm: Any, train: bool, dtype: Any, layout: Layout, **own: Any) -> Any:
    """The handed normalisation with the settings that all nets here share, and a net's own."""
    return partial(norm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, layout=layout, **own)
