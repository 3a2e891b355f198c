"""The kernel of the forward pass and the input gradient at stride 1 that reads each input pixel fewer times.

An output tile is a strip of pixels of one row, by a number of images, by output channels that share a list. The taps
of one row of the window look at the same row of the input: it is read once for all of them, a strip and a little
more, and each tap multiplies a shifted part of it. Rows of the window outside the image are passed over; columns
outside are read as zeros, from a pixel past the image's end (see `ring`).

For the rest it is `products`: one warpgroup copies, the others each work off rings of their own.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pattern_conv.config import StripTiles
from pallas_kernels.pattern_conv.mosaic.products import Plan, lane_of
from pallas_kernels.pattern_conv.mosaic.ring import MANY_COPY_REGISTERS, compute_registers, digits, swizzle_of, swizzled
from pallas_kernels.pattern_conv.schedule import Work


@dataclasses.dataclass(frozen=True)
class StripPlan(Plan):
    """`products.Plan` with a strip of pixels in place of one."""

    tiles: StripTiles

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(image blocks, rows, strips of a row, channel tiles): the last runs fastest."""
        rows, columns = self.size
        tiles = self.tiles
        return -(-self.batch // tiles.images), rows, -(-columns // tiles.pixels), -(-self.outputs // tiles.outputs)

    @property
    def items(self) -> int:
        """Output tiles in all."""
        images, rows, strips, channels = self.grid
        return images * rows * strips * channels

    @property
    def parts(self) -> int:
        """Parts that the channels of an entry are cut into."""
        return self.depth_tile // self.tiles.depth

    @property
    def read(self) -> int:
        """Pixels of an input row that a strip may look at."""
        return self.tiles.pixels + self.geometry.window[1] - 1

    @property
    def inside(self) -> np.ndarray:
        """bool (rows * strips, kh * kw): whether a tap is multiplied there; columns outside are, as zeros."""
        rows = self.geometry.reached(0, self.transposed)
        columns = np.ones((self.grid[2], self.geometry.window[1]), bool)
        return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, rows.shape[1] * columns.shape[1])

    def read_by_entries(self, pairs):
        """int32 (lists, room): the numbers that each entry of a list reads for one strip.

        The first of a row of the window reads the strip, and each that follows the columns that it looks further;
        those lie outside of the image where the strip is as long as a row.
        """
        tiles, kw, width = self.tiles, self.geometry.window[1], self.source_size[1]
        further = pairs[:, 1:] - pairs[:, :-1]
        follows = pairs[:, 1:] // kw == pairs[:, :-1] // kw
        more = further if tiles.pixels < width else 0 * further
        pixels = follows * more + ~follows * min(tiles.pixels, width)
        first = pairs[:, :1] * 0 + min(tiles.pixels, width)
        xp = np if isinstance(pairs, np.ndarray) else jnp
        return (xp.concatenate([first, pixels], axis=1) * tiles.images + tiles.outputs) * self.depth_tile

    @property
    def written(self) -> int:
        """The numbers that are written of one strip."""
        return self.tiles.pixels * self.tiles.images * self.tiles.outputs

    def offset(self, axis: int, tap: jax.Array) -> jax.Array:
        """How far a tap looks from the first input row or column that any tap of the tile looks at."""
        return self.geometry.window[axis] - 1 - tap if self.transposed else tap

    def first(self, axis: int, place: jax.Array) -> jax.Array:
        """The first input row or column that any tap looks at."""
        before = self.geometry.padding[axis][0]
        return place - (self.geometry.window[axis] - 1 - before if self.transposed else before)


def strips(
    x: jax.Array, w: jax.Array, pairs: jax.Array, counts: jax.Array, work: Work, scale=None, bias=None, relu=False
) -> jax.Array:
    """Sum what is retained; arguments and result as of `products.products`, strides 1."""
    plan, tiles = work.plan, work.plan.tiles
    rings = tiles.warpgroups
    transforms = swizzled(swizzle_of(tiles.depth, tiles.outputs, *w.shape[2:]), x.dtype)
    w_slot = (tiles.outputs, tiles.depth) if plan.transposed else (tiles.depth, tiles.outputs)
    scratch = {
        "x_slots": plgpu.SMEM(
            (rings * tiles.x_stages, plan.read * tiles.images, tiles.depth), x.dtype, transforms=transforms
        ),
        "w_slots": plgpu.SMEM((rings * tiles.w_stages, *w_slot), x.dtype, transforms=transforms),
        "out": plgpu.SMEM((2 * rings, tiles.images, tiles.outputs), x.dtype, transforms=transforms),
        "x_full": plgpu.Barrier(num_arrivals=plan.read, num_barriers=rings * tiles.x_stages),
        "x_empty": plgpu.Barrier(num_arrivals=1, num_barriers=rings * tiles.x_stages),
        "w_full": plgpu.Barrier(num_arrivals=1, num_barriers=rings * tiles.w_stages),
        "w_empty": plgpu.Barrier(num_arrivals=1, num_barriers=rings * tiles.w_stages),
    }
    vectors = [vector for vector in (scale, bias) if vector is not None]

    def pattern_conv_strips(pairs_ref, counts_ref, order_ref, starts_ref, x_ref, w_ref, *refs, **allocated):
        vector_refs, y_ref = list(refs[:-1]), refs[-1]
        scale_ref = vector_refs.pop(0) if scale is not None else None
        bias_ref = vector_refs.pop(0) if bias is not None else None
        lists = (pairs_ref, counts_ref, order_ref, starts_ref)
        lax.cond(
            lax.axis_index("warpgroup") < rings,
            lambda: _compute(plan, lists, y_ref, scale_ref, bias_ref, relu, **allocated),
            lambda: _copy(plan, lists, x_ref, w_ref, **allocated),
        )

    kernel = plgpu.kernel(
        pattern_conv_strips,
        out_type=jax.ShapeDtypeStruct((*plan.size, plan.batch, plan.outputs), x.dtype),
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=rings + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(pairs, counts, work.order, work.starts, x, w, *vectors)


def _place(plan: StripPlan, item: jax.Array):
    """(image block, row, first column, channel tile, list) of an output tile."""
    block, row, strip, channel_tile = digits(item, plan.grid)
    index = lax.div(channel_tile, plan.output_tile // plan.tiles.outputs)
    return block, row, strip * plan.tiles.pixels, channel_tile, index


def _unit(plan: StripPlan, pairs, index: jax.Array, count: jax.Array, k: jax.Array, row: jax.Array):
    """Of the list's k-th entry: (its code, the row that it reads, the taps of the unit it begins, 0 if it begins none).

    A unit is what a filter tile retains of one row of a channel block's window: entries that follow each other.
    """
    kh, kw = plan.geometry.window
    code = pairs[index, k]
    begins = (k == 0) | (lax.div(pairs[index, jnp.maximum(k - 1, 0)], kw) != lax.div(code, kw))
    there = plan.first(0, row) + plan.offset(0, lax.rem(lax.div(code, kw), kh))
    taps = jnp.int32(1)
    for ahead in range(1, kw):
        other = pairs[index, jnp.minimum(k + ahead, count - 1)]
        taps += ((k + ahead < count) & (lax.div(other, kw) == lax.div(code, kw))).astype(jnp.int32)
    inside = begins & (there >= 0) & (there < plan.source_size[0])
    return code, there, jnp.where(inside, taps, 0)


def _copy(plan: StripPlan, lists, x, w, *, x_slots, w_slots, out, x_full, x_empty, w_full, w_empty) -> None:
    """The copying warpgroup: fills the rings in the order in which their slots come free."""
    tiles, (pairs, counts, order, starts) = plan.tiles, lists
    kh, kw = plan.geometry.window
    height, width = plan.source_size
    plgpu.set_max_registers(MANY_COPY_REGISTERS, action="decrease")

    def slot_of(ring, step, stages, empty):
        slot = ring * stages + lax.rem(step, stages)

        @pl.when(step >= stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        return slot

    lanes = [lane_of(plan, starts, ring) for ring in range(tiles.warpgroups)]

    def fill(ring: int, turn: jax.Array, issued):
        begin, end = lanes[ring]
        there = begin + turn < end
        block, row, column, channel_tile, index = _place(plan, order[jnp.where(there, begin + turn, 0)])
        count = jnp.where(there, counts[index], 0)
        images = pl.ds(block * tiles.images, tiles.images)
        kept = pl.ds(channel_tile * tiles.outputs, tiles.outputs)

        def entry(k, issued):
            x_issued, w_issued = issued
            code, there, taps = _unit(plan, pairs, index, count, k, row)
            source = lax.div(code, kh * kw)
            tap_row = lax.rem(lax.div(code, kw), kh)
            last = pairs[index, k + jnp.maximum(taps, 1) - 1]
            ends = [plan.offset(1, lax.rem(tap, kw)) for tap in (code, last)]
            least, most = jnp.minimum(*ends), jnp.maximum(*ends) + tiles.pixels

            @pl.when(taps > 0)
            def _():
                for part in range(plan.parts):
                    summed = pl.ds(source * plan.depth_tile + part * tiles.depth, tiles.depth)
                    slot = slot_of(ring, x_issued + part, tiles.x_stages, x_empty)

                    # In a loop of its own: unrolled, the places of many pixels would not fit a copying thread.
                    @pl.loop(0, plan.read)
                    def _(pixel, slot=slot, summed=summed):
                        here = plan.first(1, column) + pixel
                        read = (here >= 0) & (here < width) & (pixel >= least) & (pixel < most)
                        read_row, read_column = jnp.where(read, there, height), jnp.where(read, here, width)
                        plgpu.copy_gmem_to_smem(
                            x.at[read_row, read_column, images, summed],
                            x_slots.at[slot, pl.ds(pixel * tiles.images, tiles.images)],
                            x_full.at[slot],
                        )

                    @pl.loop(0, taps)
                    def _(tap, part=part, summed=summed):
                        slot = slot_of(ring, w_issued + part * taps + tap, tiles.w_stages, w_empty)
                        tap_column = lax.rem(pairs[index, k + tap], kw)
                        axes = (kept, summed) if plan.transposed else (summed, kept)
                        plgpu.copy_gmem_to_smem(w.at[tap_row, tap_column, *axes], w_slots.at[slot], w_full.at[slot])

            return x_issued + jnp.where(taps > 0, plan.parts, 0), w_issued + plan.parts * taps

        return lax.fori_loop(0, count, entry, issued)

    def turn(number, issued):
        return tuple(fill(ring, number, issued[ring]) for ring in range(tiles.warpgroups))

    turns = functools.reduce(jnp.maximum, (end - begin for begin, end in lanes))
    issued = lax.fori_loop(0, turns, turn, ((jnp.int32(0), jnp.int32(0)),) * tiles.warpgroups)
    # Every slot's release is waited for, so that no barrier is left half way.
    for ring, rings_issued in enumerate(issued):
        for total, stages, empty in zip(rings_issued, (tiles.x_stages, tiles.w_stages), (x_empty, w_empty)):

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _(step, ring=ring, stages=stages, empty=empty):
                plgpu.barrier_wait(empty.at[ring * stages + lax.rem(step, stages)])


def _compute(
    plan: StripPlan, lists, y, scale, bias, relu, *, x_slots, w_slots, out, x_full, x_empty, w_full, w_empty
) -> None:
    """A computing warpgroup: its rings' steps, one output tile after the other."""
    tiles, (pairs, counts, order, starts) = plan.tiles, lists
    kw = plan.geometry.window[1]
    ring = lax.axis_index("warpgroup")
    plgpu.set_max_registers(compute_registers(tiles.warpgroups, MANY_COPY_REGISTERS), action="increase")
    shape = (tiles.outputs, tiles.pixels * tiles.images)

    def x_slot(step):
        return ring * tiles.x_stages + lax.rem(step, tiles.x_stages)

    def w_slot(step):
        return ring * tiles.w_stages + lax.rem(step, tiles.w_stages)

    def turn(number, used):
        block, row, column, channel_tile, index = _place(plan, order[number])
        count = counts[index]
        x_begin, w_begin = used

        def summed(sums):
            def entry(k, used):
                x_used, w_used = used
                _, _, taps = _unit(plan, pairs, index, count, k, row)

                def step(number, _):
                    part = lax.div(number, jnp.maximum(taps, 1))
                    tap = number - part * taps
                    x_step, w_step = x_used + part, w_used + number

                    @pl.when(tap == 0)
                    def _():
                        plgpu.barrier_wait(x_full.at[x_slot(x_step)])

                    plgpu.barrier_wait(w_full.at[w_slot(w_step)])
                    shift = plan.offset(1, lax.rem(pairs[index, k + tap], kw))
                    rows = pl.ds(shift * tiles.images, tiles.pixels * tiles.images)
                    inputs, weights = x_slots.at[x_slot(x_step), rows], w_slots.at[w_slot(w_step)]
                    weights = weights if plan.transposed else weights.transpose((1, 0))
                    plgpu.wgmma(sums, weights, inputs.transpose((1, 0)))
                    # The product before this one is done: its slots are free.
                    plgpu.wgmma_wait(1)

                    @pl.when(w_step > w_begin)
                    def _():
                        plgpu.barrier_arrive(w_empty.at[w_slot(w_step - 1)])

                    @pl.when((tap == 0) & (x_step > x_begin))
                    def _():
                        plgpu.barrier_arrive(x_empty.at[x_slot(x_step - 1)])

                lax.fori_loop(0, plan.parts * taps, step, None)
                return x_used + jnp.where(taps > 0, plan.parts, 0), w_used + plan.parts * taps

            x_end, w_end = lax.fori_loop(0, count, entry, used)
            return sums[...], x_end, w_end

        sums, x_end, w_end = pl.run_scoped(summed, plgpu.ACC(shape, jnp.float32))

        @pl.when(w_end > w_begin)
        def _():
            plgpu.barrier_arrive(w_empty.at[w_slot(w_end - 1)])
            plgpu.barrier_arrive(x_empty.at[x_slot(x_end - 1)])

        channels = pl.ds(channel_tile * tiles.outputs, tiles.outputs)
        for vector, combine in ((scale, jnp.multiply), (bias, jnp.add)):
            if vector is not None:
                value = plgpu.load(vector.at[channels], optimized=False)
                sums = combine(sums, lax.broadcast_in_dim(value, shape, (0,)))
        if relu:
            sums = jnp.maximum(sums, 0.0)
        images = pl.ds(block * tiles.images, tiles.images)
        # Of two buffers one is being copied out while the other is filled; one at a time where a row's last strip is
        # short, since what is then not copied would be counted.
        short = plan.size[1] % tiles.pixels != 0
        pending = 0 if short else 1
        for pixel in range(tiles.pixels):
            slot = 2 * ring + pixel % 2
            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
            begin = pixel * tiles.images
            out.at[slot].transpose((1, 0))[...] = sums[:, begin : begin + tiles.images].astype(y.dtype)
            plgpu.commit_smem()

            @pl.when(jnp.logical_or(not short, column + pixel < plan.size[1]))
            def _(pixel=pixel, slot=slot):
                plgpu.copy_smem_to_gmem(out.at[slot], y.at[row, column + pixel, images, channels])

        if tiles.pixels % 2:
            # The next tile begins with the buffer that this one ended with.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        return x_end, w_end

    lax.fori_loop(*lane_of(plan, starts, ring), turn, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)
