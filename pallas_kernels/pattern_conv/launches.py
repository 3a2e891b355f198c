"""How each launch of the Hopper kernels is cut: explicit, else tuned, else by what is read; and dealt.

Of structures whose arrays are concrete the forward pass and the input gradient take, of all tiles that give every
multiprocessor as much, those whose busiest one moves least. Where arrays are traced the shape alone decides.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np

from pallas_kernels.pattern_conv import config
from pallas_kernels.pattern_conv.config import ProductTiles, StripTiles, WeightTiles
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.schedule import Work, costs, dealt, loads, work_of
from pallas_kernels.pattern_conv.structure import Structure
from pallas_kernels.tuning import Cache, recall

Structures = TypeVar("Structures")
# Busiest over mean multiprocessor of work that counts as even.
EVEN = 1.15
# What `scheduled` found while it traces: structures with worklists by the identity of their lists.
_FOUND: contextvars.ContextVar[dict[int, Structure] | None] = contextvars.ContextVar("found", default=None)


def launch(
    structure: Structure,
    geometry: Geometry,
    batch: int,
    transposed: bool,
    multiprocessors: int,
    tiles: ProductTiles | StripTiles | None = None,
) -> Work:
    """The worklist, with its plan, of the forward pass, transposed of the input gradient; see `mosaic_gpu.forward`."""
    lists = lists_of(structure, transposed)
    for work in structure.work if tiles is None else ():
        if work.plan.serves(geometry, batch, transposed):
            return work
    plan = product_plan(structure, geometry, batch, transposed, multiprocessors, tiles)
    return work_of(plan, *lists)


def lists_of(structure: Structure, transposed: bool) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
    """(pairs, counts) that the forward pass reads, transposed those of the input gradient."""
    if transposed:
        return structure.pairs_by_channel, structure.pair_counts_by_channel
    return structure.pairs, structure.pair_counts


def options(
    structure: Structure, geometry: Geometry, batch: int, direction: str
) -> dict[str, ProductTiles | StripTiles | WeightTiles]:
    """Tiles that a direction may have, by name, what promises most first: candidates for `tuning.autotune`.

    Args:
        structure: what is retained; of its arrays the shapes are read.
        geometry: of the convolution.
        batch: images.
        direction: "forward", "input_gradient" or "weight_gradient".
    """
    kw, (cin, cout) = geometry.window[1], structure.shape[2:]
    if direction == "weight_gradient":
        lists, room = structure.pairs.shape
        looks_back = kw > geometry.strides[1]
        found = config.weight_options(batch, geometry.output, lists, room, structure.tile, looks_back)
    else:
        transposed = direction == "input_gradient"
        size, outputs = (geometry.image, cin) if transposed else (geometry.output, cout)
        tile, depth = structure.tile[::-1] if transposed else structure.tile
        # A strip reads columns outside as a pixel past the end, which a single pixel has none of (see `mosaic.ring`).
        strips = geometry.strides == (1, 1) and (1, 1) not in (geometry.image, geometry.output)
        found = config.product_options(batch, size, outputs, tile, depth, kw if strips else 1)
    return {str(tiles): tiles for tiles in found}


def facts(structure: Structure, geometry: Geometry, batch: int, direction: str) -> dict[str, object]:
    """What decides which tiles are fastest, beside the kind of device: the key of what was tuned."""
    return {
        "tiles of": direction,
        "shape": structure.shape,
        "tile": structure.tile,
        "room": lists_of(structure, direction == "input_gradient")[0].shape[1],
        "image": geometry.image,
        "strides": geometry.strides,
        "padding": geometry.padding,
        "batch": batch,
    }


def _first(structure: Structure, geometry: Geometry, batch: int, direction: str) -> tuple[Any, bool]:
    """(the tuned tiles, or what promises most; whether they were tuned)."""
    found = options(structure, geometry, batch, direction)
    choice = recall(facts(structure, geometry, batch, direction), found, Cache())
    return (next(iter(found.values())), False) if choice is None else (found[choice.winner], True)


def product_plan(
    structure: Structure, geometry: Geometry, batch: int, transposed: bool, multiprocessors: int, tiles: Any = None
):
    """The launch of the forward pass, transposed of the input gradient; see `mosaic_gpu.forward`.

    Raises:
        ValueError: the tiles do not fit.
    """
    from pallas_kernels.pattern_conv.mosaic.products import Plan
    from pallas_kernels.pattern_conv.mosaic.strips import StripPlan

    direction = "input_gradient" if transposed else "forward"
    tiles = tiles or _first(structure, geometry, batch, direction)[0]
    output_tile, depth_tile = structure.tile[::-1] if transposed else structure.tile
    strip = isinstance(tiles, StripTiles)
    if strip and (geometry.strides != (1, 1) or tiles.window != geometry.window[1]):
        raise ValueError(f"strips of a window {tiles.window} wide at stride 1 do not fit {geometry}")
    if strip and (1, 1) in (geometry.image, geometry.output):
        raise ValueError(f"strips want images of more than one pixel, got {geometry}")
    # A tile over a list's end would take another list's weights. Images past the batch are read as zeros only where the
    # batch is longer than a tile: the copy's box is no larger than the array.
    if output_tile % tiles.outputs or depth_tile % tiles.depth or tiles.images > batch:
        raise ValueError(
            f"tiles of {tiles.images} images, {tiles.outputs} outputs, {tiles.depth} deep do not fit {batch} images "
            f"and lists for {output_tile} outputs with {depth_tile} channels an entry"
        )
    make: Any = StripPlan if strip else Plan
    outputs = structure.shape[2] if transposed else structure.shape[3]
    geometry = dataclasses.replace(geometry, precision=None)
    plan = make(geometry, tiles, transposed, output_tile, depth_tile, batch, outputs, 1)
    # One block a multiprocessor, fewer where there are fewer output tiles.
    return dataclasses.replace(plan, blocks=min(multiprocessors, plan.items))


def weight_plan(structure: Structure, geometry: Geometry, batch: int, multiprocessors: int, tiles: Any = None):
    """The launch of the weight gradient; see `mosaic_gpu.weight_gradient`.

    Raises:
        ValueError: the tiles do not fit.
    """
    from pallas_kernels.pattern_conv.mosaic.weight_plan import WeightPlan

    lists, room = structure.pairs.shape
    tiles = tiles or _first(structure, geometry, batch, "weight_gradient")[0]
    fits = structure.tile[0] % tiles.filters == 0 and structure.tile[1] % tiles.channels == 0
    if not fits:
        raise ValueError(f"tiles of {tiles.filters} filters, {tiles.channels} channels do not divide {structure.tile}")
    images = max(batch, tiles.images)
    plan = WeightPlan(geometry, tiles, structure.tile, structure.shape, images, lists, room, multiprocessors)
    if tiles.stages < 2 + plan.back:
        raise ValueError(f"steps look back at what the one before read: stages are at least 3, got {tiles.stages}")
    return plan


def scheduled(run: Callable[[Structures], object], structures: Structures) -> Structures:
    """Structures with worklists for all that a function convolves by them on a GPU, to be arguments of its program.

    `pattern_conv` deals its work itself where a structure's arrays are concrete. Where they are arguments of a program
    this does it before: the function is traced for the shapes that it convolves. Without it the program sorts the
    output tiles: two or three small kernels more a call, cut by shape alone and dealt less evenly.

    Args:
        run: called as ``run(structures)``, traced and not run; everything else that it wants it holds.
        structures: a tree with `Structure` leaves, their arrays concrete.

    Returns:
        The same tree; structures that no Hopper kernel used are as they were.
    """
    token = _FOUND.set({})
    try:
        jax.eval_shape(lambda: run(structures))
        found = _FOUND.get() or {}
    finally:
        _FOUND.reset(token)
    leaves, tree = jax.tree.flatten(structures, is_leaf=lambda leaf: isinstance(leaf, Structure))
    leaves = [found.get(id(leaf.pairs), leaf) if isinstance(leaf, Structure) else leaf for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


def is_scheduling() -> bool:
    """Whether `scheduled` traces."""
    return _FOUND.get() is not None


def for_batch(structure: Structure, geometry: Geometry, batch: int, multiprocessors: int = 132) -> Structure:
    """The structure with worklists for one shape of batches, if its arrays are concrete: else as it is.

    Args:
        structure: of `make_structure`; it may be for several shapes, one after the other.
        geometry: of a convolution that the Hopper kernels can do.
        batch: images.
        multiprocessors: of the GPU.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(structure)):
        return structure
    found = _FOUND.get()
    pairs, structure = structure.pairs, structure if found is None else found.get(id(structure.pairs), structure)
    for transposed in (False, True):
        if not any(work.plan.serves(geometry, batch, transposed) for work in structure.work):
            content = b"".join(np.asarray(array).tobytes() for array in lists_of(structure, transposed))
            content = structure.shape, structure.tile, geometry, batch, transposed, multiprocessors, content
            made = _best(_Asked(content, structure))
            structure = dataclasses.replace(structure, work=(*structure.work, made))
    if found is not None:
        found[id(pairs)] = structure
    return structure


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a worklist is for; alike where the content is."""

    content: tuple
    structure: Structure = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=1024)
def _best(asked: _Asked) -> Work:
    """The even worklist whose busiest multiprocessor moves least; that of the tuned tiles where there are any."""
    structure, (_, _, geometry, batch, transposed, multiprocessors, _) = asked.structure, asked.content
    direction = "input_gradient" if transposed else "forward"
    pairs, counts = (np.asarray(array) for array in lists_of(structure, transposed))
    tuned, is_tuned = _first(structure, geometry, batch, direction)
    tried = [tuned] if is_tuned else options(structure, geometry, batch, direction).values()
    best = None
    for tiles in tried:
        plan = product_plan(structure, geometry, batch, transposed, multiprocessors, tiles)
        cost = costs(plan, pairs, counts)
        mean = cost.sum() / multiprocessors
        if best is not None and (False, mean) >= best[0]:
            continue  # even if it could be dealt without a rest
        work = dealt(plan, cost)
        busiest = loads(work, cost, multiprocessors).max()
        found = bool(busiest > EVEN * mean), busiest
        if best is None or found < best[0]:
            best = found, work
    assert best is not None
    return best[1]
