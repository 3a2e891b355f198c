"""One kernel for the forward pass and the input gradient.

An output tile is a number of images at one pixel by a number of output channels that share a list of what is
retained. It is the sum, over the list, of dense products on the tensor cores: the images at the pixel that the
tap points to, by the weights of that tap. A tap that points outside the image is passed over, so padding costs
nothing.

A block of threads stays on its multiprocessor and takes the output tiles of its worklist (see `schedule`). One
warpgroup copies operands into rings of slots in shared memory; each of the others works off a ring of its own, tile
after tile: while one writes its tile out, the next one's products run.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pattern_conv.config import ProductTiles
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.mosaic.ring import COPY_REGISTERS, compute_registers, digits, swizzle_of, swizzled
from pallas_kernels.pattern_conv.schedule import Work


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one launch.

    Attributes:
        geometry: of the convolution.
        tiles: how the work is cut.
        transposed: whether this is the input gradient: taps point the other way and weights are read transposed.
        output_tile: output channels that share a list.
        depth_tile: channels of one entry of a list.
        batch: images.
        outputs: output channels in all.
        blocks: thread blocks launched.
    """

    geometry: Geometry
    tiles: ProductTiles
    transposed: bool
    output_tile: int
    depth_tile: int
    batch: int
    outputs: int
    blocks: int

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the result."""
        return self.geometry.image if self.transposed else self.geometry.output

    @property
    def source_size(self) -> tuple[int, int]:
        """(rows, columns) of what is read."""
        return self.geometry.output if self.transposed else self.geometry.image

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(image blocks, rows, columns, channel tiles): the last runs fastest, so that tiles share what they read."""
        return -(-self.batch // self.tiles.images), *self.size, -(-self.outputs // self.tiles.outputs)

    @property
    def items(self) -> int:
        """Output tiles in all."""
        images, rows, columns, channels = self.grid
        return images * rows * columns * channels

    @property
    def steps(self) -> int:
        """Steps of one entry."""
        return self.depth_tile // self.tiles.depth

    def serves(self, geometry: Geometry, batch: int, transposed: bool) -> bool:
        """Whether this is a launch for such a convolution; its precision is none of the tensor cores' business."""
        asked = dataclasses.replace(geometry, precision=None), batch, transposed
        return (self.geometry, self.batch, self.transposed) == asked

    def place(self, item: jax.Array) -> tuple[jax.Array, ...]:
        """(image block, row, column, channel tile) of an output tile."""
        return digits(item, self.grid)

    def source(self, axis: int, place: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a tap points along one axis, and whether there is anything."""
        stride, begin = self.geometry.strides[axis], self.geometry.padding[axis][0]
        if self.transposed:
            shifted = place + begin - tap
            there = lax.div(shifted, stride)
            inside = (shifted >= 0) & (there < self.source_size[axis])
            return there, inside if stride == 1 else inside & (lax.rem(shifted, stride) == 0)
        there = place * stride + tap - begin
        return there, (there >= 0) & (there < self.source_size[axis])

    @property
    def inside(self) -> np.ndarray:
        """bool (rows * columns of the grid, kh * kw): whether a tap points inside the image there."""
        rows, columns = (self.geometry.reached(axis, self.transposed) for axis in (0, 1))
        return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, rows.shape[1] * columns.shape[1])

    def read_by_entries(self, pairs):
        """int32 (lists, room): the numbers that each entry of a list reads for one output tile."""
        return pairs * 0 + (self.tiles.images + self.tiles.outputs) * self.depth_tile

    @property
    def written(self) -> int:
        """The numbers that are written of one output tile."""
        return self.tiles.images * self.tiles.outputs

    def inner(self, axis: int, place: jax.Array) -> jax.Array | bool:
        """Whether all taps point inside along one axis; False where that is not known at once."""
        stride, begin = self.geometry.strides[axis], self.geometry.padding[axis][0]
        last = self.geometry.window[axis] - 1
        if self.transposed:
            return False if stride > 1 else (place + begin - last >= 0) & (place + begin < self.source_size[axis])
        there = place * stride - begin
        return (there >= 0) & (there + last < self.source_size[axis])


def products(
    x: jax.Array, w: jax.Array, pairs: jax.Array, counts: jax.Array, work: Work, scale=None, bias=None, relu=False
) -> jax.Array:
    """Sum what is retained.

    Args:
        x: (rows, columns, batch, channels) to read: the input, or the output's gradient where transposed.
        w: (kh, kw, cin, cout) of x's dtype.
        pairs: int32 (lists, room) of block * kh * kw + tap.
        counts: int32 (lists,).
        work: the worklist, with the plan.
        scale: float32 (at least all lists' output channels,), multiplies the sums; None for 1.
        bias: likewise, is added after; None for 0.
        relu: whether negative results become 0.

    Returns:
        (rows, columns, batch, outputs) of x's dtype, summed in float32.
    """
    plan, tiles = work.plan, work.plan.tiles
    rings = tiles.warpgroups
    transforms = swizzled(swizzle_of(tiles.depth, tiles.outputs, *w.shape[2:]), x.dtype)
    w_slot = (tiles.outputs, tiles.depth) if plan.transposed else (tiles.depth, tiles.outputs)
    slots = rings * tiles.stages
    scratch = {
        "x_slots": plgpu.SMEM((slots, tiles.images, tiles.depth), x.dtype, transforms=transforms),
        "w_slots": plgpu.SMEM((slots, *w_slot), x.dtype, transforms=transforms),
        "out": plgpu.SMEM((rings, tiles.stored, tiles.outputs), x.dtype, transforms=transforms),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "empty": plgpu.Barrier(num_arrivals=1, num_barriers=slots),
    }
    vectors = [vector for vector in (scale, bias) if vector is not None]

    def pattern_conv_products(pairs_ref, counts_ref, order_ref, starts_ref, x_ref, w_ref, *refs, **allocated):
        vector_refs, y_ref = list(refs[:-1]), refs[-1]
        scale_ref = vector_refs.pop(0) if scale is not None else None
        bias_ref = vector_refs.pop(0) if bias is not None else None
        lists = (pairs_ref, counts_ref, order_ref, starts_ref)
        warpgroup = lax.axis_index("warpgroup")
        lax.cond(
            warpgroup < rings,
            lambda: _compute(plan, lists, y_ref, scale_ref, bias_ref, relu, **allocated),
            lambda: _copy(plan, lists, x_ref, w_ref, **allocated),
        )

    kernel = plgpu.kernel(
        pattern_conv_products,
        out_type=jax.ShapeDtypeStruct((*plan.size, plan.batch, plan.outputs), x.dtype),
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=rings + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(pairs, counts, work.order, work.starts, x, w, *vectors)


def lane_of(plan: Plan, starts: jax.Array, ring: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Where a ring's output tiles begin and end in the worklist."""
    lane = lax.axis_index("block") * plan.tiles.warpgroups + ring
    return starts[lane], starts[lane + 1]


def _list_of(plan: Plan, channel_tile: jax.Array) -> jax.Array:
    return lax.div(channel_tile, plan.output_tile // plan.tiles.outputs)


def _entry(plan: Plan, pairs: jax.Array, index: jax.Array, k: jax.Array, row: jax.Array, column: jax.Array):
    """Of the list's k-th entry: (block, tap row, tap column, source row, source column, whether it is inside)."""
    kh, kw = plan.geometry.window
    code = pairs[index, k]
    tap = lax.rem(code, kh * kw)
    tap_row, tap_column = lax.div(tap, kw), lax.rem(tap, kw)
    there_row, inside_row = plan.source(0, row, tap_row)
    there_column, inside_column = plan.source(1, column, tap_column)
    return lax.div(code, kh * kw), tap_row, tap_column, there_row, there_column, inside_row & inside_column


def _copy(plan: Plan, lists, x, w, *, x_slots, w_slots, out, full, empty) -> None:
    """The copying warpgroup: fills the rings in the order in which their slots come free."""
    tiles, (pairs, counts, order, starts) = plan.tiles, lists
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

    lanes = [lane_of(plan, starts, ring) for ring in range(tiles.warpgroups)]

    def fill(ring: int, turn: jax.Array, issued: jax.Array) -> jax.Array:
        begin, end = lanes[ring]
        there = begin + turn < end
        block, row, column, channel_tile = plan.place(order[jnp.where(there, begin + turn, 0)])
        index = _list_of(plan, channel_tile)

        def entry(k, issued):
            source, tap_row, tap_column, there_row, there_column, inside = _entry(plan, pairs, index, k, row, column)

            @pl.when(inside)
            def _():
                for part in range(plan.steps):
                    step = issued + part
                    slot = ring * tiles.stages + lax.rem(step, tiles.stages)

                    @pl.when(step >= tiles.stages)
                    def _(slot=slot):
                        plgpu.barrier_wait(empty.at[slot])

                    summed = pl.ds(source * plan.depth_tile + part * tiles.depth, tiles.depth)
                    kept = pl.ds(channel_tile * tiles.outputs, tiles.outputs)
                    plgpu.copy_gmem_to_smem(
                        x.at[there_row, there_column, pl.ds(block * tiles.images, tiles.images), summed],
                        x_slots.at[slot],
                        full.at[slot],
                    )
                    weights = (kept, summed) if plan.transposed else (summed, kept)
                    plgpu.copy_gmem_to_smem(w.at[tap_row, tap_column, *weights], w_slots.at[slot], full.at[slot])

            return issued + jnp.where(inside, plan.steps, 0)

        count = jnp.where(there, counts[index], 0)
        return lax.fori_loop(0, count, entry, issued)

    def turn(number, issued):
        return tuple(fill(ring, number, issued[ring]) for ring in range(tiles.warpgroups))

    turns = functools.reduce(jnp.maximum, (end - begin for begin, end in lanes))
    issued = lax.fori_loop(0, turns, turn, (jnp.int32(0),) * tiles.warpgroups)
    # Every slot's release is waited for, so that no barrier is left half way.
    for ring in range(tiles.warpgroups):

        @pl.loop(jnp.maximum(issued[ring] - tiles.stages, 0), issued[ring])
        def _(step, ring=ring):
            plgpu.barrier_wait(empty.at[ring * tiles.stages + lax.rem(step, tiles.stages)])


def _compute(plan: Plan, lists, y, scale, bias, relu, *, x_slots, w_slots, out, full, empty) -> None:
    """A computing warpgroup: its ring's steps, one output tile after the other."""
    tiles, (pairs, counts, order, starts) = plan.tiles, lists
    ring = lax.axis_index("warpgroup")
    plgpu.set_max_registers(compute_registers(tiles.warpgroups), action="increase")
    shape = (tiles.outputs, tiles.images) if tiles.outputs_first else (tiles.images, tiles.outputs)

    def slot_of(step):
        return ring * tiles.stages + lax.rem(step, tiles.stages)

    def turn(number, used):
        block, row, column, channel_tile = plan.place(order[number])
        steps = _steps(plan, pairs, counts, row, column, channel_tile)

        def summed(sums):
            def step(number, _):
                slot = slot_of(used + number)
                plgpu.barrier_wait(full.at[slot])
                inputs, weights = x_slots.at[slot], w_slots.at[slot]
                if tiles.outputs_first:
                    rows = weights if plan.transposed else weights.transpose((1, 0))
                    plgpu.wgmma(sums, rows, inputs.transpose((1, 0)))
                else:
                    plgpu.wgmma(sums, inputs, weights.transpose((1, 0)) if plan.transposed else weights)
                # The product before this one is done: its slot is free.
                plgpu.wgmma_wait(1)

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(used + number - 1)])

            lax.fori_loop(0, steps, step, None)
            return sums[...]

        sums = pl.run_scoped(summed, plgpu.ACC(shape, jnp.float32))

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(empty.at[slot_of(used + steps - 1)])

        channels = pl.ds(channel_tile * tiles.outputs, tiles.outputs)
        along = (0,) if tiles.outputs_first else (1,)
        for vector, combine in ((scale, jnp.multiply), (bias, jnp.add)):
            if vector is not None:
                value = plgpu.load(vector.at[channels], optimized=False)
                sums = combine(sums, lax.broadcast_in_dim(value, shape, along))
        if relu:
            sums = jnp.maximum(sums, 0.0)
        for begin in range(0, tiles.images, tiles.stored):
            images = slice(begin, begin + tiles.stored)
            # What was stored before has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if tiles.outputs_first:
                out.at[ring].transpose((1, 0))[...] = sums[:, images].astype(y.dtype)
            else:
                out[ring] = sums[images].astype(y.dtype)
            plgpu.commit_smem()
            images = pl.ds(block * tiles.images + begin, tiles.stored)
            plgpu.copy_smem_to_gmem(out.at[ring], y.at[row, column, images, channels])

        return used + steps

    lax.fori_loop(*lane_of(plan, starts, ring), turn, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _steps(plan: Plan, pairs, counts, row: jax.Array, column: jax.Array, channel_tile: jax.Array) -> jax.Array:
    """How many steps the copying warpgroup issues for an output tile: entries that point inside."""
    index = _list_of(plan, channel_tile)
    inner = functools.reduce(jnp.logical_and, (plan.inner(0, row), plan.inner(1, column)))

    def entry(k, found):
        return found + _entry(plan, pairs, index, k, row, column)[-1].astype(jnp.int32)

    # Only at the border is the list read.
    found = lax.fori_loop(0, jnp.where(inner, 0, counts[index]), entry, jnp.int32(0))
    return plan.steps * jnp.where(inner, counts[index], found)
