"""The Hopper kernels interpreted on the CPU, with race detection: values and gradients, refusals, recompilation.

Shared memory and what a kernel leaves unwritten of its output are NaN while it is interpreted, and so are the
weights that are not retained: none of them may reach a result.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.pattern_conv import config, mosaic_gpu
from pallas_kernels.pattern_conv.cases import CORNERS
from pallas_kernels.pattern_conv.geometry import make_geometry
from pallas_kernels.pattern_conv.structure import make_structure
from pallas_kernels.pattern_conv.vjp import differentiable
from tests.pallas_kernels import convolved as common

needs_mosaic = pytest.mark.skipif(not compat.HAS_MOSAIC_GPU, reason=f"{compat.MOSAIC_GPU_NEEDS}, for its interpreter")
BOUND = 1e-2


def make(size, batch, cin, cout, tile, window=3, strides=1, padding="SAME", retained=0.5, seed=0, dtype=jnp.bfloat16):
    """(x, w, dy, mask, structure, geometry): a random mask of such tiles; what is not retained of w is NaN."""
    rng = np.random.default_rng(seed)
    filters, channels = tile
    blocks = rng.random((window, window, -(-cin // channels), -(-cout // filters))) < retained
    mask = np.repeat(np.repeat(blocks, channels, 2), filters, 3)[:, :, :cin, :cout]
    geometry = make_geometry((*size, batch, cin), (window, window), (strides, strides), padding, "HWNC")
    x = jnp.asarray(rng.standard_normal((*size, batch, cin)), dtype)
    w = jnp.asarray(np.where(mask, rng.standard_normal(mask.shape), np.nan), dtype)
    dy = jnp.asarray(rng.standard_normal((*geometry.output, batch, cout)), dtype)
    return x, w, dy, mask, make_structure(mask, tile=tile), geometry


def check(result, expected, what):
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    assert result.shape == expected.shape
    assert np.isfinite(result).all(), f"{what}: something unwritten, or not retained, came through"
    error = np.abs(result - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error < BOUND, f"{what}: {error:.2g}"


def check_each(results, x, w, dy, mask, geometry):
    """Values and gradients, as many as there are, against the definition."""
    for what, result, expected in zip(
        ("forward", "input gradient", "weight gradient"), results, common.expected(x, w, dy, mask, geometry)
    ):
        check(result, expected, what)


def check_all(x, w, dy, mask, structure, geometry, **tiles):
    """All three directions."""
    with compat.interpreted(detect_races=True, num_cores_or_threads=1):
        # One after the other: interpreted kernels share the interpreter's memory.
        y = jax.block_until_ready(mosaic_gpu.forward(x, w, structure, geometry, tiles=tiles.get("forward")))
        dx = jax.block_until_ready(mosaic_gpu.input_gradient(dy, w, structure, geometry, tiles=tiles.get("input")))
        dw = jax.block_until_ready(mosaic_gpu.weight_gradient(x, dy, structure, geometry, tiles=tiles.get("weight")))
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, jnp.float32)
    check_each((y, dx, dw), x, w, dy, mask, geometry)
    assert not np.asarray(dw)[~mask].any()
    return y, dx, dw


# What is odd about the images beside what is odd about the channels: neither decides the other's way, and a case costs
# the compiling of its four kernels.
GEOMETRIES = {
    "odd size, stride 2": dict(size=(5, 7), batch=8, cin=64, cout=128, tile=(64, 64), strides=2),
    "even size, stride 2, float16": dict(
        size=(4, 6), batch=8, cin=128, cout=64, tile=(64, 64), strides=2, dtype=jnp.float16
    ),
    # So large that steps of its weight gradient look back at what the one before has read.
    "explicit padding": dict(size=(5, 8), batch=8, cin=64, cout=64, tile=(64, 64), padding=((2, 0), (0, 1))),
    "no padding, short last blocks": dict(size=(4, 3), batch=8, cin=96, cout=80, tile=(64, 64), padding="VALID"),
    "1x1, short last blocks": dict(size=(2, 3), batch=8, cin=96, cout=80, tile=(64, 64), window=1, retained=0.8),
    "1x1 stride 2, wide tiles": dict(
        size=(3, 3), batch=8, cin=256, cout=256, tile=(256, 128), window=1, strides=2, retained=1.0
    ),
    "narrow channels": dict(size=(2, 2), batch=64, cin=32, cout=64, tile=(64, 16)),
    "one pixel, narrow filters": dict(size=(1, 1), batch=64, cin=64, cout=64, tile=(32, 64), retained=0.9),
}


# By default; the test of one program for all masks has stride 1.
FIRST = ("odd size, stride 2", "1x1, short last blocks")


@needs_mosaic
@pytest.mark.parametrize(
    "case", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in GEOMETRIES]
)
def test_values_and_gradients_are_the_references(case):
    check_all(*make(**GEOMETRIES[case]))


TILES = {
    "images are the rows": dict(
        forward=config.ProductTiles(64, 32, 16, stages=2, warpgroups=1, outputs_first=False),
        input=config.ProductTiles(64, 16, 64, stages=3, outputs_first=False),
        weight=config.WeightTiles(16, 16, 64, entries=3, least=5, stages=3, warpgroups=1, filters_first=True),
    ),
    "outputs are the rows": dict(
        forward=config.ProductTiles(8, 64, 32, stages=4, warpgroups=2),
        input=config.ProductTiles(40, 64, 16, stages=2, warpgroups=1),
        weight=config.WeightTiles(32, 64, 16, entries=2, least=1, stages=3),
    ),
}


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("case", TILES)
def test_any_tiles_give_the_same_values(case):
    # The last block of images is short in every direction that has 16 or more of them.
    check_all(*make((2, 3), 72, 64, 64, (64, 64)), **TILES[case])


STRIPS = {
    "a short last strip": (
        dict(size=(2, 7), batch=24, cin=64, cout=128, tile=(64, 64), retained=0.4),
        config.StripTiles(4, 16, depth=32, x_stages=3),
    ),
    "whole rows, explicit padding": (
        dict(size=(3, 3), batch=16, cin=64, cout=96, tile=(64, 64), padding=((0, 1), (2, 0))),
        config.StripTiles(3, 8, w_stages=4, warpgroups=1),
    ),
    "one row of whole strips": (
        dict(size=(1, 6), batch=8, cin=64, cout=64, tile=(64, 64)),
        config.StripTiles(2, 8, depth=32),
    ),
}


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("case", STRIPS)
def test_strips_give_the_same_values(case):
    facts, tiles = STRIPS[case]
    x, w, dy, mask, structure, geometry = make(**facts)
    with compat.interpreted(detect_races=True):
        # One after the other: interpreted kernels share the interpreter's memory.
        y = jax.block_until_ready(mosaic_gpu.forward(x, w, structure, geometry, tiles=tiles))
        dx = jax.block_until_ready(mosaic_gpu.input_gradient(dy, w, structure, geometry, tiles=tiles))
    check_each((y, dx), x, w, dy, mask, geometry)


@needs_mosaic
@pytest.mark.parametrize("retains", [pytest.param("nothing", marks=pytest.mark.slow), "one entry"])
def test_what_retains_nothing_gives_exact_zeros(retains):
    mask = np.zeros((3, 3, 128, 128), bool)
    # The second filter tile retains nothing, nor does the second channel block.
    mask[1, 0, :64, :64] = retains == "one entry"
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((2, 2, 8, 128)), jnp.bfloat16) for _ in range(2))
    w = jnp.asarray(np.where(mask, 1.0, np.nan), jnp.bfloat16)
    geometry = make_geometry(x.shape, (3, 3), (1, 1), "SAME", "HWNC")
    y, dx, dw = check_all(x, w, dy, mask, make_structure(mask, tile=(64, 64)), geometry)
    assert not np.asarray(y)[..., 64:].any() and not np.asarray(dx)[..., 64:].any()
    assert all(np.asarray(result).any() == (retains == "one entry") for result in (y, dx, dw))


# (scaled, biased, relu, outputs_first): each alone, and all together for either side as rows.
EPILOGUES = [
    (True, True, True, False),
    (True, False, False, True),
    (False, True, False, False),
    (False, False, True, True),
]


@needs_mosaic
@pytest.mark.parametrize(
    ("scaled", "biased", "relu", "outputs_first"),
    [(True, True, True, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in EPILOGUES)],
)
def test_the_epilogue_works_on_the_sums(scaled, biased, relu, outputs_first):
    x, w, dy, mask, structure, geometry = make((2, 2), 64, 64, 96, (64, 64))
    rng = np.random.default_rng(1)
    scale, bias = rng.standard_normal((2, 96)).astype(np.float32)
    tiles = config.ProductTiles(64, 64, outputs_first=outputs_first)
    expected = common.expected(x, w, dy, mask, geometry)[0]
    expected = expected * (scale if scaled else 1.0) + (bias if biased else 0.0)
    with compat.interpreted(detect_races=True):
        vectors = jnp.asarray(scale) if scaled else None, jnp.asarray(bias) if biased else None
        y = mosaic_gpu.forward(x, w, structure, geometry, *vectors, relu, tiles=tiles)
    check(y, np.maximum(expected, 0.0) if relu else expected, "forward")


@needs_mosaic
def test_one_program_serves_all_masks_of_like_size():
    geometry = make_geometry((2, 2, 8, 128), (3, 3), (1, 1), "SAME", "HWNC")

    @jax.jit
    def value_and_gradients(x, w, structure, dy):
        y, transposed = jax.vjp(lambda x, w: differentiable(x, w, structure, geometry, mosaic_gpu), x, w)
        return y, *transposed(dy)

    corners = np.zeros((4, 9), bool)
    for pattern, taps in zip(corners, CORNERS):
        pattern[list(taps)] = True
    program = None
    for seed in range(2):
        rng = np.random.default_rng(seed)
        blocks = rng.permutation(corners).reshape(2, 2, 3, 3).transpose(2, 3, 0, 1)
        mask = blocks.repeat(64, axis=2).repeat(64, axis=3)
        structure = jax.tree.map(jnp.asarray, make_structure(mask, tile=(64, 64)))
        x, dy = (jnp.asarray(rng.standard_normal((2, 2, 8, 128)), jnp.bfloat16) for _ in range(2))
        w = jnp.asarray(np.where(mask, rng.standard_normal(mask.shape), np.nan), jnp.bfloat16)
        with compat.interpreted(detect_races=True):
            # A compiled program takes arguments of its own shapes and static facts only.
            program = program or value_and_gradients.lower(x, w, structure, dy).compile()
            results = program(x, w, structure, dy)
        check_each(results, x, w, dy, mask, geometry)


REFUSED = {
    "float32": (dict(dtype=jnp.float32), "bfloat16 or float16.*got float32"),
    "layout": (dict(layout="NHWC"), "HWNC.*got NHWC"),
    "batch": (dict(batch=12), "multiple of 8, got 12; 16 is the nearest"),
    "channels": (dict(cin=56), r"got 56 and 64; \(64, 64\) is the nearest"),
    "a tile too narrow": (dict(tile=(64, 1)), r"got \(64, 1\).*tiles of \(64, 16\)"),
    "no side of 64": (dict(tile=(32, 32)), r"got \(32, 32\).*tiles of \(64, 32\)"),
    "few images and a narrow tile": (dict(tile=(64, 32), batch=32), r"batch of 32; masks.*\(64, 64\)"),
}


@needs_mosaic
def test_strips_are_refused_where_they_mean_nothing():
    for facts, tiles in (
        (dict(size=(4, 4), strides=2), config.StripTiles(2, 8)),
        (dict(size=(4, 4), window=1), config.StripTiles(2, 8)),
        (dict(size=(1, 1)), config.StripTiles(2, 8)),
    ):
        x, w, _, _, structure, geometry = make(**facts, batch=8, cin=64, cout=64, tile=(64, 64))
        with pytest.raises(ValueError, match="strips"):
            mosaic_gpu.forward(x, w, structure, geometry, tiles=tiles)


@needs_mosaic
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_nearest_that_can(case):
    changes, message = REFUSED[case]
    facts = dict(cin=64, batch=64, tile=(64, 64), dtype=jnp.bfloat16, layout="HWNC") | changes
    structure = make_structure(np.ones((3, 3, facts["cin"], 64), bool), tile=facts["tile"])
    batch = facts["batch"]
    shape = (4, 4, batch, facts["cin"]) if facts["layout"] == "HWNC" else (batch, 4, 4, facts["cin"])
    geometry = make_geometry(shape, (3, 3), (1, 1), "SAME", facts["layout"])
    reason = mosaic_gpu.why_not(structure, geometry, jnp.dtype(facts["dtype"]), batch)
    assert re.search(message, reason), reason
    with pytest.raises(ValueError, match=message):
        mosaic_gpu.forward(jnp.zeros(shape, facts["dtype"]), None, structure, geometry)


def test_the_cpu_and_an_old_jax_are_said():
    assert "Hopper" in mosaic_gpu.why_not_here() and "cpu" in mosaic_gpu.why_not_here()
    geometry = make_geometry((4, 4, 64, 64), (3, 3), (1, 1), "SAME", "HWNC")
    structure = make_structure(np.ones((3, 3, 64, 64), bool), tile=(64, 64))
    reason = mosaic_gpu.why_not(structure, geometry, jnp.dtype("bfloat16"), 64)
    assert (reason is None) == compat.HAS_MOSAIC_GPU
    if reason is not None:
        assert "0.11.2" in reason


@pytest.mark.parametrize(
    "make_tiles, message",
    [
        (lambda: config.ProductTiles(12, 64), "images are a multiple of 8, at most 256, got 12"),
        (lambda: config.ProductTiles(128, 512), "outputs are a multiple of 16, at most 256, got 512"),
        (lambda: config.ProductTiles(128, 32), "outputs are the rows .* got 32"),
        (lambda: config.ProductTiles(128, 64, depth=48), "depth is 16, 32 or 64 channels, got 48"),
        (lambda: config.ProductTiles(128, 64, stages=1), "stages are at least 2"),
        (lambda: config.ProductTiles(256, 128), "at most 16384 sums"),
        (lambda: config.ProductTiles(128, 128, stages=6), "bytes of shared memory"),
        (lambda: config.WeightTiles(24, 64, 64), "16, 32 or a multiple of 64 up to 256, got 24"),
        (lambda: config.WeightTiles(64, 32, 32), "channels are the rows"),
        (lambda: config.WeightTiles(64, 64, 64, least=0), "least is at least 1, got 0"),
        (lambda: config.StripTiles(4, 128), r"pixels \* images are a multiple of 8, at most 256, got 512"),
        (lambda: config.StripTiles(8, 32, x_stages=3), "bytes of shared memory"),
        (lambda: config.product_tiles(64, (4, 4), 24, 24, 64), "no tiles for 64 images, 24 outputs"),
        (lambda: config.weight_tiles(64, (4, 4), 1, 8, (24, 64)), "no tiles"),
    ],
)
def test_tiles_that_no_hopper_gpu_has_room_for_are_refused(make_tiles, message):
    with pytest.raises(ValueError, match=message):
        make_tiles()


def test_the_first_choice_fits_every_shape():
    for tile, batch in itertools.product(
        [(64, 64), (128, 64), (64, 128), (256, 256), (512, 64), (16, 64), (64, 16), (48, 192)], (64, 72, 128, 200, 512)
    ):
        for size in ((1, 1), (7, 7), (56, 56)):
            forward = config.product_tiles(batch, size, 768, *tile)
            assert tile[0] % forward.outputs == 0 and tile[1] % forward.depth == 0 and forward.images <= batch
            strips = config.strip_tiles(batch, size, *tile, 3)
            assert (strips is None) == (tile[0] % 64 != 0 or size[1] == 1)
            if strips is not None:
                assert strips.pixels <= size[1] and strips.images <= batch and tile[1] % strips.depth == 0
            weights = config.weight_tiles(batch, size, 4, 40, tile)
            assert tile[0] % weights.filters == 0 and tile[1] % weights.channels == 0
