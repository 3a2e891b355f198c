"""Which kernels go: units of removal that compete within blocks.

A *unit* is a tile of kernels that are removed together, a *block* the units that compete with each other (all of a
layer, or one filter's, or one pattern tile's). Level k of removal takes the k least units of every full block, and
in proportion of short last blocks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.plan.targets import Rows
from clicktrain_jax.selection.tiles import tile_sizes, untile


def protect(values: jax.Array, layer: LayerPlan) -> jax.Array:
    """Scores of units, infinite where the floor holds one: the best of every row and of every column."""
    if not layer.num_protected:
        return values
    rows, columns = values.shape
    best_of_row = jnp.argmax(values, axis=1)[:, None] == jnp.arange(columns)[None, :]
    best_of_column = jnp.argmax(values, axis=0)[None, :] == jnp.arange(rows)[:, None]
    return jnp.where(best_of_row | best_of_column, jnp.inf, values)


def keep(values: jax.Array, layer: LayerPlan, level: int | jax.Array) -> jax.Array:
    """bool (cin, cout): False for the kernels of the ``level`` least units of every block.

    Ties go by lowest (cout, cin) index, the reference's order. Sorting the values alone and breaking the ties by
    a running count is several times cheaper on a CPU than sorting indices along with them.

    Args:
        values: float32 scores of the units, shaped like ``layer.unit_grid``; infinite ones stay.
        layer: the layer.
        level: how many; a Python int or a traced scalar.
    """
    grid = layer.shape[2:]
    if isinstance(level, int) and level == 0:
        return jnp.ones(grid, bool)
    flat, counts = _blocks(values, layer)
    size = flat.shape[1]
    if (counts == size).all():
        removed = jnp.full(counts.shape, level, jnp.int32)
    else:
        removed = (_levels(counts, size) <= level).sum(axis=1)
    threshold = jnp.take_along_axis(jnp.sort(flat, axis=1), jnp.maximum(removed - 1, 0)[:, None], axis=1)
    below = flat < threshold
    tied = flat == threshold
    among_tied = (removed - below.sum(axis=1))[:, None]
    goes = (below | (tied & (jnp.cumsum(tied, axis=1) <= among_tied))) & (removed > 0)[:, None]
    return untile(_unblocks(~goes, layer), layer.removal_tile, grid)


def rows_of(values: jax.Array, layer: LayerPlan) -> Rows:
    """The layer's removal row by row, for the target: row j is what level j + 1 takes beyond level j.

    Args:
        values: float32 scores of the units, shaped like ``layer.unit_grid``, none infinite.
        layer: the layer; with a target every kernel's pattern has its ``entries`` taps.
    """
    flat, counts = _blocks(protect(values, layer), layer)
    size = flat.shape[1]
    weights = layer.cost * layer.kept_taps
    costs = tile_sizes(layer.removal_tile, layer.shape[2:]) * float(weights)
    if (costs == costs[0, 0]).all():
        ordered, ordered_costs = jnp.sort(flat, axis=1), jnp.full(flat.shape, costs[0, 0], jnp.float32)
    else:
        flat_costs, _ = _blocks(jnp.asarray(costs, jnp.float32), layer)
        ordered, ordered_costs = jax.lax.sort((flat, flat_costs), dimension=1, num_keys=1)
    if len(counts) == 1:
        row_values, row_costs = ordered[0], ordered_costs[0]
    else:
        # The row in which the unit at each place of each block goes; padding goes nowhere.
        row = jnp.asarray(_levels(counts, size).reshape(-1) - 1)
        row_values = jax.ops.segment_sum(ordered.reshape(-1), row, num_segments=size + 1)[:size]
        row_costs = jax.ops.segment_sum(ordered_costs.reshape(-1), row, num_segments=size + 1)[:size]
    free = jnp.where(jnp.isfinite(row_values), row_values, 0.0).sum()
    return Rows(row_values, row_costs, jnp.maximum(values.sum() - free, 0.0))


def _levels(counts: np.ndarray, size: int) -> np.ndarray:
    """int (blocks, units): the level at which the unit at each place goes, in order of removal.

    Place r of a full block goes at level r + 1; that of a short block of u units at ceil((r + 1) * size / u).
    Padding has level size + 1, which is never reached.
    """
    places = np.arange(1, size + 1)[None, :]
    levels = -(-places * size // counts[:, None])
    return np.where(places <= counts[:, None], levels, size + 1)


def _blocks(values: jax.Array, layer: LayerPlan) -> tuple[jax.Array, np.ndarray]:
    """(unit rows, columns) -> ``((blocks, units), units in each)``, in (cout, cin) order, padded with infinity."""
    rows, columns = layer.unit_grid
    high, wide = layer.scope_block
    down, across = math.ceil(rows / high), math.ceil(columns / wide)
    padded = jnp.pad(values, ((0, down * high - rows), (0, across * wide - columns)), constant_values=jnp.inf)
    flat = padded.T.reshape(across, wide, down, high).transpose(0, 2, 1, 3).reshape(across * down, wide * high)
    # tile_sizes takes (filters, channels), and gives (cin, cout): blocks are listed cout first.
    return flat, tile_sizes((wide, high), (rows, columns)).T.reshape(-1)


def _unblocks(flat: jax.Array, layer: LayerPlan) -> jax.Array:
    """The inverse of `_blocks`."""
    rows, columns = layer.unit_grid
    high, wide = layer.scope_block
    down, across = math.ceil(rows / high), math.ceil(columns / wide)
    padded = flat.reshape(across, down, wide, high).transpose(0, 2, 1, 3).reshape(across * wide, down * high).T
    return padded[:rows, :columns]
