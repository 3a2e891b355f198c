"""Nets as plain functions: kernels are leaves "a", "b", ... of a dict; what is found of their channels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def conv(x, kernel, groups=1, layout="NHWC"):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=(layout, "HWIO", layout), feature_group_count=groups
    )


@jax.custom_vjp
def squared(x):
    return x * x


squared.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))
CONVS = {"a": (3, 3, 3, 8), "b": (3, 3, 8, 6), "c": (6, 5)}


def head(params, x):
    return jnp.mean(jax.nn.relu(conv(x, params["b"])), axis=(1, 2)) @ params["c"]


def flattened(params, x):
    return conv(x, params["a"]).reshape(x.shape[0], -1) @ params["b"]


def channels_first(params, x):
    x = conv(jnp.moveaxis(x, -1, 1), params["a"], layout="NCHW")
    return jnp.tanh(x + params["bias"].reshape(-1, 1, 1)).reshape(x.shape[0], -1) @ params["b"]


def depthwise(params, x):
    x = conv(x, params["a"])
    return head(params, jax.nn.gelu(conv(x, params["d"], groups=8)))


def wrapped(params, x):
    x = jax.checkpoint(lambda kernel, x: jax.nn.silu(conv(x, kernel)))(params["a"], x)
    return head(params, jax.jit(lambda x: lax.optimization_barrier(squared(x)))(x))


def shared(params, x):
    """One kernel twice: its input and output channels are one group."""
    x = conv(x, params["a"])
    for _ in range(2):
        x = jax.nn.softmax(conv(x, params["d"]))
    return head(params, x)


def low_rank_and_masked(params, x):
    kernel = (params["a"].reshape(27, 8) @ params["d"]).reshape(3, 3, 3, 8)
    return head({**params, "b": params["b"] * params["mask"]}, conv(x, kernel))


def gated(params, x):
    """Squeeze and excitation, then a stack of equal copies and an average over it."""
    x = conv(x, params["a"])
    gate = jax.nn.sigmoid(jnp.mean(x, axis=(1, 2)) @ params["d"])
    x = x * gate[:, None, None]
    return head(params, jnp.mean(jnp.stack([x, jnp.flip(x, axis=1)]), axis=0))


def attention(params, x):
    x = conv(x, params["a"]).reshape(x.shape[0], -1, 8)
    scores = jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", x @ params["q"], x @ params["k"]))
    return jnp.max(scores @ (x @ params["v"]), axis=1) @ params["c"]


# function, shapes, {writer: (readers, followers)} of the free groups.
FREE = {
    flattened: ({"a": (3, 3, 3, 8), "b": (128, 5)}, {"a": ([("b", 0, 16)], [])}),
    channels_first: ({"a": (3, 3, 3, 8), "bias": (8,), "b": (128, 5)}, {"a": ([("b", 0, 1)], [("bias", 0)])}),
    depthwise: ({**CONVS, "d": (3, 3, 1, 8)}, {"a": ([("b", 2, 1)], [("d", 3)]), "b": ([("c", 0, 1)], [])}),
    wrapped: (CONVS, {"a": ([("b", 2, 1)], []), "b": ([("c", 0, 1)], [])}),
    shared: ({**CONVS, "d": (3, 3, 8, 8)}, {"a+d": ([("d", 2, 1), ("b", 2, 1)], []), "b": ([("c", 0, 1)], [])}),
    low_rank_and_masked: (
        {**CONVS, "d": (8, 8), "mask": (3, 3, 8, 6)},
        {"a": ([("d", 0, 1)], []), "d": ([("b", 2, 1), ("mask", 2, 1)], []), "b+mask": ([("c", 0, 1)], [])},
    ),
    gated: ({**CONVS, "d": (8, 8)}, {"a+d": ([("d", 0, 1), ("b", 2, 1)], []), "b": ([("c", 0, 1)], [])}),
    attention: (
        {"a": (3, 3, 3, 8), "q": (8, 4), "k": (8, 4), "v": (8, 6), "c": (6, 5)},
        {"a": ([("q", 0, 1), ("k", 0, 1), ("v", 0, 1)], []), "q+k": ([], []), "v": ([("c", 0, 1)], [])},
    ),
}


def concatenated(params, x):
    x = conv(x, params["a"])
    return head(params, jnp.concatenate([x, jnp.abs(x), x[..., :2]], axis=-1))


def grouped(params, x):
    return head(params, conv(conv(x, params["a"]), params["d"], groups=2))


def group_norm(params, x):
    x = conv(x, params["a"])
    return head(params, nn.GroupNorm(num_groups=2, use_bias=False, use_scale=False).apply({}, x))


def cumulative(params, x):
    return head(params, jnp.cumsum(conv(x, params["a"]), axis=-1))


def picked(params, x):
    return head(params, conv(x, params["a"])[..., jnp.array([1, 0, 2, 3, 4, 5, 6, 7])])


def halved(params, x):
    return head(params, conv(x, params["a"])[..., ::2])


def reversed_(params, x):
    return head(params, conv(x, params["a"])[..., ::-1])


def looped(params, x):
    return head(params, lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x), conv(x, params["a"])))


def with_constants(params, x):
    return head(params, conv(x, params["a"]) * np.linspace(0.5, 1.5, 8, dtype=np.float32))


def with_positions(params, x):
    return head(params, conv(x, params["a"]) * lax.iota(jnp.float32, 8))


def local_max(params, x):
    return head(params, nn.max_pool(conv(x, params["a"])[..., None], (1, 1, 3), (1, 1, 1), "SAME")[..., 0])


# function, shapes, what the reason for fixing "a" says.
FIXED = {
    concatenated: ({**CONVS, "b": (3, 3, 18, 6)}, "slice|concatenated"),
    grouped: ({**CONVS, "d": (3, 3, 4, 8)}, "2 groups"),
    group_norm: (CONVS, "reshape"),
    cumulative: (CONVS, "cumsum"),
    picked: (CONVS, "gather"),
    halved: ({**CONVS, "b": (3, 3, 4, 6)}, "slice|gather"),
    reversed_: (CONVS, "reversed"),
    looped: (CONVS, "scan|while"),
    with_constants: (CONVS, "constants"),
    with_positions: (CONVS, "iota"),
    local_max: (CONVS, "positions"),
}
