"""Worklists of the Hopper kernels: every output tile once, and every multiprocessor as much as any other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
import pallas_kernels as pk
from pallas_kernels import compat
from pallas_kernels.pattern_conv import cases, config, mosaic_gpu, schedule
from pallas_kernels.pattern_conv.cases import Case
from pallas_kernels.pattern_conv.structure import make_structure, mask_of

pytestmark = pytest.mark.skipif(not compat.HAS_MOSAIC_GPU, reason=compat.MOSAIC_GPU_NEEDS)

MULTIPROCESSORS = 132
# Busiest over mean multiprocessor: by what it moves; by its products alone, of which few lists are few different lots.
EVEN, EVEN_PRODUCTS = 1.15, 1.18
# Of layers with four pixels, whose batch of 128 cannot be cut any finer.
EVEN_TINY = 1.2


def launch(case, structure, transposed, tiles=None):
    """(plan, lists) of a direction."""
    plan = mosaic_gpu.product_plan(structure, case.geometry(), case.batch, transposed, MULTIPROCESSORS, tiles)
    if transposed:
        return plan, (structure.pairs_by_channel, structure.pair_counts_by_channel)
    return plan, (structure.pairs, structure.pair_counts)


def unevenness(work, lists):
    """Busiest over mean multiprocessor, by (what it moves, its products)."""
    cost = schedule.costs(work.plan, *lists)
    found = []
    for each in (cost, cost - work.plan.cost_of_tile):
        loads = schedule.loads(work, each, MULTIPROCESSORS)
        found.append(loads.max() / max(loads.mean(), 1e-9) if loads.any() else 1.0)
    return found


def selection(case, seed, reduction=8.0, **options):
    """The structure of a mask that a plan selects, in blocks; a few filters and channels matter more than others."""
    rng = np.random.default_rng(seed)
    matters = [np.exp(rng.standard_normal((1, 1, *side))) for side in ((case.cin, 1), (1, case.cout))]
    scores = {"kernel": jnp.asarray(rng.chisquare(1, case.w_shape) * matters[0] * matters[1], jnp.float32)}
    plan = ct.make_plan(scores, {"kernel": cases.removed_for(reduction)}, tile=case.tile, groups={"kernel": 1}, **options)
    masks = ct.select_masks(scores, plan, ct.patterns.fixed_set(4))
    return make_structure(np.asarray(masks.pattern["kernel"] & masks.kernel["kernel"]), tile=case.tile)


@pytest.mark.parametrize("case", cases.GPU, ids=str)
def test_every_multiprocessor_has_as_much_to_do(case):
    for seed, transposed in itertools.product(range(2), (False, True)):
        plan, lists = launch(case, cases.structure_of(case, np.random.default_rng(seed)), transposed)
        moved, products = unevenness(schedule.work_of(plan, *lists), lists)
        assert moved <= EVEN and products <= EVEN_PRODUCTS


# Layers of one or two blocks have none to spare at 8x.
@pytest.mark.parametrize("case", [case for case in cases.vgg16(128) + cases.vgg16(512) if case.cin > 64], ids=str)
def test_so_it_has_of_real_selections(case):
    for transposed in (False, True):
        plan, lists = launch(case, selection(case, seed=0), transposed)
        assert unevenness(schedule.work_of(plan, *lists), lists)[0] <= (EVEN_TINY if case.image == (2, 2) else EVEN)


def test_the_cost_of_an_output_tile_is_what_it_moves():
    case = Case("c", (4, 5), 16, 128, 192, strides=(2, 1), tile=(64, 64), removed=0.3, dtype="bfloat16", layout="HWNC")
    structure, geometry = cases.structure_of(case, np.random.default_rng(0)), case.geometry()
    kept = mask_of(structure)[:, :, ::64, ::64]
    for transposed in (False, True):
        plan, lists = launch(case, structure, transposed, config.ProductTiles(8, 64))
        cost = schedule.costs(plan, *lists).reshape(plan.grid)
        np.testing.assert_array_equal(cost, schedule.costs(plan, *map(jnp.asarray, lists), jnp).reshape(plan.grid))
        entries = np.zeros(plan.grid[1:], int)
        for row, column, i, j in np.ndindex(*geometry.output, *geometry.window):
            there = (row * 2 + i - geometry.padding[0][0], column + j - geometry.padding[1][0])
            if 0 <= there[0] < 4 and 0 <= there[1] < 5:
                if transposed:
                    entries[there] += kept[i, j].sum(axis=1)
                else:
                    entries[row, column] += kept[i, j].sum(axis=0)
        # 8 images and 64 outputs by 64 channels an entry, and the tile itself, rounded to units of 1024.
        np.testing.assert_array_equal(cost, np.broadcast_to(1 + entries * (72 * 64 // 1024), plan.grid))


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
        assert unevenness(work, lists)[0] <= 1.6


def sorts(function, *arguments):
    return " sort[" in str(jax.make_jaxpr(function)(*arguments))


def test_a_scheduled_structure_is_not_sorted_in_the_program():
    case = Case("c", (4, 4), 16, 128, 128, tile=(64, 64), removed=0.3, dtype="bfloat16", layout="HWNC")
    structure = cases.structure_of(case, np.random.default_rng(0))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (case.x_shape, case.w_shape)]

    def gradients(x, w, structure):
        convolve = lambda x, w: pk.pattern_conv(x, w, structure, layout="HWNC", backend="mosaic_gpu")  # noqa: E731
        y, transposed = jax.vjp(convolve, x, w)
        return transposed(y)

    scheduled = pk.scheduled(structure, case.x_shape, multiprocessors=MULTIPROCESSORS)
    with compat.traced_for("NVIDIA H200", MULTIPROCESSORS):
        assert sorts(gradients, *shapes, structure)
        assert not sorts(gradients, *shapes, scheduled)
        # For another batch it is, until it is scheduled for that too.
        other = jax.ShapeDtypeStruct((4, 4, 32, 128), jnp.bfloat16)
        assert sorts(gradients, other, shapes[1], scheduled)
        both = pk.scheduled(scheduled, other.shape, multiprocessors=MULTIPROCESSORS)
        assert not sorts(gradients, other, shapes[1], both) and not sorts(gradients, *shapes, both)
    again = cases.structure_of(case, np.random.default_rng(1))
    again = pk.scheduled(again, case.x_shape, multiprocessors=MULTIPROCESSORS)
    assert jax.tree.structure(again.work) == jax.tree.structure(scheduled.work)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(each.work)] for each in (again, scheduled)]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_scheduled_is_refused():
    structure = make_structure(np.ones((3, 3, 64, 64), bool), tile=(64, 64))
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        pk.scheduled(structure, (4, 4, 12, 64))
    with pytest.raises(ValueError, match="outside of jax.jit"):
        jax.jit(lambda structure: pk.scheduled(structure, (4, 4, 16, 64)))(structure)


def weights_of(case, structure):
    """(plan, steps of each multiprocessor, bytes of parts) of the weight gradient."""
    from pallas_kernels.pattern_conv.mosaic import weight_plan as weights

    plan = mosaic_gpu.weight_plan(structure, case.geometry(), case.batch, MULTIPROCESSORS)
    runs = weights.runs(plan, structure.pair_counts)
    assert runs[0][0] == 0 and all(end == begin for (_, end), (begin, _) in itertools.pairwise(runs))
    groups = sum(-(-int(count) // plan.tiles.entries) for count in structure.pair_counts)
    assert runs[-1][1] == plan.total(groups)
    steps = np.reshape([end - begin for begin, end in runs], (-1, MULTIPROCESSORS)).sum(axis=0)
    return plan, steps, weights.bytes_of_parts(plan, structure.pair_counts)


@pytest.mark.parametrize("case", cases.GPU, ids=str)
def test_the_weight_gradient_is_even_and_its_parts_are_small(case):
    for structure in (cases.structure_of(case, np.random.default_rng(seed)) for seed in range(2)):
        plan, steps, parts = weights_of(case, structure)
        # The smallest has a step and a half a warpgroup.
        assert not steps.any() or steps.max() / steps.mean() <= (1.4 if "n128-2x2" in case.name else EVEN)
        # Two warpgroups a multiprocessor, each a part of its last item's sum; at most 64 KB a part.
        assert parts <= (plan.items + plan.lanes) * 64 * 1024 and parts < 22e6


def test_the_weight_gradients_parts_of_the_layer_that_was_measured():
    (case,) = (case for case in cases.GPU if case.name == "vgg16-n128-8x8-256-256-8x")
    # 32 times the dense weights in float32 before: 75.5 MB, whatever was retained.
    assert weights_of(case, cases.structure_of(case, np.random.default_rng(0)))[2] < 9e6
