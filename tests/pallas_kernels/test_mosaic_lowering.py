"""The Hopper kernels lower for CUDA: what their interpreter lets pass and the compiler does not is found here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.pattern_conv import config, launches, mosaic_gpu
from pallas_kernels.pattern_conv.cases import COMPILED, Case, structure_of
from pallas_kernels.pattern_conv.geometry import make_geometry
from pallas_kernels.pattern_conv.structure import make_structure

pytestmark = pytest.mark.skipif(not compat.HAS_MOSAIC_GPU, reason=compat.MOSAIC_GPU_NEEDS)

LAYERS = COMPILED
# One of each kind: tests/gpu_compile lowers and compiles every one.
FIRST = ("vgg16-n512-8x8-256-256", "resnet50-n128-56x56-128-128-s2", "resnet50-n128-1x1-28x28-512-128")


def lowered(function, *arguments):
    """The program's text for an H200."""
    with compat.traced_for("NVIDIA H200", 132):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """The names of its Mosaic GPU kernels."""
    return re.findall(r"custom_call @(mosaic_gpu\w*)", text)


def directions(case):
    """For each direction the function and its arguments."""
    structure, geometry = structure_of(case, np.random.default_rng(0)), case.geometry()
    x, w, dy = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in (case.x_shape, case.w_shape, case.y_shape))
    return {
        "forward": (lambda x, w, s: mosaic_gpu.forward(x, w, s, geometry), x, w, structure),
        "input gradient": (lambda dy, w, s: mosaic_gpu.input_gradient(dy, w, s, geometry), dy, w, structure),
        "weight gradient": (lambda x, dy, s: mosaic_gpu.weight_gradient(x, dy, s, geometry), x, dy, structure),
    }


@pytest.mark.parametrize("direction", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("case", [case for case in LAYERS if case.name in FIRST], ids=str)
def test_layers_of_real_nets_lower(case, direction):
    assert mosaic_gpu.why_not(structure_of(case, np.random.default_rng(0)), case.geometry(), jnp.bfloat16, 128) is None
    assert len(calls(lowered(*directions(case)[direction]))) == 1 + (direction == "weight gradient")


def test_the_named_first_layers_exist():
    assert {case.name for case in LAYERS} >= set(FIRST)


@pytest.mark.parametrize(
    "tile", [(48, 64), *(pytest.param(tile, marks=pytest.mark.slow) for tile in ((16, 64), (64, 32), (192, 128)))]
)
def test_other_tiles_lower(tile):
    case = Case("tile", (3, 4), 64, 384, 384, tile=tile, removed=0.5, dtype="float16", layout="HWNC")
    for direction, (function, *arguments) in directions(case).items():
        assert len(calls(lowered(function, *arguments))) == 1 + (direction == "weight gradient")


def test_the_epilogue_lowers_with_either_side_as_rows():
    case = Case("epilogue", (3, 4), 128, 128, 128, tile=(64, 64), dtype="bfloat16", layout="HWNC")
    structure, geometry = structure_of(case, np.random.default_rng(0)), case.geometry()
    x, w = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in (case.x_shape, case.w_shape))
    vector = jax.ShapeDtypeStruct((128,), jnp.float32)
    for outputs_first in (True, False):
        tiles = config.ProductTiles(128, 64, outputs_first=outputs_first)

        def forward(x, w, s, scale, bias, tiles=tiles):
            return mosaic_gpu.forward(x, w, s, geometry, scale, bias, relu=True, tiles=tiles)

        assert len(calls(lowered(forward, x, w, structure, vector, vector))) == 1


@pytest.mark.slow
def test_strips_lower():
    case = Case("strips", (14, 14), 128, 128, 128, tile=(64, 64), dtype="bfloat16", layout="HWNC")
    structure, geometry = structure_of(case, np.random.default_rng(0)), case.geometry()
    x, w = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in (case.x_shape, case.w_shape))
    tiles = config.strip_tiles(128, (14, 14), 64, 64, 3)
    for function in (mosaic_gpu.forward, mosaic_gpu.input_gradient):

        def direction(x, w, s, function=function):
            return function(x, w, s, geometry, tiles=tiles)

        assert len(calls(lowered(direction, x, w, structure))) == 1


def test_one_block_a_multiprocessor_is_launched():
    structure = make_structure(np.ones((3, 3, 64, 64), bool), tile=(64, 64))
    tiles = config.ProductTiles(64, 64)
    for size, multiprocessors in ((40, 132), (40, 78), (2, 132), (1, 132)):
        geometry = make_geometry((size, size, 64, 64), (3, 3), (1, 1), "SAME", "HWNC")
        plan = launches.product_plan(structure, geometry, 64, False, multiprocessors, tiles)
        assert plan.blocks == min(size * size, multiprocessors)
    # Where no GPU is known the kernel can be interpreted only: few blocks are quicker.
    jax.eval_shape(lambda x: None if compat.multiprocessors(x) == 2 else pytest.fail(), jnp.zeros(()))
