"""The backend for Hopper GPUs and later: dense products of what is retained, on the tensor cores, in HWNC.

With the batch beside the channels every pixel is a matrix of images by channels, and a tap is another pixel's. What
a tile of filters retains of a block of channels is then a list of dense products. The lists are arguments of the
compiled program: new masks of like size do not compile anything.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.pattern_conv.config import ProductTiles, StripTiles, WeightTiles
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.launches import launch, weight_plan
from pallas_kernels.pattern_conv.structure import Structure

DTYPES = ("bfloat16", "float16")
# `forward` takes scale, bias and relu.
FUSES_EPILOGUE = True
# The tensor cores take rows of the product in this many at a time; the copy engine, rows of 16 bytes.
ROWS = 64
ALIGNED = 8
# The least side of a tile, and what channels and filters in all are multiples of: a swizzled row of 32 bytes.
LEAST = 16


def why_not(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """Why this convolution cannot be done and the nearest that can; None if it can. No device is looked at.

    Args:
        structure: what is retained.
        geometry: of the convolution.
        dtype: of x and w.
        batch: images.
    """
    if not compat.HAS_MOSAIC_GPU:
        return f"{compat.MOSAIC_GPU_NEEDS}, this is {jax.__version__}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"it takes {' or '.join(DTYPES)}, as Hopper's tensor cores do, got {jnp.dtype(dtype).name}; cast x and w"
    if geometry.layout != "HWNC":
        return f"it takes the layout HWNC, where the batch lies beside the channels, got {geometry.layout}"
    if batch % ALIGNED:
        return f"the batch is a multiple of {ALIGNED}, got {batch}; {_up(batch, ALIGNED)} is the nearest"
    cin, cout = structure.shape[2:]
    if cin % LEAST or cout % LEAST:
        nearest = (_up(cin, LEAST), _up(cout, LEAST))
        return f"channels and filters are multiples of {LEAST}, got {cin} and {cout}; {nearest} is the nearest"
    filters, channels = structure.tile
    # With few images, they cannot be the rows of a product: filters (or channels, in the input gradient) have to.
    aligned = all(size % LEAST == 0 for size in structure.tile)
    rows = [size % ROWS == 0 for size in structure.tile]
    if aligned and any(rows) and (all(rows) or batch >= ROWS):
        return None
    reason = (
        f"a tile's filters and channels are multiples of {LEAST}, one of them of {ROWS} (both for a batch under "
        f"{ROWS}), got {structure.tile} for a batch of {batch}"
    )
    nearest = (_up(filters, LEAST), _up(channels, LEAST))
    if batch < ROWS:
        nearest = (_up(filters, ROWS), _up(channels, ROWS))
    elif not any(size % ROWS == 0 for size in nearest):
        nearest = (_up(filters, ROWS), nearest[1])
    return f"{reason}; masks that tiles of {nearest} (filters, channels) share are the nearest"


def why_not_here() -> str | None:
    """Why the kernels cannot run on this process's first device; None if they can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        return f"it runs on Hopper GPUs and later, jax runs on {device.platform} here"
    if int(str(capability).split(".")[0]) < 9:
        return f"it runs on Hopper GPUs and later (compute capability 9.0), this is {device.device_kind} ({capability})"
    return None


def forward(
    x: jax.Array,
    w: jax.Array,
    structure: Structure,
    geometry: Geometry,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    relu: bool = False,
    *,
    tiles: ProductTiles | StripTiles | None = None,
) -> jax.Array:
    """The convolution, with an epilogue on the float32 sums before they are rounded.

    Args:
        x: (height, width, batch, cin), bfloat16 or float16.
        w: (kh, kw, cin, cout) of x's dtype; what is not retained is never read.
        structure: of `make_structure`; its arrays may be traced.
        geometry: of the convolution.
        scale: (cout,), multiplies; None for 1.
        bias: (cout,), is added after; None for 0.
        relu: whether negative outputs become 0.
        tiles: how to cut the work; None for what was tuned, else a choice by what is read.

    Returns:
        (rows, columns, batch, cout) of x's dtype.

    Raises:
        ValueError: the convolution is not supported (`why_not`), or the tiles do not fit it.
    """
    batch = _supported(x, structure, geometry)
    filters, cout = structure.tile[0], structure.shape[3]
    lists = structure.pairs, structure.pair_counts
    padded = [
        None if vector is None else jnp.pad(vector.astype(jnp.float32), (0, _up(cout, filters) - cout))
        for vector in (scale, bias)
    ]
    work = launch(structure, geometry, batch, False, compat.multiprocessors(x), tiles)
    return _run(x, w, work, lists, padded[0], padded[1], relu)


def input_gradient(
    dy: jax.Array,
    w: jax.Array,
    structure: Structure,
    geometry: Geometry,
    *,
    tiles: ProductTiles | StripTiles | None = None,
) -> jax.Array:
    """The gradient of the input.

    Args:
        dy: (rows, columns, batch, cout), bfloat16 or float16.
        w: (kh, kw, cin, cout) of dy's dtype; what is not retained is never read.
        structure: of `make_structure`; its arrays may be traced.
        geometry: of the convolution.
        tiles: how to cut the work; None for what was tuned, else a choice by what is read.

    Returns:
        (height, width, batch, cin) of dy's dtype.

    Raises:
        ValueError: the convolution is not supported (`why_not`), or the tiles do not fit it.
    """
    batch = _supported(dy, structure, geometry)
    lists = structure.pairs_by_channel, structure.pair_counts_by_channel
    return _run(dy, w, launch(structure, geometry, batch, True, compat.multiprocessors(dy), tiles), lists)


def weight_gradient(
    x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry, *, tiles: WeightTiles | None = None
) -> jax.Array:
    """The gradient of the weights.

    Args:
        x: (height, width, batch, cin), bfloat16 or float16.
        dy: (rows, columns, batch, cout) of x's dtype.
        structure: of `make_structure`; its arrays may be traced.
        geometry: of the convolution.
        tiles: how to cut the work; None for what was tuned, else a choice by what is read.

    Returns:
        (kh, kw, cin, cout) float32, exact zeros where nothing is retained.

    Raises:
        ValueError: the convolution is not supported (`why_not`), or the tiles do not fit it.
    """
    from pallas_kernels.pattern_conv.mosaic.added import added
    from pallas_kernels.pattern_conv.mosaic.weight_gradient import partial_sums

    batch = _supported(x, structure, geometry)
    plan = weight_plan(structure, geometry, batch, compat.multiprocessors(x), tiles)
    # A step sums at least 16 images.
    more = plan.batch - batch
    if more:
        x, dy = (jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0))) for array in (x, dy))
    if geometry.image == (1, 1):
        # What lies past a single pixel could not be told from it (see `mosaic.ring`): give it a neighbour.
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
    pairs, counts = jnp.asarray(structure.pairs), jnp.asarray(structure.pair_counts)
    return added(partial_sums(x, dy, pairs, counts, plan), pairs, counts, plan)


def _run(x, w, work, lists, scale=None, bias=None, relu=False):
    from pallas_kernels.pattern_conv.mosaic.products import products
    from pallas_kernels.pattern_conv.mosaic.strips import strips

    run = strips if isinstance(work.plan.tiles, StripTiles) else products
    pairs, counts = lists
    return run(x, w, pairs, counts, work, scale, bias, relu)


def _supported(x: jax.Array, structure: Structure, geometry: Geometry) -> int:
    """The batch, or the refusal."""
    batch = x.shape[geometry.batch_axis]
    reason = why_not(structure, geometry, x.dtype, batch)
    if reason is not None:
        raise ValueError(f"mosaic_gpu cannot do this convolution: {reason}")
    return batch


def _up(length: int, step: int) -> int:
    return max(1, -(-length // step)) * step
