"""The kernel of the weight gradient.

For every retained (channel block, tap) of a filter tile: the product of the input's channels, at the pixels that the
tap points to, by the gradient of the output, summed over pixels and images on the tensor cores. Entries of one
filter tile are taken a few at a time, so that they share one reading of the output's gradient. The sum is cut into
parts, each a block of work of its own, whose results lie apart and are added up after.

What a tap points to outside the image is read as zeros: a pixel past the image's end (see `ring`).
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pattern_conv.config import WeightTiles
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.mosaic.ring import COPY_REGISTERS, compute_registers, digits, swizzle_of, swizzled


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """The static facts of one launch.

    Attributes:
        geometry: of the convolution.
        tiles: how the work is cut.
        tile: (filters, channels) that share their taps.
        shape: (kh, kw, cin, cout).
        batch: images.
        lists: filter tiles.
        room: entries that a list has room for.
        blocks: thread blocks launched.
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
    def grid(self) -> tuple[int, int, int, int, int]:
        """(splits, lists, filter parts of a tile, channel parts of a tile, groups of entries)."""
        tiles, (filters, channels) = self.tiles, self.tile
        groups = -(-self.room // tiles.entries)
        # Fewer splits than asked for where the last ones would be empty.
        splits = -(-self.steps // self.length)
        return splits, self.lists, filters // tiles.filters, channels // tiles.channels, groups

    @property
    def items(self) -> int:
        """Blocks of work in all."""
        splits, lists, filters, channels, groups = self.grid
        return splits * lists * filters * channels * groups

    @property
    def steps(self) -> int:
        """Steps of the whole sum: pixels of the output by blocks of images."""
        rows, columns = self.geometry.output
        return rows * columns * -(-self.batch // self.tiles.images)

    @property
    def length(self) -> int:
        """Steps of one split; the last may have fewer."""
        return -(-self.steps // self.tiles.splits)


def partial_sums(x: jax.Array, dy: jax.Array, pairs: jax.Array, counts: jax.Array, plan: WeightPlan) -> jax.Array:
    """Sum products of input and output gradient where something is retained.

    Args:
        x: (rows, columns, batch, cin).
        dy: (output rows, output columns, batch, cout) of x's dtype.
        pairs: int32 (lists, room) of block * kh * kw + tap.
        counts: int32 (lists,).
        plan: the static facts.

    Returns:
        float32 (splits, kh, kw, cin, cout), whose sum over the first axis is the gradient where something is
        retained. The rest is not written: it holds anything.
    """
    tiles = plan.tiles
    rings = tiles.warpgroups
    slots = rings * tiles.stages
    transforms = swizzled(swizzle_of(tiles.images, tiles.channels, tiles.filters, *plan.shape[2:]), x.dtype)
    # Filters first where they are the rows of the product: registers are then stored as they lie.
    kernel_axes = plan.shape[:1:-1] if tiles.filters_first else plan.shape[2:]
    sums = (tiles.filters, tiles.channels) if tiles.filters_first else (tiles.channels, tiles.filters)
    elements = 32 if sums[1] % 32 == kernel_axes[1] % 32 == 0 else 16
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
        out_type=jax.ShapeDtypeStruct((plan.grid[0], *plan.shape[:2], *kernel_axes), jnp.float32),
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=rings + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    parts = kernel(pairs, counts, x, dy)
    return jnp.swapaxes(parts, 3, 4) if tiles.filters_first else parts


def _work(plan: WeightPlan, counts, turn: jax.Array, ring: jax.Array | int):
    """Of a ring's work in a turn: (list, filter part, channel part, first entry, first step, steps)."""
    tiles = plan.tiles
    item = (turn * tiles.warpgroups + ring) * plan.blocks + lax.axis_index("block")
    split, index, filter_part, channel_part, group = digits(item, plan.grid)
    first = group * tiles.entries
    begin = split * plan.length
    steps = jnp.minimum(plan.length, plan.steps - begin)
    # A list shorter than its room, or past the last item: nothing to do, and nothing is written.
    there = (item < plan.items) & (first < counts[index])
    return index, filter_part, channel_part, first, begin, jnp.where(there, steps, 0)


def _entry(plan: WeightPlan, pairs, index: jax.Array, number: jax.Array):
    """(channel block, tap row, tap column) of a list's entry."""
    kh, kw = plan.geometry.window
    code = pairs[index, jnp.minimum(number, plan.room - 1)]
    tap = lax.rem(code, kh * kw)
    return lax.div(code, kh * kw), lax.div(tap, kw), lax.rem(tap, kw)


def _rounds(plan: WeightPlan) -> int:
    return -(-plan.items // (plan.blocks * plan.tiles.warpgroups))


def _copy(plan: WeightPlan, lists, x, dy, *, x_slots, dy_slots, out, full, empty) -> None:
    """The copying warpgroup: fills the rings in the order in which their slots come free."""
    tiles, (pairs, counts) = plan.tiles, lists
    (height, width), (_, columns) = plan.geometry.image, plan.geometry.output
    strides, ((top, _), (left, _)) = plan.geometry.strides, plan.geometry.padding
    image_blocks = -(-plan.batch // tiles.images)
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

    def fill(ring: int, number: jax.Array, issued: jax.Array) -> jax.Array:
        index, filter_part, channel_part, first, begin, steps = _work(plan, counts, number, ring)
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

    issued = lax.fori_loop(0, _rounds(plan), turn, (jnp.int32(0),) * tiles.warpgroups)
    # Every slot's release is waited for, so that no barrier is left half way.
    for ring in range(tiles.warpgroups):

        @pl.loop(jnp.maximum(issued[ring] - tiles.stages, 0), issued[ring])
        def _(step, ring=ring):
            plgpu.barrier_wait(empty.at[ring * tiles.stages + lax.rem(step, tiles.stages)])


def _compute(plan: WeightPlan, lists, result, *, x_slots, dy_slots, out, full, empty) -> None:
    """A computing warpgroup: its ring's steps, one block of work after the other."""
    tiles, (pairs, counts) = plan.tiles, lists
    ring = lax.axis_index("warpgroup")
    plgpu.set_max_registers(compute_registers(tiles.warpgroups), action="increase")
    shape = (tiles.filters, tiles.channels) if tiles.filters_first else (tiles.channels, tiles.filters)

    def slot_of(step):
        return ring * tiles.stages + lax.rem(step, tiles.stages)

    def turn(number, used):
        index, filter_part, channel_part, first, begin, steps = _work(plan, counts, number, ring)

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

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(empty.at[slot_of(used + steps - 1)])

        filters = pl.ds(index * plan.tile[0] + filter_part * tiles.filters, tiles.filters)
        for entry in range(tiles.entries):
            block, tap_row, tap_column = _entry(plan, pairs, index, first + entry)
            channels = pl.ds(block * plan.tile[1] + channel_part * tiles.channels, tiles.channels)
            # What was written before has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[ring] = sums[entry]
            plgpu.commit_smem()
            axes = (filters, channels) if tiles.filters_first else (channels, filters)
            place = result.at[lax.div(begin, plan.length), tap_row, tap_column, *axes]

            @pl.when((steps > 0) & (first + entry < counts[index]))
            def _(place=place):
                plgpu.copy_smem_to_gmem(out.at[ring], place)

        return used + steps

    lax.fori_loop(0, _rounds(plan), turn, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
