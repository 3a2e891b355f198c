"""No parameter of a convolution is forgotten: each is passed on, or the convolution stays as it is, or is refused."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import clicktrain_jax as ct
from clicktrain_jax.deploy import layers, onnx
from clicktrain_jax.deploy.c_net import to_c
from clicktrain_jax.deploy.channels_first import channels_first
from clicktrain_jax.deploy.interception import Convolution, Kernel
from clicktrain_jax.deploy.load import inference_net
from clicktrain_jax.deploy.portable import to_stablehlo
from clicktrain_jax.deploy.tracing import flattened
from clicktrain_jax.jaxprs import PARAMETERS, unknown_parameters

SHAPE = (8, 9, 8)
KEEP = np.zeros((3, 3, 8, 16), bool)
KEEP[:2, :2, ::2] = True
HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
NHWC = ("NHWC", "HWIO", "NHWC")
# For each parameter a setting that is not the plain one.
SETTINGS = {
    "window_strides": {"window_strides": (2, 1)},
    "padding": {"padding": ((2, 0), (1, 1))},
    "lhs_dilation": {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))},
    "rhs_dilation": {"rhs_dilation": (1, 2)},
    "dimension_numbers": {"dimension_numbers": ("NHWC", "HWIO", "NCHW")},
    "feature_group_count": {"feature_group_count": 2},
    "batch_group_count": {"batch_group_count": 2},
    "precision": {"precision": "highest"},
    "preferred_element_type": {"preferred_element_type": jnp.float32},
}
PLAIN = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
# What leaves the convolution as it is, if it is told at all.
LEFT = {"out_sharding"}
WITHOUT_C = {"lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count"}


def convolution(dtype, settings, variables, x):
    kernel = variables["kernel"].astype(dtype)
    return lax.conv_general_dilated(x.astype(dtype), kernel, **{**PLAIN, **settings}).astype(jnp.float32)


def made(name):
    dtype = jnp.bfloat16 if name == "preferred_element_type" else jnp.float32
    kernel = np.random.default_rng(0).normal(size=KEEP.shape).astype(np.float32)
    keep = KEEP
    if name == "feature_group_count":
        kernel, keep = kernel[:, :, :4], KEEP[:, :, :4]
    x = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)
    return functools.partial(convolution, dtype, SETTINGS[name]), {"kernel": kernel}, {"kernel": keep}, x


def test_all_parameters_of_the_installed_jax_are_known():
    jaxpr = jax.make_jaxpr(functools.partial(lax.conv_general_dilated, **PLAIN))(jnp.ones((1, *SHAPE)), KEEP * 1.0)
    (equation,) = jaxpr.eqns
    assert equation.params.keys() - PARAMETERS <= LEFT and equation.params.keys() >= PARAMETERS == SETTINGS.keys()
    assert all(equation.params[name] is None for name in equation.params.keys() & LEFT)
    # What a later version adds leaves the convolution as it is, where it says anything.
    params = {**equation.params, "rounding": None}
    assert not unknown_parameters(params)
    changed = Convolution(equation, ("kernel",), kernel=Kernel("kernel", None, KEEP))
    assert layers.why_dense(changed) is None
    changed.params = {**params, "rounding": "down"}
    assert "rounding='down'" in layers.why_dense(changed)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_it_counts_in_every_form(name):
    apply, variables, masks, x = made(name)
    wanted = np.asarray(apply({"kernel": variables["kernel"] * masks["kernel"]}, x))
    close = functools.partial(np.testing.assert_allclose, desired=wanted, atol=1e-4)
    for backend in (None, "xla"):
        fast = ct.accelerate(apply, masks, backend=backend)
        close(jax.jit(fast)(variables, x))
    is_plain = name in ("window_strides", "padding", "dimension_numbers", "precision")
    (row,) = fast.report(variables, x).convolutions
    assert (row.runs == "sparse") == is_plain, row.why
    if name == "batch_group_count":  # of one image there are no groups
        return
    pruned = {"kernel": variables["kernel"] * masks["kernel"]}
    net = inference_net(apply, pruned, masks, image_shape=SHAPE, normalise=None)
    close(net(x))
    exported = jax.export.deserialize(bytearray(to_stablehlo(net)))
    close(exported.call(x))
    closed, _ = flattened(channels_first(net.folded.function, net.folded.arrays), x)
    close(onnx._in_known_calls(closed, jnp.asarray(x)))
    if name in WITHOUT_C:
        with pytest.raises(ValueError, match="convolution 'kernel'"):
            to_c(net)
    else:
        assert to_c(net)


@pytest.mark.parametrize("precision", ["highest", "high", ("default", "highest")])
def test_precision_stands_in_what_xla_compiles(precision):
    _, variables, masks, x = made("precision")
    apply = functools.partial(convolution, jnp.float32, {"precision": precision})

    def said(function, *arguments):
        text = function.mlir_module() if not arguments else jax.jit(function).lower(*arguments).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line or "stablehlo.dot_gen" in line]
        assert lines
        return {
            line.split("precision_config = ")[1].split("]")[0] if "precision_config" in line else "" for line in lines
        }

    wanted = said(apply, variables, x)
    assert len(wanted) == 1 and wanted != {""}
    sparse = ct.accelerate(apply, masks, backend="xla")
    assert said(sparse, variables, x) == wanted
    assert said(sparse.with_choice({"kernel": "dense"}), variables, x) == wanted
    assert said(jax.grad(lambda v, x: jnp.sum(sparse(v, x))), variables, x) == wanted
    some = {"kernel": np.random.default_rng(0).random(KEEP.shape) < 0.4}
    for each in (masks, some):
        net = inference_net(apply, variables, each, image_shape=SHAPE, normalise=None)
        assert said(jax.export.deserialize(bytearray(to_stablehlo(net)))) == wanted


def test_groups_of_images_have_no_form_in_onnx():
    apply, variables, _, x = made("batch_group_count")
    closed, _ = flattened(lambda x: apply(variables, x), x)
    with pytest.raises(ValueError, match="groups of images"):
        onnx._in_known_calls(closed, jnp.asarray(x))
