"""Users' own nets in C: every kind of step, odd sizes, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import check
from flax import nnx
from jax import lax

import clicktrain_jax as ct
from clicktrain_jax.deploy.c_net import to_c
from clicktrain_jax.deploy.load import inference_net

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path / "cache"))


def net_of(function, variables, shape, masks=None, normalise=None):
    return inference_net(function, variables, masks, image_shape=shape, normalise=normalise)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))


def scattered(shape, kept=0.3, seed=0):
    """A mask of many patterns: each weight by itself."""
    return np.random.default_rng(seed).random(shape) < kept


def cornered(shape, seed=0):
    """Two taps of each kernel, in one of four places."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    rows, columns = rng.integers(0, shape[0] - 1, shape[2:]), rng.integers(0, shape[1] - 1, shape[2:])
    cin, cout = np.indices(shape[2:])
    mask[rows, columns, cin, cout] = mask[rows + 1, columns + 1, cin, cout] = rng.random(shape[2:]) < 0.6
    return mask


MASKS = {"corners": cornered, "single weights": scattered, "dense": None}
GEOMETRIES = [
    ((7, 10, 5), (3, 3), (1, 1), "SAME"),
    ((15, 13, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 8, 3), (5, 5), (2, 1), "SAME"),
    ((9, 6, 8), (2, 4), (1, 3), "VALID"),
    ((3, 3, 9), (3, 3), (1, 1), "SAME"),
    ((2, 2, 9), (3, 3), (1, 1), "SAME"),
    ((33, 3, 2), (3, 2), (1, 1), ((2, 3), (0, 4))),
    ((6, 6, 4), (3, 3), (1, 1), ((-1, 0), (1, -2))),
]
# What is pruned by patterns is written in each; of all else one with and one without strides, padding and cuts.
MASKED = [
    *(("corners", number) for number in range(8)),
    *(("single weights", number) for number in (0, 2, 3, 7)),
    *(("dense", number) for number in (1, 3, 5, 6)),
]


@pytest.mark.parametrize(("kind", "number"), MASKED)
def test_geometry(kind, number, tmp_path):
    """Two convolutions, so that the second reads what the first has written around its result."""
    (shape, window, strides, padding), mask = GEOMETRIES[number], MASKS[kind]
    kernels = {"a": normal(*window, shape[2], 20), "b": normal(3, 3, 20, 24, seed=1)}
    masks = None
    if mask is not None:
        masks = {name: mask(kernel.shape) for name, kernel in kernels.items()}
        kernels = {name: kernel * masks[name] for name, kernel in kernels.items()}

    def function(variables, x):
        x = lax.conv_general_dilated(x, variables["a"], strides, padding, dimension_numbers=NHWC)
        x = lax.conv_general_dilated(jax.nn.relu(x - 0.1), variables["b"], (1, 1), "SAME", dimension_numbers=NHWC)
        return x.reshape(1 * x.shape[0], -1)

    check(net_of(function, kernels, shape, masks), tmp_path)


def test_every_kind_of_step(tmp_path):
    """What stands between convolutions, at the image and at the logits."""
    variables = {
        "a": normal(3, 3, 3, 20),
        "b": normal(1, 1, 20, 20, seed=1),
        "scale": np.linspace(0.5, 1.5, 20, dtype=np.float32),
        "map": normal(6, 5, 20, seed=2),
        "head": normal(3 * 3 * 24, 7, seed=3),
        "pixels": normal(24, 24, seed=4),
    }

    def function(variables, x):
        x = lax.conv_general_dilated(x, variables["a"], (1, 1), "SAME", dimension_numbers=NHWC)
        x = jax.nn.relu(x * variables["scale"])  # goes into the kernel
        y = jnp.tanh(x * variables["scale"] + 0.1) / (2.0 - jax.nn.sigmoid(x))
        y = lax.conv_general_dilated(y, variables["b"], (1, 1), "VALID", dimension_numbers=NHWC)
        x = jnp.minimum(jnp.maximum(0.3 - y + x, -1.0), 6.0) + variables["map"]
        x = jnp.clip(nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), -2, 2) ** 2 - jnp.abs(x[:, ::2, ::2]) ** 3
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 3)))
        x = jnp.sqrt(jnp.exp(-jnp.tanh(x)) + lax.rsqrt(nn.avg_pool(x * x + 1.0, (2, 2), (1, 1), "SAME")))
        x = x @ variables["pixels"] + x.transpose(0, 2, 1, 3)
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # as PyTorch's nets have it
        return jax.nn.log_softmax(x @ variables["head"])

    check(net_of(function, variables, (6, 5, 3)), tmp_path)


def test_channels_first_and_softmax(tmp_path):
    variables = {"a": normal(8, 3, 3, 3), "b": normal(16, 8, 3, 3, seed=1), "head": normal(16, 5, seed=2)}

    def function(variables, x):
        x = x.transpose(0, 3, 1, 2)
        for name in "ab":
            x = lax.conv(x, variables[name], (1, 1), "SAME")
            x = nn.relu(x - x.mean((1, 2, 3), keepdims=True) * 0.1)
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return jax.nn.softmax(x.max((2, 3)) @ variables["head"])

    check(net_of(function, variables, (9, 8, 3)), tmp_path)


def test_a_linen_net_before_and_after_normalisation(tmp_path):
    class Net(nn.Module):
        """BatchNorm before its convolution, which cannot be folded into it."""

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3, 3), strides=2)(x)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = x + nn.Conv(16, (3, 3))(y)
            return nn.Dense(5)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1))

    model, shape = Net(), (12, 12, 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    variables = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), variables)
    masks = {"Conv_1": {"kernel": cornered((3, 3, 16, 16))}}
    params = jax.tree.map(np.asarray, variables["params"])
    params["Conv_1"]["kernel"] = params["Conv_1"]["kernel"] * masks["Conv_1"]["kernel"]
    variables = {**variables, "params": params}
    for normalise in (None, {"mean": [0.5] * 3, "std": [0.2] * 3}):
        net = net_of(model.apply, variables, shape, masks, normalise)
        pixel = b"typedef float net_pixel" if normalise is None else b"typedef uint8_t net_pixel"
        assert pixel in to_c(net)["net.h"]
        check(net, tmp_path / str(normalise is None))


def test_an_nnx_net(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
            self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(32, rngs=rngs, use_running_average=True)
            self.head = nnx.Linear(32, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.second(nnx.relu(self.first(x))))).mean((1, 2)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    net = net_of(lambda state, x: nnx.merge(graphdef, state)(x), state, (8, 8, 3))
    check(net, tmp_path)


def test_short_floats_are_computed_in_float32(tmp_path):
    kernel = normal(3, 3, 3, 16).astype(jnp.bfloat16)

    def function(variables, x):
        x = lax.conv_general_dilated(x.astype(jnp.bfloat16), variables["a"], (1, 1), "SAME", dimension_numbers=NHWC)
        return nn.relu(x).astype(jnp.float32).mean((1, 2))

    files = to_c(net_of(function, {"a": kernel}, (8, 8, 3)))
    exact = net_of(function_in_float32, {"a": kernel.astype(np.float32)}, (8, 8, 3))
    check(exact, tmp_path, files)


def function_in_float32(variables, x):
    x = lax.conv_general_dilated(x, variables["a"], (1, 1), "SAME", dimension_numbers=NHWC)
    return nn.relu(x).mean((1, 2))


def test_everything_is_removed(tmp_path):
    masks = {"a": np.zeros((3, 3, 3, 20), bool)}

    def function(variables, x):
        x = lax.conv_general_dilated(x, variables["a"], (1, 1), "SAME", dimension_numbers=NHWC)
        return x.mean((1, 2)) + jnp.arange(20.0)

    check(net_of(function, {"a": np.zeros((3, 3, 3, 20), np.float32)}, (6, 6, 3), masks), tmp_path)


@pytest.mark.parametrize(
    "kind, named",
    [
        ("groups", "has 2 groups"),
        ("dilated", "'a' is dilated"),
        ("one axis", "is over 1 axes"),
        ("step", "'sort'"),
        ("constant", "do not depend on the image"),
        ("product", "'dot_general'"),
        ("joined", "'concatenate'"),
    ],
)
def test_what_is_refused(kind, named, tmp_path):
    def function(variables, x):
        kernel = variables["a"]
        if kind == "groups":
            return lax.conv_general_dilated(
                x, kernel[:, :, :2], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2
            )
        if kind == "dilated":
            return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, rhs_dilation=(2, 2))
        if kind == "one axis":
            return lax.conv_general_dilated(x[:, 0], kernel[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        if kind == "step":
            return jnp.sort(x, axis=1)
        if kind == "constant":
            return jnp.zeros((x.shape[0], 3))
        if kind == "product":
            return jnp.einsum("nhwc,nhvc->nwv", x, x)
        return jnp.concatenate([x, 2 * x], axis=-1)

    variables = {"a": normal(3, 3, 4, 6)}
    with pytest.raises(ValueError, match=named) as refused:
        net = net_of(function, variables, (6, 6, 4))
        to_c(net)
    assert str(refused.value).startswith("net.c: ")
    with pytest.raises(ValueError, match=named):
        ct.export(tmp_path / "net", function, variables, None, image_shape=(6, 6, 4), stablehlo=False, c=True)
    assert not (tmp_path / "net").exists()
