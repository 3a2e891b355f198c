"""Nets as others write them: what is run by pattern, what stays dense and why, and what is refused with what reason."""

import functools
import warnings

import drawn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import clicktrain_jax as ct
from clicktrain_jax.deploy import arguments
from clicktrain_jax.trees import map_named, named_leaves

X = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)


def leaf(seed, shape=(3, 3, 8, 8)):
    return (0.3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def conv(x, w, **settings):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


class Mixed(nn.Module):
    """Convolutions over one, two and three axes, one of them applied to two images."""

    @nn.compact
    def __call__(self, x):
        flat = nn.Conv(8, (3,), name="line")(x.reshape(x.shape[0], -1, 8)).reshape(x.shape)
        plane = nn.Conv(8, (3, 3), name="plane")
        deep = nn.Conv(1, (3, 3, 3), name="space")(jnp.tanh(plane(flat))[..., None])[..., 0]
        return plane(deep).mean((1, 2))


class Twins(nn.Module):
    """Two modules in one scope, whose kernels stand side by side."""

    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(8, (3, 3), name="one")(x)

    class Second(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(8, (3, 3), strides=2, name="two")(x)

    def setup(self):
        self.first, self.second = self.First(), self.Second()
        nn.share_scope(self.first, self.second)

    def __call__(self, x):
        return self.second(nn.relu(self.first(x))).mean((1, 2))


class Ensemble(nn.Module):
    """Members whose kernels are stacked, behind a plain convolution that is computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.remat(nn.Conv)(8, (3, 3), name="stem")(x))
        members = nn.vmap(nn.Conv, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)
        return members(8, (3, 3), name="members")(x).mean((0, 2, 3))


class Kinds(nn.Module):
    """Depthwise and pointwise, dilated, circular, grouped, transposed; in bfloat16, of float32 weights."""

    @nn.compact
    def __call__(self, x):
        make = functools.partial(nn.Conv, 8, (3, 3), dtype=jnp.bfloat16)
        x = nn.Conv(8, (1, 1), dtype=jnp.bfloat16, name="point")(make(feature_group_count=8, name="depth")(x))
        x = make(padding="CIRCULAR", name="circle")(make(kernel_dilation=2, name="dilated")(x))
        x = make(feature_group_count=2, name="grouped")(x)
        return nn.ConvTranspose(8, (3, 3), (2, 2), dtype=jnp.bfloat16, name="up")(x).astype(jnp.float32).mean((1, 2))


class Tied(nnx.Module):
    """One module under two names."""

    def __init__(self, rngs):
        self.a = self.b = nnx.Conv(8, 8, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x))).mean((1, 2))


def of_linen(model, *inputs):
    params = jax.jit(model.init)(jax.random.key(1), *(inputs or (X,)))["params"]
    return params, lambda params, *inputs: model.apply({"params": params}, *inputs)


def of_nnx(module):
    graphdef, state = nnx.split(module)
    return state, lambda state, x: nnx.merge(graphdef, state)(x)


def straight_through(w, scale):
    """Fake quantisation as it is mostly written."""
    return w + lax.stop_gradient(jnp.clip(jnp.round(w / scale), -127, 127) * scale - w)


@jax.custom_vjp
def quantised(w):
    """With a scale of its own: of the largest of what is retained, and what else is returned has no zeros."""
    scale = jnp.abs(w).max() / 7
    return jnp.clip(jnp.round(w / scale), -7, 7) * scale, scale


quantised.defvjp(lambda w: (quantised(w), None), lambda _, g: (g[0],))


def looped(params, x):
    x = jnp.tanh(conv(x, params["a"]))
    return lax.scan(lambda x, _: (jnp.tanh(conv(x, params["b"])), None), x, length=2)[0].mean((1, 2))


def branched(params, x):
    x = jnp.tanh(conv(x, params["a"]))
    return lax.cond(x.sum() > 0, lambda x: conv(x, params["b"]), lambda x: conv(-x, params["b"]), x).mean((1, 2))


def with_lora(params, x):
    # What is added has no zeros.
    kernel = params["a"] + (params["down"] @ params["up"]).reshape(3, 3, 8, 8)
    return conv(jnp.tanh(conv(x, kernel)), params["b"]).mean((1, 2))


def quantising(params, x):
    kernel, scale = quantised(params["b"])
    return conv(jnp.tanh(conv(x, straight_through(params["a"], 0.1))), kernel).mean((1, 2)) + scale


def two_uses(params, x):
    """A kernel that a convolution reads twice, one of them dilated, and a product and a regulariser besides."""
    y = jnp.tanh(conv(x, params["a"])) + conv(x, params["a"], rhs_dilation=(2, 2))
    return y.mean((1, 2)) + x.mean((1, 2)) @ params["a"][1, 1] + jnp.square(params["a"]).sum()


PAIR = {"a": leaf(1), "b": leaf(2)}
SPARSE, ANY = "sparse", ".*kernel"
# name: ((params, forward), rules, options of the plan, {leaf: what runs how, in the order of the calls}).
NETS = {
    "1-D and 3-D beside 2-D": (of_linen(Mixed()), {"plane/kernel": 0.5}, {}, "plane plane"),
    "one scope for two": (of_linen(Twins()), {".*(one|two)/kernel": 0.5}, {}, "second/one second/two"),
    "ensemble and remat": (of_linen(Ensemble()), {"stem/kernel": 0.5}, {}, "stem"),
    "kinds": (
        of_linen(Kinds()),
        {"(depth|grouped)/kernel": 0.0, ANY: 0.5},
        {"groups": {"grouped/kernel": 2}},
        "depth: 8 groups, point, dilated: dilated, circle, grouped: 2 groups, up: transposed",
    ),
    "tied in nnx": (of_nnx(Tied(nnx.Rngs(0))), {ANY: 0.5}, {}, "a a"),
    "one leaf, several uses": (({"a": leaf(1)}, two_uses), {"a": 0.5}, {}, "a, a: dilated"),
    "frozen": ((PAIR, lambda p, x: looped(lax.stop_gradient(p), x)), {"[ab]": 0.5}, {}, "a, b: inside of 'scan'"),
    "loop": ((PAIR, looped), {"[ab]": 0.5}, {}, "a, b: inside of 'scan'"),
    "branches": ((PAIR, branched), {"[ab]": 0.5}, {}, "a, b: inside of 'cond', b: inside of 'cond'"),
    "LoRA": (
        (PAIR | {"down": leaf(3, (72, 2)), "up": leaf(4, (2, 8))}, with_lora),
        {"[ab]": 0.5},
        {},
        "a: computed from 'a', b",
    ),
    "fake quantisation": ((PAIR, quantising), {"[ab]": 0.5}, {}, "a b"),
}


def masked(params, rules, options):
    """Masks of weights of which what is removed holds anything, and the weights as they should count."""
    masks = drawn.drawn_masks(params, ct.make_plan(params, rules, **options))
    kept = drawn.masked(params, masks)
    zero = dict(named_leaves(kept))
    spoilt = map_named(
        lambda name, weight: np.where((zero[name] == 0) & (weight != 0), np.float32(1e3), weight), params
    )
    return masks, spoilt, kept


@pytest.mark.parametrize("name", NETS)
def test_nets(name, tmp_path):
    (params, forward), rules, options, expected = NETS[name]
    masks, spoilt, kept = masked(params, rules, options)
    fast = ct.accelerate(forward, masks, backend="xla")
    wanted = jax.jit(forward)(kept, X)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "masks: 'a' is pruned" if name == "LoRA" else "nothing")
        got = jax.jit(fast)(spoilt, X)
        rows = [row for row in fast.report(spoilt, X).convolutions if row.why != "nothing of it is removed"]
    tolerance = 2e-2 if name == "kinds" else 1e-4
    np.testing.assert_allclose(got, wanted, atol=tolerance * float(jnp.abs(wanted).max()))
    wanted_rows = expected.split(", ") if "," in expected else expected.split()
    pairs = [row.partition(": ") for row in wanted_rows]
    rows = [row for row in rows if "members" not in row.name]
    assert [row.name.removesuffix("/kernel") for row in rows] == [leaf for leaf, _, _ in pairs]
    for row, (_, _, why) in zip(rows, pairs):
        assert row.runs == ("dense" if why else SPARSE) and why in row.why, row
    # The same net as a file: what no pattern can run is said.
    dense = name in ("loop", "branches", "LoRA", "frozen")
    with pytest.warns(UserWarning, match="they run dense") if dense else warnings.catch_warnings():
        ct.export(tmp_path / "net", forward, kept, masks, image_shape=X.shape[1:])
    got = ct.load(tmp_path / "net")(X)
    np.testing.assert_allclose(got, wanted, atol=max(tolerance, 1e-3) * float(jnp.abs(wanted).max()))


def test_what_a_rule_of_its_own_reads_is_masked():
    """The scale is that of what stays, and its gradient the function's own rule."""
    masks, spoilt, kept = masked(PAIR, {"[ab]": 0.5}, {})
    fast = ct.accelerate(quantising, masks, backend="xla")

    def slopes(forward, params):
        grads = jax.jit(jax.grad(lambda params: jnp.square(forward(params, X)).sum()))(params)
        return ct.apply_masks(grads, masks)

    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4),
        slopes(fast, spoilt),
        slopes(quantising, kept),
    )


@pytest.mark.parametrize(
    ("function", "sparse"),
    [
        (lambda w: jnp.clip(w, -0.2, 0.3), True),
        (lambda w: jnp.clip(w, 0.1, 0.3), False),
        (lambda w: jnp.maximum(w, -0.1), True),
        (lambda w: jnp.maximum(w, 0.1), False),
        (lambda w: jnp.minimum(w, -0.1), False),
        (lambda w: lax.clamp(-0.1, w, 0.0), True),
        (lambda w: lax.clamp(0.1, w, 0.2), False),
        (lambda w: jnp.tanh(w) ** 3 + jnp.sign(w) * jnp.abs(w), True),
        (lambda w: jnp.cos(w), False),
        (lambda w: w + w[::-1], False),
        (lambda w: w[::-1] - 2 * w[::-1], True),
        (lambda w: w + 0.1, False),
        (lambda w: w * w[::-1], True),
        (lambda w: w**-1.0, False),
    ],
)
def test_which_steps_keep_zeros(function, sparse):
    params = {"a": leaf(1)}
    masks, spoilt, kept = masked(params, {"a": 0.5}, {})
    fast = ct.accelerate(lambda params, x: conv(x, function(params["a"])), masks, backend="xla")
    with warnings.catch_warnings():
        warnings.simplefilter("default" if sparse else "ignore")
        (row,) = fast.report(spoilt, X).convolutions
        got = fast(spoilt, X)
    assert row.runs == ("sparse" if sparse else "dense"), row
    wanted = conv(X, function(jnp.asarray(kept["a"])))
    if np.isfinite(wanted).all():
        np.testing.assert_allclose(got, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


class Pyramid(nn.Module):
    """Several maps, and a head on the side."""

    @nn.compact
    def __call__(self, x):
        near = nn.relu(nn.Conv(8, (3, 3), name="near")(x))
        far = nn.Conv(8, (3, 3), strides=2, name="far")(near)
        return {"maps": (near, far), "logits": nn.Dense(3)(far.mean((1, 2)))}


class Pair(nn.Module):
    """Two inputs."""

    @nn.compact
    def __call__(self, x, y):
        return (nn.Conv(8, (3, 3), name="near")(x) + nn.Conv(8, (3, 3), name="far")(y)).mean((1, 2))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Pyramid(), (X,), "returns dict; expected one array of logits: return one of its outputs"),
        (Pair(), (X, X[:, ::-1]), r"cannot be called with \(variables, images\).*Images are its one input"),
    ],
)
def test_several_outputs_and_inputs(model, inputs, message, tmp_path):
    """They are accelerated like any other; a file has one of each."""
    params = jax.jit(model.init)(jax.random.key(1), *inputs)["params"]
    if len(inputs) == 1:
        forward = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    else:
        forward = lambda params, x, y: model.apply({"params": params}, x, y)  # noqa: E731
    masks, spoilt, kept = masked(params, {"(near|far)/kernel": 0.5}, {})
    fast = ct.accelerate(forward, masks, backend="xla")
    got, wanted = jax.jit(fast)(spoilt, *inputs), jax.jit(forward)(kept, *inputs)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, atol=1e-4), got, wanted)
    assert [row.runs for row in fast.report(spoilt, *inputs).convolutions] == ["sparse", "sparse"]
    with pytest.raises(ValueError, match=message):
        ct.export(tmp_path / "net", forward, kept, masks, image_shape=X.shape[1:])


def test_a_wrapper_is_asked_for_its_own_arguments():
    """Not for those of the function that it wraps and fills in."""

    def whole(variables, images, key):
        del key
        return images.mean((1, 2)) * variables["scale"]

    @functools.wraps(whole)
    def forward(variables, images):
        return whole(variables, images, None)

    for function in (forward, jax.jit(forward)):
        arguments.check_function(function, ("variables", "images"))
    with pytest.raises(ValueError, match="cannot be called with"):
        arguments.check_function(whole, ("variables", "images"))


def plain(params, x):
    return conv(jnp.tanh(conv(x, params["a"])), params["b"]).mean((1, 2))


@pytest.mark.parametrize("where", ["closed over", "a variable", "made of a variable"])
def test_typed_random_keys(where, tmp_path):
    """NumPy does not have them."""
    masks, spoilt, kept = masked(PAIR, {"[ab]": 0.5}, {})
    key = jax.random.key(0, impl="rbg" if where == "a variable" else "threefry2x32")
    more = {"closed over": {}, "a variable": {"key": key}, "made of a variable": {"data": jax.random.key_data(key)}}

    def forward(variables, x):
        own = jax.random.wrap_key_data(variables["data"]) if "data" in variables else variables.get("key", key)
        return plain(variables["net"], x) + jax.random.uniform(own, (8,))

    variables = {"net": kept} | more[where]
    wanted = jax.jit(forward)(variables, X)
    fast = ct.accelerate(forward, masks, backend="xla")
    np.testing.assert_allclose(jax.jit(fast)(variables | {"net": spoilt}, X), wanted, atol=1e-5)
    ct.export(tmp_path / "net", forward, variables, masks, image_shape=X.shape[1:], c=where == "closed over")
    for net in (ct.load(tmp_path / "net"), ct.load(tmp_path / "net", forward)):
        np.testing.assert_allclose(net(X), wanted, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "xla"])
def test_no_images(backend):
    masks, _, kept = masked(PAIR, {"[ab]": 0.5}, {})
    assert ct.accelerate(plain, masks, backend=backend)(kept, X[:0]).shape == (0, 8)


def test_what_calls_python_cannot_stand_in_a_file(tmp_path):
    masks, _, kept = masked(PAIR, {"[ab]": 0.5}, {})
    seen = []

    def forward(params, x):
        jax.debug.callback(seen.append, x.mean())
        jax.debug.callback(lambda y: None, conv(x, params["b"]))
        return plain(params, x)

    settings = {"image_shape": X.shape[1:]}
    with pytest.raises(ValueError, match=r"cannot be written as net.stablehlo .*callbacks .*stablehlo=False"):
        ct.export(tmp_path / "net", forward, kept, masks, **settings)
    ct.export(tmp_path / "net", forward, kept, masks, **settings, stablehlo=False)
    net = ct.load(tmp_path / "net", forward)
    jax.effects_barrier()
    seen.clear()
    np.testing.assert_allclose(net(X), plain(kept, X), atol=1e-5)
    jax.effects_barrier()
    assert seen == [pytest.approx(float(X.mean()))]


def test_strict_modes(tmp_path):
    """No tracer outlives its trace, and nothing goes to the device unasked."""
    masks, _, kept = masked(PAIR, {"[ab]": 0.5}, {})
    kept, x = jax.device_put((kept, X))
    fast = ct.accelerate(plain, masks, backend="xla")
    with jax.checking_leaks():
        assert [row.runs for row in fast.report(kept, x).convolutions] == [SPARSE, SPARSE]
        jax.jit(jax.grad(lambda params: fast(params, x).sum()))(kept)
    with jax.transfer_guard("disallow"):
        ct.export(tmp_path / "net", plain, kept, masks, image_shape=X.shape[1:], stablehlo=False)
        ct.load(tmp_path / "net", plain).tuned(batch=1)
        got = jax.jit(fast)(kept, x)
    np.testing.assert_allclose(got, plain(kept, x), atol=1e-5)


def test_a_masked_leaf_that_is_no_kernel_is_told():
    masks, _, kept = masked(PAIR, {"[ab]": 0.5}, {})
    params = kept | {"bias": leaf(3, (8,))}
    masks = ct.masks.combine(masks) | {"bias": np.arange(8) < 4}
    with pytest.raises(ValueError, match=r"'bias' \(8,\) .*among the arguments, but no convolution.*give None"):
        ct.accelerate(lambda params, x: plain(params, x) + params["bias"], masks)(params, X)
