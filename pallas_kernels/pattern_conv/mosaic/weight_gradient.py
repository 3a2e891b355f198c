"""The kernel of the weight gradient.

For every retained (channel block, tap) of a filter tile: the product of the input's channels, at the pixels that the
tap points to, by the gradient of the output, summed over pixels and images on the tensor cores. Entries of one
filter tile are taken a few at a time, a few by each computing warpgroup, so that they share one reading of the
output's gradient. Steps go along the rows of the image: where two entries are taps beside each other, one looks at
what the other read one step before, and reads nothing itself.

All steps of all that is retained are one long row, of which every block does a run, as long as the others'. Where a
run ends within an item its sum is a part; parts lie apart, and a second kernel (`added`) sums them up in their order.

What a tap points to outside the image is read as zeros: a pixel past the image's end (see `ring`).
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pattern_conv.mosaic.ring import MANY_COPY_REGISTERS, compute_registers, digits, swizzle_of, swizzled
from pallas_kernels.pattern_conv.mosaic.weight_plan import WeightPlan, groups_before


def partial_sums(x: jax.Array, dy: jax.Array, pairs: jax.Array, counts: jax.Array, plan: WeightPlan) -> jax.Array:
    """Sum products of input and output gradient where something is retained.

    Args:
        x: (rows, columns, batch, cin).
        dy: (output rows, output columns, batch, cout) of x's dtype.
        pairs: int32 (lists, room) of block * kh * kw + tap.
        counts: int32 (lists,).
        plan: the static facts.

    Returns:
        float32 (slots, entries, channels, filters) of a part, or with filters before channels where they are the rows
        of the product. What is no part is not written: it holds anything.
    """
    tiles = plan.tiles
    rings = tiles.warpgroups
    transforms = swizzled(swizzle_of(tiles.images, tiles.channels, tiles.filters, *plan.shape[2:]), x.dtype)
    # Filters first where they are the rows of the product: registers are then stored as they lie.
    sums = (tiles.filters, tiles.channels) if tiles.filters_first else (tiles.channels, tiles.filters)
    elements = 32 if sums[1] % 32 == 0 else 16
    scratch = {
        "x_slots": plgpu.SMEM(
            (tiles.stages, tiles.entries, tiles.images, tiles.channels), x.dtype, transforms=transforms
        ),
        "dy_slots": plgpu.SMEM((tiles.stages, tiles.images, tiles.filters), x.dtype, transforms=transforms),
        "out": plgpu.SMEM((rings, *sums), jnp.float32, transforms=swizzled(elements, jnp.float32)),
        "full": plgpu.Barrier(num_arrivals=1 + tiles.entries, num_barriers=tiles.stages),
        "empty": plgpu.Barrier(num_arrivals=rings, num_barriers=tiles.stages),
    }

    def pattern_conv_weights(pairs_ref, counts_ref, x_ref, dy_ref, out_ref, **allocated):
        lists = (pairs_ref, counts_ref)
        lax.cond(
            lax.axis_index("warpgroup") < rings,
            lambda: _compute(plan, lists, out_ref, **allocated),
            lambda: _copy(plan, lists, x_ref, dy_ref, **allocated),
        )

    kernel = plgpu.kernel(
        pattern_conv_weights,
        out_type=jax.ShapeDtypeStruct((plan.slots, tiles.entries, *sums), jnp.float32),
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=rings + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(pairs, counts, x, dy)


def _run(plan: WeightPlan, counts):
    """Of a block: (its first step of all, one past its last, its first item, how many items it works on)."""
    block = lax.axis_index("block")
    total = plan.total(groups_before(plan, counts, plan.lists))
    share, more = plan.share(total)
    begin, end = (jnp.minimum(each * share + jnp.minimum(each, more), total) for each in (block, block + 1))
    first = lax.div(begin, plan.steps)
    return begin, end, first, jnp.where(begin < end, lax.div(end - 1, plan.steps) - first + 1, 0)


def _work(plan: WeightPlan, counts, run, turn: jax.Array):
    """Of a block's turn: (item, list, filter part, channel part, first entry, first step, steps)."""
    begin, end, first, _ = run
    item = first + turn
    group, filter_part, channel_part = digits(item, (1, *plan.parts))

    def find(number, found):
        index, group = found
        groups = lax.div(counts[number] + plan.tiles.entries - 1, plan.tiles.entries)
        passed = (index == number) & (group >= groups) & (number < plan.lists - 1)
        return jnp.where(passed, number + 1, index), jnp.where(passed, group - groups, group)

    index, group = lax.fori_loop(0, plan.lists, find, (jnp.int32(0), group))
    since = jnp.maximum(begin - item * plan.steps, 0)
    steps = jnp.minimum(end - item * plan.steps, plan.steps) - since
    return item, index, filter_part, channel_part, group * plan.tiles.entries, since, steps


def _code(plan: WeightPlan, lists, index: jax.Array, number: jax.Array) -> jax.Array:
    """A list's entry as it stands there; -1 past the list's end."""
    pairs, counts = lists
    return jnp.where(number < counts[index], pairs[index, jnp.minimum(number, plan.room - 1)], -1)


def _copy(plan: WeightPlan, lists, x, dy, *, x_slots, dy_slots, out, full, empty) -> None:
    """The copying warpgroup: fills the slots in the order in which they come free."""
    tiles = plan.tiles
    (height, width), (kh, kw) = plan.geometry.image, plan.geometry.window
    strides, (top, left) = plan.geometry.strides, (before for before, _ in plan.geometry.padding)
    plgpu.set_max_registers(MANY_COPY_REGISTERS, action="decrease")
    run = _run(plan, lists[1])

    def turn(number, issued):
        _, index, filter_part, channel_part, first, begin, steps = _work(plan, lists[1], run, number)
        codes = [_code(plan, lists, index, first + entry) for entry in range(tiles.entries)]
        follows = [plan.follows(codes, code)[0] if plan.back else False for code in codes]
        filters = pl.ds(index * plan.tile[0] + filter_part * tiles.filters, tiles.filters)

        @pl.loop(0, steps)
        def _(step):
            block, row, column = digits(begin + step, plan.grid)
            slot = lax.rem(issued + step, tiles.stages)
            images = pl.ds(block * tiles.images, tiles.images)
            fresh = (step == 0) | (column == 0)

            @pl.when(issued + step >= tiles.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            plgpu.copy_gmem_to_smem(dy.at[row, column, images, filters], dy_slots.at[slot], full.at[slot])
            for entry, code in enumerate(codes):
                reads = (code >= 0) & (fresh | jnp.logical_not(follows[entry]))

                @pl.when(reads)
                def _(entry=entry, code=code):
                    tap = lax.rem(code, kh * kw)
                    there_row = row * strides[0] + lax.div(tap, kw) - top
                    there_column = column * strides[1] + lax.rem(tap, kw) - left
                    inside = (there_row >= 0) & (there_row < height) & (there_column >= 0) & (there_column < width)
                    there_row, there_column = (
                        jnp.where(inside, place, end) for place, end in ((there_row, height), (there_column, width))
                    )
                    channels = lax.div(code, kh * kw) * plan.tile[1] + channel_part * tiles.channels
                    source = x.at[there_row, there_column, images, pl.ds(channels, tiles.channels)]
                    plgpu.copy_gmem_to_smem(source, x_slots.at[slot, entry], full.at[slot])

                @pl.when(jnp.logical_not(reads))
                def _():
                    plgpu.barrier_arrive(full.at[slot])

        return issued + steps

    issued = lax.fori_loop(0, run[-1], turn, jnp.int32(0))

    # Every slot's release is waited for, so that no barrier is left half way.
    @pl.loop(jnp.maximum(issued - tiles.stages, 0), issued)
    def _(step):
        plgpu.barrier_wait(empty.at[lax.rem(step, tiles.stages)])


def _compute(plan: WeightPlan, lists, result, *, x_slots, dy_slots, out, full, empty) -> None:
    """A computing warpgroup: its entries of the block's run, one item after the other."""
    tiles, columns = plan.tiles, plan.grid[-1]
    ring = lax.axis_index("warpgroup")
    plgpu.set_max_registers(compute_registers(tiles.warpgroups, MANY_COPY_REGISTERS), action="increase")
    shape = (tiles.filters, tiles.channels) if tiles.filters_first else (tiles.channels, tiles.filters)
    mine = [ring * (tiles.entries // tiles.warpgroups) + k for k in range(tiles.entries // tiles.warpgroups)]
    run = _run(plan, lists[1])

    def slot_of(step):
        return lax.rem(step, tiles.stages)

    def turn(number, used):
        item, index, *_parts, first, begin, steps = _work(plan, lists[1], run, number)
        codes = [_code(plan, lists, index, first + entry) for entry in range(tiles.entries)]
        looks = [plan.follows(codes, _code(plan, lists, index, first + entry)) for entry in mine]

        def place(entry, look, slot, step):
            """Where an entry's input lies: (slot, number in it)."""
            if not plan.back:
                return slot, entry
            fresh = (step == 0) | (lax.rem(begin + step, columns) == 0)
            back = look[0] & jnp.logical_not(fresh)
            before = jnp.where(slot == 0, tiles.stages - 1, slot - 1)
            return jnp.where(back, before, slot), jnp.where(back, look[1], entry)

        def summed(*sums):
            def step(number, _):
                slot = slot_of(used + number)
                plgpu.barrier_wait(full.at[slot])
                gradients = dy_slots.at[slot]
                for one, entry, look in zip(sums, mine, looks):
                    inputs = x_slots.at[place(entry, look, slot, number)]
                    if tiles.filters_first:
                        plgpu.wgmma(one, gradients.transpose((1, 0)), inputs)
                    else:
                        plgpu.wgmma(one, inputs.transpose((1, 0)), gradients)
                # The products before these are done: what no other step looks at is free.
                plgpu.wgmma_wait(len(mine))

                @pl.when(number > plan.back)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(used + number - 1 - plan.back)])

            lax.fori_loop(0, steps, step, None)
            return [one[...] for one in sums]

        sums = pl.run_scoped(summed, *[plgpu.ACC(shape, jnp.float32)] * len(mine))

        @pl.loop(jnp.maximum(steps - 1 - plan.back, 0), steps)
        def _(step):
            plgpu.barrier_arrive(empty.at[slot_of(used + step)])

        for one, entry in zip(sums, mine):
            # What was written before has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[ring] = one
            plgpu.commit_smem()

            @pl.when(first + entry < lists[1][index])
            def _(entry=entry):
                plgpu.copy_smem_to_gmem(out.at[ring], result.at[item + lax.axis_index("block"), entry])

        return used + steps

    lax.fori_loop(0, run[-1], turn, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
