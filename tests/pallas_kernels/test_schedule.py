"""Worklists of the Hopper kernels: every output tile once, and every multiprocessor as much as any other."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
import pallas_kernels as pk
from pallas_kernels import compat
from pallas_kernels.pattern_conv import cases, config, launches, schedule
from pallas_kernels.pattern_conv.cases import Case
from pallas_kernels.pattern_conv.structure import make_structure, mask_of
from pallas_kernels.tuning import Cache

pytestmark = pytest.mark.skipif(not compat.HAS_MOSAIC_GPU, reason=compat.MOSAIC_GPU_NEEDS)

MULTIPROCESSORS = 132
# Busiest over mean multiprocessor, by what it moves.
EVEN = launches.EVEN
BLOCKS = ((64, 64), (64, 16))
DEALT = [case for case in cases.GPU if case.cin > 64]


def launch(case, structure, transposed, tiles=None):
    """(plan, lists) of a direction, by shape."""
    plan = launches.product_plan(structure, case.geometry(), case.batch, transposed, MULTIPROCESSORS, tiles)
    return plan, launches.lists_of(structure, transposed)


def dealt(case, structure, transposed):
    """(worklist, what its output tiles move, what each multiprocessor moves) of a structure whose arrays are known."""
    structure = launches.for_batch(structure, case.geometry(), case.batch, MULTIPROCESSORS)
    work = launches.launch(structure, case.geometry(), case.batch, transposed, MULTIPROCESSORS)
    assert work.plan in [each.plan for each in structure.work]
    cost = schedule.costs(work.plan, *launches.lists_of(structure, transposed))
    return work, cost, schedule.loads(work, cost, MULTIPROCESSORS)


def selection(case, seed, reduction):
    """The structure of a mask that a plan selects, in blocks; a few filters and channels matter more than others."""
    rng = np.random.default_rng(seed)
    matters = [np.exp(rng.standard_normal((1, 1, *side))) for side in ((case.cin, 1), (1, case.cout))]
    scores = {"kernel": jnp.asarray(rng.chisquare(1, case.w_shape) * matters[0] * matters[1], jnp.float32)}
    plan = ct.make_plan(scores, {"kernel": cases.removed_for(reduction)}, tile=case.tile, groups={"kernel": 1})
    masks = ct.select_masks(scores, plan, ct.patterns.fixed_set(4))
    return make_structure(np.asarray(masks.pattern["kernel"] & masks.kernel["kernel"]), tile=case.tile)


@pytest.mark.parametrize("case", cases.GPU, ids=str)
def test_every_multiprocessor_has_as_much_to_do(case):
    for seed, transposed in itertools.product(range(2), (False, True)):
        loads = dealt(case, cases.structure_of(case, np.random.default_rng(seed)), transposed)[-1]
        assert loads.max() <= EVEN * loads.mean()


@pytest.mark.parametrize("reduction", [2.25, 8.0])
@pytest.mark.parametrize("tile", BLOCKS, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in (*cases.vgg16(128), *cases.vgg16(512), *cases.resnet50(128)) if case.cin > 64], ids=str
)
def test_so_it_has_of_real_selections(case, tile, reduction):
    case = dataclasses.replace(case, tile=tile)
    structure = selection(case, seed=0, reduction=reduction)
    for transposed in (False, True):
        _, cost, loads = dealt(case, structure, transposed)
        # Layers of four or sixteen pixels with a batch of 128 are few output tiles.
        few = case.batch == 128 and case.image[0] <= 4
        assert loads.max() <= max(EVEN * loads.mean(), few * (loads.mean() + cost.max()))


def read_by_hand(plan, kept):
    """The 16-bit numbers that each output tile moves: its products' operands, pixel by pixel; ``kept`` by block."""
    tiles, geometry = plan.tiles, plan.geometry
    kept = kept.swapaxes(2, 3) if plan.transposed else kept  # (kh, kw, blocks summed, lists)
    pixels = getattr(tiles, "pixels", 1)
    found = np.full(plan.grid, tiles.images * tiles.outputs * pixels)
    for block, row, strip, channel in np.ndindex(*plan.grid):
        looked = set()
        shared = plan.output_tile // tiles.outputs
        for i, j, source in np.argwhere(kept[:, :, :, channel // shared]):
            for column in range(strip * pixels, strip * pixels + pixels):
                place = []
                for axis, at, tap in ((0, row, i), (1, column, j)):
                    if plan.transposed:
                        at = at + geometry.padding[axis][0] - tap
                        place.append(at // geometry.strides[axis] if at % geometry.strides[axis] == 0 else -1)
                    else:
                        place.append(at * geometry.strides[axis] + tap - geometry.padding[axis][0])
                if all(0 <= at < end for at, end in zip(place, plan.source_size)):
                    # Strips read a pixel once for a row of the window.
                    looked.add((int(source), int(i), 0 if pixels > 1 else int(j), *map(int, place)))
            used = plan.geometry.reached(0, plan.transposed)[row, i]
            used &= pixels > 1 or plan.geometry.reached(1, plan.transposed)[strip, j]
            found[block, row, strip, channel] += used * tiles.outputs * plan.depth_tile
        found[block, row, strip, channel] += len(looked) * tiles.images * plan.depth_tile
    return found


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_the_cost_of_an_output_tile_is_what_it_moves(strides):
    case = Case("c", (4, 5), 16, 128, 192, strides=strides, tile=(64, 64), removed=0.3, dtype="bfloat16", layout="HWNC")
    structure = cases.structure_of(case, np.random.default_rng(0))
    kept = mask_of(structure)[:, :, ::64, ::64]
    for transposed in (False, True):
        plan, lists = launch(case, structure, transposed, config.ProductTiles(8, 64))
        cost = schedule.costs(plan, *lists).reshape(plan.grid)
        np.testing.assert_array_equal(cost, schedule.costs(plan, *map(jnp.asarray, lists), jnp).reshape(plan.grid))
        np.testing.assert_array_equal(cost, read_by_hand(plan, kept))


def test_a_strip_reads_a_pixel_once_for_a_row_of_the_window():
    case = Case("c", (4, 6), 16, 128, 192, tile=(64, 64), removed=0.3, dtype="bfloat16", layout="HWNC")
    structure = cases.structure_of(case, np.random.default_rng(0))
    kept = mask_of(structure)[:, :, ::64, ::64]
    for transposed, pixels in itertools.product((False, True), (3, 6)):
        plan, lists = launch(case, structure, transposed, config.StripTiles(pixels, 8, depth=32))
        cost = schedule.costs(plan, *lists).reshape(plan.grid)
        np.testing.assert_array_equal(cost, schedule.costs(plan, *map(jnp.asarray, lists), jnp).reshape(plan.grid))
        by_hand = read_by_hand(plan, kept)
        if pixels == 6:
            np.testing.assert_array_equal(cost, by_hand)
        else:  # what lies outside at a row's ends is counted as if it were read
            assert (cost >= by_hand).all() and cost.sum() <= 1.15 * by_hand.sum()


@pytest.mark.parametrize("case", [case for case in DEALT if case.strides == (1, 1)], ids=str)
def test_the_busiest_multiprocessor_moves_less_than_with_tiles_that_the_shape_alone_gave(case):
    structure = cases.structure_of(case, np.random.default_rng(0))
    for transposed in (False, True):
        size, outputs = (case.geometry().image, case.cin) if transposed else (case.geometry().output, case.cout)
        before, lists = launch(case, structure, transposed, config.product_tiles(case.batch, size, outputs, 64, 64))
        cost = schedule.costs(before, *lists)
        busiest = schedule.loads(schedule.dealt(before, cost), cost, MULTIPROCESSORS).max()
        work, _, loads = dealt(case, structure, transposed)
        # At the larger batch, and patterns alone, strips read a third less.
        strip = isinstance(work.plan.tiles, config.StripTiles)
        assert loads.max() <= busiest * (0.8 if strip else 1.0)
        assert strip or case.image[0] < 8 or "-8x" in case.name


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8, 64, 64), (5, 7, 72, 96, 80), (2, 2, 512, 512, 512)], ids=str)
def test_every_output_tile_is_computed_once(shape, traced):
    height, width, batch, cin, cout = shape
    case = Case("c", (height, width), batch, cin, cout, tile=(64, 64), removed=0.5, dtype="bfloat16", layout="HWNC")
    structure = cases.structure_of(case, np.random.default_rng(0))
    for transposed in (False, True):
        plan, lists = launch(case, structure, transposed)
        make = jax.jit(lambda *lists, plan=plan: schedule.work_of(plan, *lists)) if traced else schedule.work_of
        work = make(*lists) if traced else make(plan, *lists)
        assert work.order.dtype == work.starts.dtype == np.int32
        np.testing.assert_array_equal(np.sort(work.order), np.arange(plan.items))
        assert len(work.starts) == plan.blocks * plan.tiles.warpgroups + 1
        assert work.starts[0] == 0 and work.starts[-1] == plan.items and (np.diff(work.starts) >= 0).all()


@pytest.mark.parametrize("case", [case for case in cases.GPU if case.cin > 64 and "-2x2-" not in case.name], ids=str)
def test_tiles_that_the_program_deals_are_never_half_as_uneven_as_unsorted_ones_were(case):
    for transposed in (False, True):
        plan, lists = launch(case, cases.structure_of(case, np.random.default_rng(0)), transposed)
        work = jax.jit(lambda *lists, plan=plan: schedule.work_of(plan, *lists))(*lists)
        cost = schedule.costs(plan, *lists)
        loads = schedule.loads(work, cost, MULTIPROCESSORS)
        assert loads.max() <= 1.6 * loads.mean()


def sorts(function, *arguments):
    return " sort[" in str(jax.make_jaxpr(function)(*arguments))


def gradients(x, w, structure):
    convolve = lambda x, w: pk.pattern_conv(x, w, structure, layout="HWNC", backend="mosaic_gpu")  # noqa: E731
    y, transposed = jax.vjp(convolve, x, w)
    return transposed(y)


SORTED = Case("c", (4, 4), 16, 128, 128, tile=(64, 64), removed=0.3, dtype="bfloat16", layout="HWNC")


@pytest.mark.parametrize("of", [lambda x: x, lambda x: jax.tree.map(jnp.asarray, x)], ids=["numpy", "jax"])
def test_a_structure_that_is_known_is_dealt_by_the_host(of):
    structure = of(cases.structure_of(SORTED, np.random.default_rng(0)))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (SORTED.x_shape, SORTED.w_shape)]
    with compat.traced_for("NVIDIA H200", MULTIPROCESSORS):
        assert sorts(gradients, *shapes, structure)
        assert not sorts(lambda x, w: gradients(x, w, structure), *shapes)


def test_a_scheduled_structure_is_not_sorted_in_the_program():
    structure = cases.structure_of(SORTED, np.random.default_rng(0))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (SORTED.x_shape, SORTED.w_shape))
    other = jax.ShapeDtypeStruct((4, 4, 32, 128), jnp.bfloat16)

    def run(held, *inputs):
        kernel = jnp.zeros(w.shape, w.dtype)
        return [pk.pattern_conv(x, kernel, held["a"], layout="HWNC", backend="mosaic_gpu") for x in inputs]

    held = {"a": structure, "b": structure.pairs}
    with compat.traced_for("NVIDIA H200", MULTIPROCESSORS):
        scheduled = pk.scheduled(lambda held: run(held, jnp.zeros(x.shape, x.dtype)), held)
        assert scheduled["b"] is structure.pairs and not structure.work
        assert not sorts(gradients, x, w, scheduled["a"])
        # For another batch it is, until it is scheduled for that too.
        assert sorts(gradients, other, w, scheduled["a"])
        both = pk.scheduled(lambda held: run(held, *(jnp.zeros(i.shape, i.dtype) for i in (x, other))), held)["a"]
        assert not sorts(gradients, other, w, both) and not sorts(gradients, x, w, both)
        again = {"a": cases.structure_of(SORTED, np.random.default_rng(1))}
        again = pk.scheduled(lambda held: run(held, jnp.zeros(x.shape, x.dtype)), again)
    # New masks of like size fit the same program.
    assert jax.tree.structure(again["a"].work) == jax.tree.structure(scheduled["a"].work)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(each["a"].work)] for each in (again, scheduled)]
    assert shapes[0] == shapes[1]


def test_nothing_is_scheduled_where_structures_are_arguments():
    structure = cases.structure_of(SORTED, np.random.default_rng(0))
    inside = jax.jit(lambda structure: launches.for_batch(structure, SORTED.geometry(), 16).pairs)
    np.testing.assert_array_equal(inside(structure), structure.pairs)


@pytest.mark.parametrize("direction", ["forward", "input_gradient", "weight_gradient"])
def test_tiles_are_those_given_else_those_tuned_else_those_that_move_least(direction, tmp_path, monkeypatch):
    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    (case,) = (case for case in cases.GPU if case.name == "vgg16-n128-8x8-256-256-8x")
    structure, geometry = cases.structure_of(case, np.random.default_rng(0)), case.geometry()
    facts = launches.facts(structure, geometry, case.batch, direction)
    names = list(launches.options(structure, geometry, case.batch, direction))

    def tiles(given=None):
        launches._best.cache_clear()  # as in a new process
        if direction == "weight_gradient":
            return str(launches.weight_plan(structure, geometry, case.batch, MULTIPROCESSORS, given).tiles)
        held = launches.for_batch(structure, geometry, case.batch, MULTIPROCESSORS)
        transposed = direction == "input_gradient"
        return str(launches.launch(held, geometry, case.batch, transposed, MULTIPROCESSORS, given).plan.tiles)

    first = tiles()
    assert first in names and tiles() == first
    winner = next(name for name in names[3:] if name != first)
    Cache().put(facts, {"winner": winner})
    assert tiles() == winner
    given = launches.options(structure, geometry, case.batch, direction)[names[1]]
    assert tiles(given) == names[1]
    # Winners that are no option any more are passed over.
    Cache().put(facts, {"winner": "ProductTiles(1)"})
    assert tiles() == first


def weights_of(case, structure):
    """(plan, what each multiprocessor reads and writes, bytes of parts) of the weight gradient."""
    from pallas_kernels.pattern_conv.mosaic import weight_plan

    plan = launches.weight_plan(structure, case.geometry(), case.batch, MULTIPROCESSORS)
    runs = weight_plan.runs(plan, structure.pair_counts)
    assert runs[0][0] == 0 and all(end == begin for (_, end), (begin, _) in itertools.pairwise(runs))
    groups = sum(-(-int(count) // plan.tiles.entries) for count in structure.pair_counts)
    assert runs[-1][1] == plan.total(groups)
    parts = weight_plan.bytes_of_parts(plan, structure.pair_counts)
    return plan, weight_plan.bytes_read(plan, structure.pairs, structure.pair_counts), parts


@pytest.mark.parametrize("case", cases.GPU, ids=str)
def test_the_weight_gradient_is_even_and_its_parts_are_small(case):
    for structure in (cases.structure_of(case, np.random.default_rng(seed)) for seed in range(2)):
        plan, read, parts = weights_of(case, structure)
        tiles = plan.tiles
        part = 4 * tiles.entries * tiles.channels * tiles.filters
        # A block has a few steps of the smallest, of which those at the border read less.
        few = case.batch == 128 and case.image[0] <= 4 or case.image == (2, 2)
        moved = read + parts / MULTIPROCESSORS
        assert moved.max() <= EVEN * moved.mean() + few * part
        # A part for each block and one for each item that is cut; at most 64 KB each.
        assert parts <= (plan.items + plan.blocks) * part and part <= 64 * 1024 and parts < 13e6


def test_what_the_weight_gradient_reads_is_counted_entry_by_entry():
    from pallas_kernels.pattern_conv.mosaic import weight_plan

    case = Case("c", (5, 4), 32, 128, 128, tile=(64, 64), removed=0.3, dtype="bfloat16", layout="HWNC")
    structure, geometry = cases.structure_of(case, np.random.default_rng(0)), case.geometry()
    tiles = config.WeightTiles(16, 64, 64, entries=4, least=1, stages=3)
    plan = launches.weight_plan(structure, geometry, case.batch, 7, tiles)
    read = np.zeros(7, int)
    items = [
        structure.pairs[index, first : first + 4]
        for index, count in enumerate(structure.pair_counts)
        for first in range(0, count, 4)
    ]
    for block, (begin, end) in enumerate(weight_plan.runs(plan, structure.pair_counts)):
        held = set()
        for step in range(begin, end):
            item, (_, row, column) = step // plan.steps, np.unravel_index(step % plan.steps, plan.grid)
            before, held = (held if column and step % plan.steps and step > begin else set()), set()
            read[block] += 2 * 16 * 64
            for code in map(int, items[item]):
                tap_row, tap_column = divmod(code % 9, 3)
                place = code // 9, row + tap_row - 1, column + tap_column - 1
                held.add(place)
                inside = 0 <= place[1] < 5 and 0 <= place[2] < 4
                read[block] += 2 * 16 * 64 * (inside and place not in before)
    np.testing.assert_array_equal(weight_plan.bytes_read(plan, structure.pairs, structure.pair_counts), read)


# Megabytes read and of parts before taps shared what they look at and warpgroups an item: at 2.25x and 8x.
BEFORE = {
    "vgg16-n128-8x8-256-256-2.25x": (101, 9.1),
    "vgg16-n128-8x8-256-256-8x": (25, 8.7),
    "vgg16-n512-8x8-256-256-2.25x": (336, 18.3),
    "vgg16-n512-8x8-256-256-8x": (84, 17.4),
    "resnet50-n128-14x14-256-256-2.25x": (257, 18.2),
    "resnet50-n128-14x14-256-256-8x": (64, 17.4),
}


@pytest.mark.parametrize("case", [case for case in cases.GPU if case.name in BEFORE], ids=str)
def test_the_weight_gradient_moves_at_most_two_thirds_of_what_it_did(case):
    _, read, parts = weights_of(case, cases.structure_of(case, np.random.default_rng(0)))
    before = BEFORE[case.name][0] + 2 * BEFORE[case.name][1]
    assert read.sum() + 2 * parts <= 2 / 3 * 1e6 * before


def test_the_weight_gradients_parts_of_the_layer_that_was_measured():
    (case,) = (case for case in cases.GPU if case.name == "vgg16-n128-8x8-256-256-8x")
    # 32 times the dense weights in float32 once: 75.5 MB, whatever was retained.
    assert weights_of(case, cases.structure_of(case, np.random.default_rng(0)))[2] < 5e6
