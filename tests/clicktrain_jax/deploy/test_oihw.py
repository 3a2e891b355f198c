"""Kernels (filters, channels, height, width), as Equinox and PyTorch keep them: run, stored, reported like others."""

import jax
import numpy as np
import optax
import pytest
from drawn import drawn_masks, masked
from jax import lax

import clicktrain_jax as ct
from clicktrain_jax.deploy import storage
from clicktrain_jax.masks import combine
from clicktrain_jax.plan.convolutions import FROM_HWIO, TO_HWIO

RNG = np.random.default_rng(0)
SHAPES = {"c0": (16, 3, 3, 3), "c1": (24, 16, 3, 3), "c2": (32, 24, 3, 3), "p": (16, 32, 1, 1)}
PARAMS = {
    name: {"weight": (RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)}
    for name, shape in SHAPES.items()
}
PARAMS["c1"]["bias"] = RNG.normal(size=24).astype(np.float32)
RULES = {"c0/weight": None, "c[12]/weight": 0.6, "p/weight": 0.5}
PATTERNS = ct.patterns.fixed_set(4)
IMAGE = (8, 8, 3)
X = RNG.random((3, *IMAGE), np.float32)


def turned(tree, order):
    return jax.tree.map(lambda leaf: leaf.transpose(order) if leaf is not None and leaf.ndim == 4 else leaf, tree)


def net(params, x, axes="OIHW"):
    for name in SHAPES:
        numbers = ("NHWC", axes, "NHWC")
        x = lax.conv_general_dilated(x, params[name]["weight"], (1, 1), "SAME", dimension_numbers=numbers)
        x = jax.nn.relu(x + params[name].get("bias", 0.0))
    return x.mean((1, 2))


def selected(params, axes):
    """Of the same kernels in either layout."""
    plan = ct.make_plan(params, RULES, axes=axes)
    return plan, drawn_masks(params, plan)


PLAN, MASKS = selected(PARAMS, "OIHW")
PRUNED = masked(PARAMS, MASKS)
HWIO = turned(PARAMS, TO_HWIO["OIHW"])
HWIO_MASKS = selected(HWIO, "HWIO")[1]
WANTED = np.asarray(jax.jit(net, static_argnums=2)(masked(HWIO, HWIO_MASKS), X, "HWIO"))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("backend", [None, "xla"])
def test_it_runs_by_its_patterns(backend):
    fast = ct.accelerate(net, MASKS, backend=backend)
    np.testing.assert_allclose(jax.jit(fast)(PARAMS, X), WANTED, atol=1e-5)
    rows = fast.report(PARAMS, X).convolutions
    kept = [float(np.asarray(combine(MASKS)[name]["weight"]).mean()) for name in ("c1", "c2", "p")]
    assert [row.retained for row in rows[1:]] == kept
    assert backend is None or [row.runs for row in rows] == ["dense", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("form", ["masks", "bools", "one of two copies"])
def test_it_is_stored_like_other_kernels(tmp_path, dtype, form):
    apply, variables, masks = net, PRUNED, MASKS
    if form == "bools":
        masks = combine(MASKS)
    if form == "one of two copies":
        variables = {"ema": PRUNED, "params": PARAMS}
        apply = lambda variables, x: net(variables["ema"], x)  # noqa: E731
    settings = {"image_shape": IMAGE, "dtype": dtype, "stablehlo": False}
    manifest = ct.export(tmp_path / "net", apply, variables, masks, **settings)
    stored = storage.read(tmp_path / "net")
    wanted = masked(HWIO, HWIO_MASKS)
    own = storage.write(tmp_path / "hwio", wanted, HWIO_MASKS, facts={}, dtype=dtype)
    back = turned(storage.read(tmp_path / "hwio").variables, FROM_HWIO["OIHW"])
    if form == "one of two copies":
        same(stored.variables["ema"], back)
        same(stored.masks.kernel["ema"], MASKS.kernel)
    else:
        same(stored.variables, back)
        same(stored.masks.kernel, MASKS.kernel)
        assert storage.sizes(manifest).convolutions == storage.sizes(own).convolutions
        # The pattern of a kernel that is removed is of no account.
        same(combine(stored.masks), combine(MASKS))
        again = storage.write(tmp_path / "again", stored.variables, stored.masks, facts={}, dtype=dtype)
        assert again["masks"] == manifest["masks"] and again["leaves"] == manifest["leaves"]
    loaded = ct.load(tmp_path / "net", apply)
    np.testing.assert_allclose(loaded(X), WANTED, atol=1e-5 if dtype == "float32" else 0.02)
    assert ct.load(tmp_path / "net", apply, like=variables).report(X).convolutions == loaded.report(X).convolutions


def test_zeros_tell_of_whole_kernels():
    same(ct.masks_from_zeros(PRUNED).kernel, MASKS.kernel)
    square = {"w": np.ones((3, 3, 3, 3), np.float32)}
    square["w"][1, 2] = 0
    (kernel,) = jax.tree.leaves(ct.masks_from_zeros(square, axes="OIHW").kernel)
    np.testing.assert_array_equal(kernel, square["w"] > 0)
    with pytest.raises(ValueError, match="axes='IOHW': expected 'HWIO'"):
        ct.masks_from_zeros(square, axes="IOHW")


def test_it_is_reported_like_other_kernels():
    report, other = ct.report(PRUNED, MASKS), ct.report(masked(HWIO, HWIO_MASKS), HWIO_MASKS)
    assert report.conv_compression == other.conv_compression and report.model_compression == other.model_compression


def test_channels_are_found_in_it():
    nodes = ct.channels.channel_nodes(net, PARAMS, IMAGE)
    others = ct.channels.channel_nodes(lambda params, x: net(params, x, "HWIO"), HWIO, IMAGE)
    places = {"HWIO": (2, 3), "OIHW": (1, 0)}  # channels, filters

    def said(node, axes):
        channels, filters = places[axes]
        writers = [(name, axis == filters) for name, axis in node.writers]
        return node.size, writers, node.followers, [(name, axis == channels) for name, axis, _ in node.readers]

    assert [said(node, "OIHW") for node in nodes] == [said(node, "HWIO") for node in others]
    kept = {"c1/weight": np.arange(24) % 3 > 0}
    small = ct.channels.narrow(PARAMS, kept, nodes)
    assert small["c1"]["weight"].shape == (16, 16, 3, 3) and small["c2"]["weight"].shape == (32, 16, 3, 3)
    same(turned(small, TO_HWIO["OIHW"]), ct.channels.narrow(HWIO, kept, others))


def test_admm_refuses_it_by_name():
    with pytest.raises(ValueError, match=r"admm takes kernels \(kh, kw, cin, cout\); the plan's are OIHW: transpose"):
        ct.methods.admm(optax.sgd(0.1), PLAN, patterns=PATTERNS, rho=0.1, every=1)
