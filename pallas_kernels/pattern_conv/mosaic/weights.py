"""The kernels of the weight gradient.

For every retained (channel block, tap) of a filter tile: the product of the input's channels, at the pixels that the
tap points to, by the gradient of the output, summed over pixels and images on the tensor cores. Entries of one
filter tile are taken a few at a time, so that they share one reading of the output's gradient. All steps of all that
is retained are one long row, of which every computing warpgroup does a run, as long as the others'. Where a run ends
within an item its sum is a part; parts lie apart, and a second kernel adds them up in their order, and writes zeros
where nothing is retained.

What a tap points to outside the image is read as zeros: a pixel past the image's end (see `ring`).
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pattern_conv.config import WeightTiles
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.mosaic.ring import COPY_REGISTERS, compute_registers, digits, swizzle_of, swizzled

# Of the second kernel: rows of a tile that a block adds up at a time, parts in flight, blocks a multiprocessor.
_ROWS, _FLIGHT, _BESIDE = 16, 8, 4


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """The static facts of one launch.

    An item is a group of entries of one list, for a part of the tile's filters and of its channels.

    Attributes:
        geometry: of the convolution.
        tiles: how the work is cut.
        tile: (filters, channels) that share their taps.
        shape: (kh, kw, cin, cout).
        batch: images.
        lists: filter tiles.
        room: entries that a list has room for.
        blocks: thread blocks launched, one a multiprocessor.
    """

    geometry: Geometry
    tiles: WeightTiles
    tile: tuple[int, int]
    shape: tuple[int, int, int, int]
    batch: int
    lists: int
    room: int
    blocks: int

    @property
    def parts(self) -> tuple[int, int]:
        """(filter parts of a tile, channel parts of a tile)."""
        return self.tile[0] // self.tiles.filters, self.tile[1] // self.tiles.channels

    @property
    def items(self) -> int:
        """Items that there is room for."""
        return self.lists * -(-self.room // self.tiles.entries) * self.parts[0] * self.parts[1]

    @property
    def lanes(self) -> int:
        """Computing warpgroups of all blocks, lane = warpgroup * blocks + block: what is over goes to other blocks."""
        return self.blocks * self.tiles.warpgroups

    @property
    def slots(self) -> int:
        """Parts that there is room for: part = item + lane, so that no two are one."""
        return self.items + self.lanes

    @property
    def steps(self) -> int:
        """Steps of an item's whole sum: pixels of the output by blocks of images."""
        rows, columns = self.geometry.output
        return rows * columns * -(-self.batch // self.tiles.images)

    def total(self, groups):
        """Steps of so many groups."""
        return groups * self.parts[0] * self.parts[1] * self.steps

    def share(self, total):
        """(steps of a lane's run, how many of the first lanes do one more), of so many steps in all."""
        if isinstance(total, int):
            return divmod(total, max(1, min(total // self.tiles.least, self.lanes)))
        lanes = jnp.maximum(jnp.minimum(lax.div(total, self.tiles.least), self.lanes), 1)
        return lax.div(total, lanes), lax.rem(total, lanes)


def runs(plan: WeightPlan, counts: np.ndarray) -> list[tuple[int, int]]:
    """Of each lane the first of its steps, of all items' one after the other, and one past its last."""
    total = plan.total(int(sum(-(-int(count) // plan.tiles.entries) for count in counts)))
    share, more = plan.share(total)
    ends = [min(lane * share + min(lane, more), total) for lane in range(plan.lanes + 1)]
    return list(zip(ends, ends[1:]))


def bytes_of_parts(plan: WeightPlan, counts: np.ndarray) -> int:
    """What the parts that are written take, and read again by the second kernel."""
    number = sum((end - 1) // plan.steps - begin // plan.steps + 1 for begin, end in runs(plan, counts) if begin < end)
    return 4 * number * plan.tiles.entries * plan.tiles.filters * plan.tiles.channels


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
    slots = rings * tiles.stages
    transforms = swizzled(swizzle_of(tiles.images, tiles.channels, tiles.filters, *plan.shape[2:]), x.dtype)
    # Filters first where they are the rows of the product: registers are then stored as they lie.
    sums = (tiles.filters, tiles.channels) if tiles.filters_first else (tiles.channels, tiles.filters)
    elements = 32 if sums[1] % 32 == 0 else 16
    scratch = {
        "x_slots": plgpu.SMEM((slots, tiles.entries, tiles.images, tiles.channels), x.dtype, transforms=transforms),
        "dy_slots": plgpu.SMEM((slots, tiles.images, tiles.filters), x.dtype, transforms=transforms),
        "out": plgpu.SMEM((rings, *sums), jnp.float32, transforms=swizzled(elements, jnp.float32)),
        "full": plgpu.Barrier(num_arrivals=1 + tiles.entries, num_barriers=slots),
        "empty": plgpu.Barrier(num_arrivals=1, num_barriers=slots),
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


def added(parts: jax.Array, pairs: jax.Array, counts: jax.Array, plan: WeightPlan) -> jax.Array:
    """Add up the parts in the order of the lanes that they are of.

    Args:
        parts: of `partial_sums`.
        pairs, counts, plan: as given there.

    Returns:
        float32 (kh, kw, cin, cout), exact zeros where nothing is retained.
    """
    tiles, (kh, kw, cin, cout) = plan.tiles, plan.shape
    filter_parts, channel_parts = plan.parts
    first = tiles.filters_first
    rows, columns = (tiles.filters, tiles.channels) if first else (tiles.channels, tiles.filters)
    sides = (cout, cin) if first else (cin, cout)
    chunk = min(_ROWS, rows)
    grid = (kh, kw, -(-sides[0] // chunk), -(-sides[1] // columns))
    units = kh * kw * grid[2] * grid[3]
    blocks = min(units, _BESIDE * plan.blocks)

    def pattern_conv_weights_added(pairs_ref, counts_ref, parts_ref, out_ref, slots, out, full):
        share, more = plan.share(plan.total(_groups_before(plan, counts_ref, plan.lists)))

        def lane_of(step):
            # Lanes of one step more come first; where share is 0 there are no others.
            late = more + lax.div(step - more * (share + 1), jnp.maximum(share, 1))
            return jnp.where(step < more * (share + 1), lax.div(step, share + 1), late)

        @pl.loop(0, lax.div(units - lax.axis_index("block") + blocks - 1, blocks))
        def _(turn):
            tap_row, tap_column, row, column = digits(turn * blocks + lax.axis_index("block"), grid)
            row, column = row * chunk, column * columns
            filters, channels = (row, column) if first else (column, row)
            index, block = lax.div(filters, plan.tile[0]), lax.div(channels, plan.tile[1])
            count, code = counts_ref[index], (block * kh + tap_row) * kw + tap_column
            # Lists rise: where the code stands, or would stand.
            place = lax.fori_loop(
                0,
                plan.room.bit_length(),
                functools.partial(_halved, lambda place: pairs_ref[index, place] < code),
                (jnp.int32(0), count),
            )[0]
            is_there = (place < count) & (pairs_ref[index, jnp.minimum(place, plan.room - 1)] == code)
            group = _groups_before(plan, counts_ref, index) + lax.div(place, tiles.entries)
            filter_part = lax.div(lax.rem(filters, plan.tile[0]), tiles.filters)
            channel_part = lax.div(lax.rem(channels, plan.tile[1]), tiles.channels)
            item = (group * filter_parts + filter_part) * channel_parts + channel_part
            begin = lane_of(item * plan.steps)
            number = jnp.where(is_there, lane_of((item + 1) * plan.steps - 1) - begin + 1, 0)
            within = pl.ds(lax.rem(row, rows), chunk)

            def fetch(part):
                slot = lax.rem(part, _FLIGHT)
                source = parts_ref.at[item + begin + part, lax.rem(place, tiles.entries), within]
                plgpu.copy_gmem_to_smem(source, slots.at[slot], full.at[slot])

            @pl.loop(0, jnp.minimum(number, _FLIGHT))
            def _(part):
                fetch(part)

            def add(part, total):
                slot = lax.rem(part, _FLIGHT)
                plgpu.barrier_wait(full.at[slot])
                total = total + slots[slot]

                @pl.when(part + _FLIGHT < number)
                def _():
                    fetch(part + _FLIGHT)

                return total

            total = lax.fori_loop(0, number, add, jnp.zeros((chunk, columns), jnp.float32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = total
            plgpu.commit_smem()
            place_out = out_ref.at[tap_row, tap_column, pl.ds(row, chunk), pl.ds(column, columns)]
            plgpu.copy_smem_to_gmem(out, place_out)

        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        pattern_conv_weights_added,
        out_type=jax.ShapeDtypeStruct((kh, kw, *sides), jnp.float32),
        scratch_types=[
            plgpu.SMEM((_FLIGHT, chunk, columns), jnp.float32),
            plgpu.SMEM((chunk, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=_FLIGHT),
        ],
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    result = kernel(pairs, counts, parts)
    return jnp.swapaxes(result, 2, 3) if first else result


def _halved(is_before, _, ends):
    """One step of a search: the range in which the first place lies that is not before."""
    low, high = ends
    middle = lax.div(low + high, 2)
    before = (low < high) & is_before(jnp.minimum(middle, jnp.maximum(high - 1, 0)))
    return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)


def _groups_before(plan: WeightPlan, counts, index: jax.Array | int) -> jax.Array:
    """Groups of all lists before one."""

    def add(number, total):
        return total + lax.div(counts[number] + plan.tiles.entries - 1, plan.tiles.entries)

    return lax.fori_loop(0, index, add, jnp.int32(0))


def _run(plan: WeightPlan, counts, ring: jax.Array | int):
    """Of a lane: (lane, its first step of all, one past its last, its first item, how many items it works on)."""
    lane = ring * plan.blocks + lax.axis_index("block")
    total = plan.total(_groups_before(plan, counts, plan.lists))
    share, more = plan.share(total)
    begin, end = (jnp.minimum(each * share + jnp.minimum(each, more), total) for each in (lane, lane + 1))
    first = lax.div(begin, plan.steps)
    return lane, begin, end, first, jnp.where(begin < end, lax.div(end - 1, plan.steps) - first + 1, 0)


def _work(plan: WeightPlan, counts, run, turn: jax.Array):
    """Of a lane's turn: (item, list, filter part, channel part, first entry, first step, steps)."""
    _, begin, end, first, number = run
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
    return item, index, filter_part, channel_part, group * plan.tiles.entries, since, jnp.where(turn < number, steps, 0)


def _entry(plan: WeightPlan, pairs, index: jax.Array, number: jax.Array):
    """(channel block, tap row, tap column) of a list's entry."""
    kh, kw = plan.geometry.window
    code = pairs[index, jnp.minimum(number, plan.room - 1)]
    tap = lax.rem(code, kh * kw)
    return lax.div(code, kh * kw), lax.div(tap, kw), lax.rem(tap, kw)


def _copy(plan: WeightPlan, lists, x, dy, *, x_slots, dy_slots, out, full, empty) -> None:
    """The copying warpgroup: fills the rings in the order in which their slots come free."""
    tiles, (pairs, counts) = plan.tiles, lists
    (height, width), (_, columns) = plan.geometry.image, plan.geometry.output
    strides, ((top, _), (left, _)) = plan.geometry.strides, plan.geometry.padding
    image_blocks = -(-plan.batch // tiles.images)
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

    runs = [_run(plan, counts, ring) for ring in range(tiles.warpgroups)]

    def fill(ring: int, number: jax.Array, issued: jax.Array) -> jax.Array:
        _, index, filter_part, channel_part, first, begin, steps = _work(plan, counts, runs[ring], number)
        entries = [_entry(plan, pairs, index, first + e) for e in range(tiles.entries)]
        filters = pl.ds(index * plan.tile[0] + filter_part * tiles.filters, tiles.filters)

        @pl.loop(0, steps)
        def _(step):
            row, column, block = digits(begin + step, (1, columns, image_blocks))
            slot = ring * tiles.stages + lax.rem(issued + step, tiles.stages)
            images = pl.ds(block * tiles.images, tiles.images)

            @pl.when(issued + step >= tiles.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            plgpu.copy_gmem_to_smem(dy.at[row, column, images, filters], dy_slots.at[slot], full.at[slot])
            for number, (source, tap_row, tap_column) in enumerate(entries):
                there_row = row * strides[0] + tap_row - top
                there_column = column * strides[1] + tap_column - left
                inside = (there_row >= 0) & (there_row < height) & (there_column >= 0) & (there_column < width)
                channels = pl.ds(source * plan.tile[1] + channel_part * tiles.channels, tiles.channels)
                there_row, there_column = jnp.where(inside, there_row, height), jnp.where(inside, there_column, width)
                plgpu.copy_gmem_to_smem(
                    x.at[there_row, there_column, images, channels], x_slots.at[slot, number], full.at[slot]
                )

        return issued + steps

    def turn(number, issued):
        return tuple(fill(ring, number, issued[ring]) for ring in range(tiles.warpgroups))

    turns = functools.reduce(jnp.maximum, (run[-1] for run in runs))
    issued = lax.fori_loop(0, turns, turn, (jnp.int32(0),) * tiles.warpgroups)
    # Every slot's release is waited for, so that no barrier is left half way.
    for ring in range(tiles.warpgroups):

        @pl.loop(jnp.maximum(issued[ring] - tiles.stages, 0), issued[ring])
        def _(step, ring=ring):
            plgpu.barrier_wait(empty.at[ring * tiles.stages + lax.rem(step, tiles.stages)])


def _compute(plan: WeightPlan, lists, result, *, x_slots, dy_slots, out, full, empty) -> None:
    """A computing warpgroup: its lane's run, one item after the other."""
    tiles, counts = plan.tiles, lists[1]
    ring = lax.axis_index("warpgroup")
    plgpu.set_max_registers(compute_registers(tiles.warpgroups), action="increase")
    shape = (tiles.filters, tiles.channels) if tiles.filters_first else (tiles.channels, tiles.filters)

    def slot_of(step):
        return ring * tiles.stages + lax.rem(step, tiles.stages)

    def turn(number, used):
        item, index, _, _, first, _, steps = _work(plan, counts, run, number)

        def summed(*sums):
            def step(number, _):
                slot = slot_of(used + number)
                plgpu.barrier_wait(full.at[slot])
                for entry in range(tiles.entries):
                    inputs, gradients = x_slots.at[slot, entry], dy_slots.at[slot]
                    if tiles.filters_first:
                        plgpu.wgmma(sums[entry], gradients.transpose((1, 0)), inputs)
                    else:
                        plgpu.wgmma(sums[entry], inputs.transpose((1, 0)), gradients)
                # The products before these are done: their slot is free.
                plgpu.wgmma_wait(tiles.entries)

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(used + number - 1)])

            lax.fori_loop(0, steps, step, None)
            return [one[...] for one in sums]

        sums = pl.run_scoped(summed, *[plgpu.ACC(shape, jnp.float32)] * tiles.entries)

        plgpu.barrier_arrive(empty.at[slot_of(used + steps - 1)])

        for entry in range(tiles.entries):
            # What was written before has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[ring] = sums[entry]
            plgpu.commit_smem()

            @pl.when(first + entry < counts[index])
            def _(entry=entry):
                plgpu.copy_smem_to_gmem(out.at[ring], result.at[item + run[0], entry])

        return used + steps

    run = _run(plan, counts, ring)
    lax.fori_loop(0, run[-1], turn, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
