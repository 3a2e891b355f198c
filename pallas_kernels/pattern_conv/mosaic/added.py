"""The second kernel of the weight gradient: it adds up the parts, and writes zeros where nothing is retained."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pattern_conv.mosaic.ring import digits
from pallas_kernels.pattern_conv.mosaic.weight_plan import WeightPlan, groups_before

# Rows of a tile that a block adds up at a time, parts in flight, blocks a multiprocessor.
_ROWS, _FLIGHT, _BESIDE = 16, 8, 4


def added(parts: jax.Array, pairs: jax.Array, counts: jax.Array, plan: WeightPlan) -> jax.Array:
    """Add up the parts in the order of the blocks that they are of.

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
        share, more = plan.share(plan.total(groups_before(plan, counts_ref, plan.lists)))

        def block_of(step):
            # Blocks of one step more come first; where share is 0 there are no others.
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
            group = groups_before(plan, counts_ref, index) + lax.div(place, tiles.entries)
            filter_part = lax.div(lax.rem(filters, plan.tile[0]), tiles.filters)
            channel_part = lax.div(lax.rem(channels, plan.tile[1]), tiles.channels)
            item = (group * filter_parts + filter_part) * channel_parts + channel_part
            begin = block_of(item * plan.steps)
            number = jnp.where(is_there, block_of((item + 1) * plan.steps - 1) - begin + 1, 0)
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
