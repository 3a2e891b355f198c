"""Sums over tiles and back: (cin, cout) grids of kernels against grids of tiles."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def tile_sums(values: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """(..., cin, cout) -> (..., cin tiles, cout tiles): sums over tiles; the last ones may be short."""
    if tile == (1, 1):
        return values
    filters, channels = tile
    *leading, cin, cout = values.shape
    rows, columns = math.ceil(cin / channels), math.ceil(cout / filters)
    pads = [(0, 0)] * len(leading) + [(0, rows * channels - cin), (0, columns * filters - cout)]
    padded = jnp.pad(values, pads)
    return padded.reshape(*leading, rows, channels, columns, filters).sum(axis=(-3, -1))


def untile(values: jax.Array, tile: tuple[int, int], grid: tuple[int, int]) -> jax.Array:
    """(cin tiles, cout tiles) -> (cin, cout), each tile's value at all its kernels; ``grid`` is (cin, cout)."""
    if tile == (1, 1):
        return values
    filters, channels = tile
    wide = jnp.repeat(jnp.repeat(values, channels, axis=0), filters, axis=1)
    return wide[: grid[0], : grid[1]]


def tile_sizes(tile: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """int (cin tiles, cout tiles): the number of kernels in each tile of a (cin, cout) grid."""
    filters, channels = tile
    rows = np.minimum(channels, grid[0] - np.arange(0, grid[0], channels))
    columns = np.minimum(filters, grid[1] - np.arange(0, grid[1], filters))
    return rows[:, None] * columns[None, :]
