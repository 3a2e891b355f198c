"""The native kernels in users' nets and in loaded ones: chosen, fused, measured; and out of what others run."""

import functools

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn_masks, masked

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax.deploy.fold import fold
from clicktrain_jax.deploy.load import inference_net
from clicktrain_jax.deploy.portable import to_stablehlo
from pallas_kernels import native

SHAPE = (9, 8, 3)
needs_native = pytest.mark.skipif(not native.is_fast(), reason="there are no native kernels here")


class DenseConv(nn.Module):
    """A convolution that a user wrote with this package's own."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.he_normal(), (3, 3, x.shape[-1], self.features))
        return pk.dense_conv(x, kernel)


class Net(nn.Module):
    own: bool = False

    @nn.compact
    def __call__(self, x):
        conv = DenseConv if self.own else functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        for index, width in enumerate((16, 32, 32)):
            x = conv(width, name=f"Conv_{index}")(x)
            x = x * self.param(f"scale_{index}", nn.initializers.ones, (width,))
            x = nn.relu(x + self.param(f"bias_{index}", nn.initializers.normal(0.1), (width,)))
        return nn.Dense(5)(x.mean((1, 2)))


@functools.cache
def made(own=False, filters=16):
    model, x = Net(own), np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    plan = ct.make_plan(params, {"Conv_[12]/kernel": 0.6}, tile=(filters, 1))
    masks = drawn_masks(params, plan)
    # `apply` is traced here first: what is kept of that must not be taken for another purpose.
    apply = jax.jit(model.apply)
    params = masked(params, masks)
    return apply, {"params": params}, masks, x, np.asarray(apply({"params": params}, x))


def loaded(own=False, filters=16, **options):
    apply, variables, masks, *_ = made(own, filters)
    return inference_net(apply, variables, masks, image_shape=SHAPE, normalise=None, **options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    native.why_not()  # already loaded, it is not built again in the new folder


def test_what_is_left_open_is_portable_within():
    x, w = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 8))
    function = jax.jit(pk.dense_conv)
    assert ("ffi_call" in str(jax.make_jaxpr(function)(x, w))) == native.is_fast()
    with native.portable():
        assert not native.is_fast() and "ffi_call" not in str(jax.make_jaxpr(function)(x, w))
    assert ("ffi_call" in str(jax.make_jaxpr(function)(x, w))) == native.is_fast()


def test_nets_of_dense_conv_are_seen_as_convolutions():
    apply, variables, masks, x, wanted = made(own=True)
    folded = fold(apply, variables, SHAPE)
    assert [step.leaf for step in folded.steps(2).convolutions] == [f"params/Conv_{i}/kernel" for i in range(3)]
    report = ct.accelerate(apply, masks, backend="xla").report(variables, x)
    assert [row.runs for row in report.convolutions] == ["dense", "sparse", "sparse"]
    np.testing.assert_allclose(loaded(own=True)(x), wanted, atol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_exports_hold_no_native_call(own):
    *_, x, wanted = made(own)
    data = to_stablehlo(loaded(own))
    assert b"clicktrain" not in data
    np.testing.assert_allclose(jax.export.deserialize(bytearray(data)).call(x), wanted, atol=1e-5)


@needs_native
@pytest.mark.parametrize("filters", [16, 1])
def test_loaded_nets_run_natively_with_bias_and_relu_inside(filters):
    *_, x, wanted = made(filters=filters)
    net = loaded(filters=filters)
    rows = net.report(2).convolutions
    assert [(row.runs, row.backend) for row in rows] == [("dense", "cpu"), ("sparse", "cpu"), ("sparse", "cpu")]
    np.testing.assert_allclose(net(x), wanted, atol=1e-5)
    function, prepared = net.program(2)
    primitives = [equation.primitive.name for equation in flat(function, prepared, x)]
    # One call for all layers, the linear one among them.
    assert primitives.count("max") == primitives.count("add") == 0
    assert primitives.count("custom_vmap_call") + primitives.count("ffi_call") == 1
    # The linear layer's weights are held once, packed.
    assert "params/Dense_0/kernel" not in prepared["arrays"]
    # They lie where the kernels read them, and are not copied in a call.
    assert all(leaf.unsafe_buffer_pointer() % 64 == 0 for leaf in jax.tree.leaves(prepared) if leaf.dtype == np.uint8)


def flat(function, *arguments):
    from clicktrain_jax.deploy.tracing import flattened

    return flattened(function, *arguments)[0].jaxpr.eqns


@needs_native
def test_every_way_of_a_loaded_net_gives_the_same():
    *_, x, wanted = made()
    net = loaded()
    names = [row.name for row in net.report(2).convolutions]
    for runs in (("dense", "NHWC", "HWNC"), ("dense cpu", "dense", "dense cpu"), ("dense", "dense cpu", "NHWC")):
        np.testing.assert_allclose(net.with_choice(2, dict(zip(names, runs)))(x), wanted, atol=1e-5)
    for backend, runs_by in (("cpu", "cpu"), ("xla", ""), (None, "cpu")):
        dense = net.dense(2, backend)
        np.testing.assert_allclose(dense(x), wanted, atol=1e-5)
        assert {(row.runs, row.backend) for row in dense.report(2).convolutions} == {("dense", runs_by)}
    with pytest.raises(ValueError, match="choice"):
        net.with_choice(2, {names[0]: "NHWC"})  # nothing of it is removed
    with pytest.raises(ValueError, match="dense by backend"):
        net.dense(2, "reference")


@needs_native
def test_accelerated_nets_are_mapped_and_differentiated():
    apply, variables, masks, x, wanted = made()
    fast = ct.accelerate(apply, masks, backend="cpu")
    report = fast.report(variables, x)
    assert [(row.runs, row.backend) for row in report.convolutions] == [("dense", "cpu"), *2 * [("sparse", "cpu")]]
    np.testing.assert_allclose(jax.jit(fast)(variables, x), wanted, atol=1e-5)
    each = jax.jit(jax.vmap(fast, in_axes=(None, 0)))(variables, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(each[0], wanted, atol=1e-5)
    keep = ct.masks.combine(masks)

    def loss(apply, variables):
        return jnp.sum(jnp.sin(apply(variables, x)))

    got, plain = (jax.jit(jax.grad(functools.partial(loss, each)))(variables)["params"] for each in (fast, apply))
    for name in ("Conv_0", "Conv_1", "Conv_2"):
        mask = keep[name]["kernel"]
        expected = plain[name]["kernel"] if mask is None else np.where(mask, plain[name]["kernel"], 0)
        np.testing.assert_allclose(got[name]["kernel"], expected, atol=1e-4)


@needs_native
def test_few_pixels_with_weights_that_come_anew_stay_with_xla():
    apply, variables, masks, *_ = made()
    few = jnp.ones((1, 4, 4, 3))
    fast = ct.accelerate(apply, masks)
    assert fast.report(variables, few).convolutions[0].backend == ""
    chosen = fast.with_choice({"Conv_0/kernel": "dense cpu", "Conv_1/kernel": "dense", "Conv_2/kernel": "NHWC"})
    rows = chosen.report(variables, few).convolutions
    assert [(row.runs, row.backend) for row in rows] == [("dense", "cpu"), ("dense", ""), ("sparse", "cpu")]
    np.testing.assert_allclose(jax.jit(chosen)(variables, few), apply(variables, few), atol=1e-5)


def test_without_the_kernels_all_is_as_it_was(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    *_, x, wanted = made()
    net = loaded()
    assert "cpu" not in {row.backend for row in net.report(2).convolutions}
    np.testing.assert_allclose(net(x), wanted, atol=1e-5)
    names = [row.name for row in net.report(2).convolutions]
    with pytest.raises(ValueError, match="'cpu'.*turned off by CLICKTRAIN_NATIVE=0"):
        net.with_choice(2, {names[1]: "dense cpu"})(x)
