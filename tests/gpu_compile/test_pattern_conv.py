"""Every shape of VGG-16 and ResNet-50, and the odd ones, become H200 code of tensor cores and background copies.

Shared memory that does not fit is an error of the compiler, so that compiling at all is a check of it; so is an
operand whose layout no instruction takes. Neither the interpreter nor lowering sees these.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.pattern_conv import cases, config, launches, mosaic_gpu
from pallas_kernels.pattern_conv.cases import BLOCK, Case


def _odd(name, image, batch, cin, cout, tile=BLOCK, dtype="bfloat16", **changes):
    return Case(name, image, batch, cin, cout, tile=tile, dtype=dtype, layout="HWNC", **changes)


# What layers of real nets do not have: last blocks that are short, one pixel, odd sizes, few images, narrow tiles.
ODD = (
    _odd("short-last-blocks", (5, 7), 128, 96, 80),
    _odd("short-last-blocks-n8", (5, 7), 8, 96, 80),
    _odd("short-last-blocks-1x1", (3, 4), 128, 96, 80, window=(1, 1), patterns=(), removed=0.5),
    _odd("one-pixel", (1, 1), 128, 128, 128),
    _odd("one-pixel-n8", (1, 1), 8, 64, 64),
    _odd("one-pixel-1x1", (1, 1), 128, 64, 128, window=(1, 1), patterns=()),
    _odd("one-column", (5, 1), 64, 64, 64),
    _odd("one-row", (1, 6), 64, 64, 64),
    _odd("stride-2-odd", (5, 7), 128, 128, 192, strides=(2, 2)),
    _odd("stride-2-even-n8", (4, 6), 8, 64, 128, strides=(2, 2)),
    _odd("stride-2-1x1-odd", (7, 5), 16, 128, 64, window=(1, 1), strides=(2, 2), patterns=()),
    _odd("n8", (4, 4), 8, 128, 128),
    _odd("n16", (4, 4), 16, 128, 128, dtype="float16"),
    _odd("n72", (4, 4), 72, 64, 64),
    _odd("lopsided-padding", (4, 5), 64, 64, 64, padding=((2, 0), (0, 1))),
    _odd("narrow-filters", (4, 4), 64, 64, 64, tile=(16, 64)),
    _odd("narrow-channels", (4, 4), 64, 64, 64, tile=(64, 16)),
    _odd("wide-tiles", (4, 4), 64, 256, 512, tile=(256, 128)),
    _odd("one-list-for-all-filters", (4, 4), 64, 128, 192, tile=(None, 64)),
)
STRIPS = (
    *(case for case in cases.COMPILED if case.name in ("vgg16-n512-4x4-512-512", "resnet50-n128-56x56-64-64")),
    *(case for case in ODD if case.name in ("short-last-blocks", "one-row", "n8", "n16", "wide-tiles")),
)
every_case = pytest.mark.parametrize("case", (*cases.COMPILED, *ODD), ids=str)


def check(program, h200):
    assert program.kernels
    for kernel in program.kernels:
        # The second kernel of the weight gradient only adds.
        assert kernel.tensor_core > 0 or "added" in kernel.name, f"{kernel.name} does not use the tensor cores"
        assert kernel.tma_loads > 0 and kernel.count("UTMASTG", "UBLKCP") > 0, f"{kernel.name} does not copy by TMA"
        spilled = (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.local_memory)
        assert spilled == (0, 0, 0), f"{kernel.name} spills: {spilled}"
    assert 0 < program.shared_bytes <= h200.SHARED_BYTES_LIMIT
    # Nothing is left to a dense library, nor a sum of what is not retained.
    assert "__cudnn$conv" not in program.hlo and "__cublas" not in program.hlo


def arguments(case, h200):
    """(x, w, dy, structure) as shapes, the structure's arrays among them: new masks need no new code.

    Layers of real nets have worklists of the host, with the tiles that it chose; of the odd ones the program's.
    """
    x, w, dy = (h200.shape(*shape, dtype=case.dtype) for shape in (case.x_shape, case.w_shape, case.y_shape))
    structure = cases.structure_of(case, np.random.default_rng(0))
    if case not in ODD:
        structure = launches.for_batch(structure, case.geometry(), case.batch)
    structure = jax.tree.map(lambda leaf: h200.shape(*leaf.shape, dtype=leaf.dtype), structure)
    reason = mosaic_gpu.why_not(structure, case.geometry(), x.dtype, case.batch)
    assert reason is None, reason
    return x, w, dy, structure


def test_work_is_cut_for_the_multiprocessors_of_an_h200(h200):
    seen = []

    def traced(x):
        seen.append(compat.multiprocessors(x))
        return x + 1

    h200.compile_for_h200(traced, h200.shape(8, 8))
    assert seen == [132]


def strip_tiles(case, transposed):
    """The strips of a case; none is an error here."""
    geometry, lists = case.geometry(), [length or whole for length, whole in zip(case.tile, (case.cout, case.cin))]
    size = geometry.image if transposed else geometry.output
    tiles = config.strip_tiles(case.batch, size, *(lists[::-1] if transposed else lists), case.window[1])
    assert tiles is not None
    return tiles


@every_case
def test_forward(h200, case):
    x, w, _, structure = arguments(case, h200)
    check(h200.compile_for_h200(lambda x, w, s: mosaic_gpu.forward(x, w, s, case.geometry()), x, w, structure), h200)


@every_case
def test_input_gradient(h200, case):
    _, w, dy, structure = arguments(case, h200)
    check(
        h200.compile_for_h200(lambda dy, w, s: mosaic_gpu.input_gradient(dy, w, s, case.geometry()), dy, w, structure),
        h200,
    )


@every_case
def test_weight_gradient(h200, case):
    x, _, dy, structure = arguments(case, h200)
    check(
        h200.compile_for_h200(lambda x, dy, s: mosaic_gpu.weight_gradient(x, dy, s, case.geometry()), x, dy, structure),
        h200,
    )


@pytest.mark.parametrize("tiles", ["products", "strips"])
@pytest.mark.parametrize("name", ["short-last-blocks", "n8", "n16"])
def test_epilogue(h200, name, tiles):
    (case,) = (case for case in ODD if case.name == name)
    x, w, _, structure = arguments(case, h200)
    vector = h200.shape(case.cout, dtype=jnp.float32)
    rows = (True, False) if case.batch >= mosaic_gpu.ROWS else (True,)
    choices = [config.ProductTiles(min(case.batch, 128), 64, outputs_first=first) for first in rows]
    for chosen in choices if tiles == "products" else [strip_tiles(case, transposed=False)]:

        def forward(x, w, s, scale, bias, chosen=chosen):
            return mosaic_gpu.forward(x, w, s, case.geometry(), scale, bias, relu=True, tiles=chosen)

        check(h200.compile_for_h200(forward, x, w, structure, vector, vector), h200)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input-gradient"])
@pytest.mark.parametrize("case", STRIPS, ids=str)
def test_strips(h200, case, transposed):
    x, w, dy, structure = arguments(case, h200)
    direction = mosaic_gpu.input_gradient if transposed else mosaic_gpu.forward
    function = functools.partial(direction, geometry=case.geometry(), tiles=strip_tiles(case, transposed))
    program = h200.compile_for_h200(lambda a, w, s: function(a, w, s), dy if transposed else x, w, structure)
    check(program, h200)
    assert all("strips" in kernel.name for kernel in program.kernels)


def test_the_named_cases_exist():
    assert len(STRIPS) == 7
