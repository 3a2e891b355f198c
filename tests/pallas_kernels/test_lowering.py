"""The portable form lowers for GPUs and TPUs from a machine that has none, as the form for such devices."""

import functools
import re

import jax
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import native
from pallas_kernels.pattern_conv import cases, xla
from pallas_kernels.pattern_conv.cases import BLOCK, Case

CASES = {
    case.name: case
    for case in (
        Case("tiles", (8, 6), 16, 64, 128, tile=(64, 1), removed=0.6),
        Case("blocks-hwnc", (4, 4), 8, 128, 128, tile=BLOCK, removed=0.5, layout="HWNC"),
        Case("stride-2", (9, 8), 4, 32, 64, strides=(2, 2), padding=((1, 1), (1, 1)), tile=(None, 1)),
        Case("1x1-stride-2", (8, 8), 4, 64, 96, window=(1, 1), strides=(2, 2), tile=(32, 32), patterns=(), removed=0.5),
        Case("all-removed", (4, 4), 2, 32, 32, tile=(16, 16), removed=1.0),
    )
}
every = pytest.mark.parametrize("case", CASES.values(), ids=str)


def lowered(case, dtype, platform, backend="xla"):
    """(text of the value's program, text of the gradients')."""
    structure = cases.structure_of(case, np.random.default_rng(0))
    how = dict(strides=case.strides, padding=case.padding, layout=case.layout, backend=backend)

    def gradients(x, w, structure, dy):
        return jax.vjp(lambda x, w: pk.pattern_conv(x, w, structure, **how), x, w)[1](dy)

    x, w, dy = (jax.ShapeDtypeStruct(shape, dtype) for shape in (case.x_shape, case.w_shape, case.y_shape))
    forward = jax.jit(functools.partial(pk.pattern_conv, **how)).trace(x, w, structure)
    backward = jax.jit(gradients).trace(x, w, structure, dy)
    texts = tuple(traced.lower(lowering_platforms=(platform,)).as_text() for traced in (forward, backward))
    return *texts, structure


def convolutions(text):
    """The output dtypes of the program's convolutions."""
    return re.findall(r"stablehlo\.convolution.*-> tensor<[\dx]*x(\w+)>", text)


@every
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradients_lower(case, dtype, platform, monkeypatch):
    monkeypatch.setattr(xla, "_ORDER_BYTES", -1)
    monkeypatch.setattr(jax, "default_backend", lambda: {"cuda": "gpu"}.get(platform, platform))
    forward, backward, structure = lowered(case, dtype, platform)
    # A small convolution for each window and tile: no more for both gradients, as each image is read once.
    count = sum(room > 0 for piece in structure.pieces for room in piece.rooms)
    assert convolutions(forward) == ["f32"] * count and (count > 0) is (case.name != "all-removed")
    assert len(convolutions(backward)) == 2 * count
    for text in (forward, backward):
        assert len(re.findall(r"stablehlo\.dot_general", text)) == 0
        # Order is for CPUs, where memory is used again; other devices are free to choose theirs.
        assert "optimization_barrier" not in text and "custom_call" not in text and "f64" not in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_was_traced_for_a_cpu_lowers_too(platform, monkeypatch):
    monkeypatch.setattr(xla, "_ORDER_BYTES", -1)
    forward, backward, _ = lowered(CASES["tiles"], "float32", platform)
    assert "optimization_barrier" in forward and "optimization_barrier" in backward


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_the_dense_forms_lower(backend, platform):
    with native.portable():  # a CPU's kernels are for itself
        forward, backward, _ = lowered(CASES["stride-2"], "bfloat16", platform, backend)
    assert convolutions(forward) == ["f32"] and len(convolutions(backward)) == 2
