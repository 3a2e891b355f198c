"""How maps lie in memory, and where.

`Rows`: pixel by pixel, channels side by side, with a margin of zeros for the windows that read it. A filter tile's
weights stand side by side in a vector; each vector step is for one pixel.

`Lanes`: channel by channel. The image is cut into a grid of equal pieces, and a vector holds the same pixel of each
piece: whatever window a kernel has, its taps are whole vectors, never shifted ones. Around the pieces stand copies of
their neighbours' pixels, zero at the rim of the image.
"""

import dataclasses
from typing import Any

import numpy as np

from clicktrain_jax.deploy.c_net.nodes import Shape

# Channels are padded to a multiple of this, in floats; memory is aligned to as many.
VECTOR = 16
# Pixels (above, below, left, right) around a map, or around each piece of it.
Margin = tuple[int, int, int, int]
NO_MARGIN: Margin = (0, 0, 0, 0)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not smaller."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Rows:
    """Pixel by pixel.

    Attributes:
        channels: floats from one pixel to the next.
    """

    channels: int


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The same pixel of all pieces in a vector.

    Attributes:
        grid: pieces (down, across); their product is the number of lanes.
        piece: (height, width) of a piece.
    """

    grid: tuple[int, int]
    piece: tuple[int, int]

    @property
    def count(self) -> int:
        """Lanes."""
        return self.grid[0] * self.grid[1]

    def covers(self, shape: Shape) -> bool:
        """Whether the pieces are the image exactly."""
        return all(shape[axis] == self.grid[axis] * self.piece[axis] for axis in (0, 1))


@dataclasses.dataclass(eq=False)
class Buffer:
    """A map in memory.

    Attributes:
        shape: (height, width, channels).
        layout: `Rows` or `Lanes`.
        margin: around it.
        offset: of its first float in the workspace.
    """

    shape: Shape
    layout: Rows | Lanes
    margin: Margin = NO_MARGIN
    offset: int = 0

    @property
    def lanes(self) -> Lanes:
        """Its layout, where that is in lanes."""
        assert isinstance(self.layout, Lanes)
        return self.layout

    @property
    def pixels(self) -> tuple[int, int]:
        """Rows and columns that are stored, with the margin; of a piece in lanes."""
        above, below, left, right = self.margin
        height, width = self.layout.piece if isinstance(self.layout, Lanes) else self.shape[:2]
        return above + height + below, left + width + right

    @property
    def column(self) -> int:
        """Floats from a pixel to the next one in its row."""
        return self.layout.count if isinstance(self.layout, Lanes) else self.layout.channels

    @property
    def row(self) -> int:
        """Floats from a pixel to the one below it."""
        return self.pixels[1] * self.column

    @property
    def channel(self) -> int:
        """Floats from a channel to the next."""
        return self.pixels[0] * self.row if isinstance(self.layout, Lanes) else 1

    @property
    def first(self) -> int:
        """Where the first pixel inside the margin is."""
        return self.margin[0] * self.row + self.margin[2] * self.column

    @property
    def size(self) -> int:
        """Floats, with room for vectors that are read from between two."""
        whole = self.channel * self.shape[2] if isinstance(self.layout, Lanes) else self.pixels[0] * self.row
        return round_up(whole, VECTOR) + VECTOR

    def rows_and_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each row and each column of the map begins: a pixel is at the sum of the two, channel by channel."""
        height, width, _ = self.shape
        down, across = np.arange(height), np.arange(width)
        if isinstance(self.layout, Lanes):
            (_, grid_width), (piece_height, piece_width) = self.layout.grid, self.layout.piece
            rows = down % piece_height * self.row + down // piece_height * grid_width
            columns = across % piece_width * self.column + across // piece_width
        else:
            rows, columns = down * self.row, across * self.column
        return rows + self.first, columns

    def places(self, where: np.ndarray) -> np.ndarray:
        """Where entries are, from their numbers row by row with channels last; -1 stays."""
        rows, columns = self.rows_and_columns()
        pixel, channel = np.divmod(np.maximum(where, 0), self.shape[2])
        row, column = np.divmod(pixel, self.shape[1])
        return np.where(where < 0, -1, rows[row] + columns[column] + channel * self.channel)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the program.

    Attributes:
        kind: what is done: "input", "tiles", "lanes", "pool", "lane_pool", "entrywise", "gather", "total", "to_lanes",
            "to_rows".
        node: of the graph; None for a change of layout.
        sources: read.
        target: written.
        form: how, for a convolution.
    """

    kind: str
    node: Any
    sources: tuple[Buffer, ...]
    target: Buffer
    form: Any = None


def allocate(steps: list[Step], output: Buffer) -> int:
    """Give each buffer its place; those that are not needed at once may share one.

    Args:
        steps: in order; their buffers' offsets are set.
        output: is needed to the end.

    Returns:
        Floats of the whole workspace. The first `VECTOR` are nobody's: vectors are read from before a buffer too.
    """
    last = {buffer: index for index, step in enumerate(steps) for buffer in (*step.sources, step.target)}
    last[output] = len(steps)
    alive: list[Buffer] = []
    size = VECTOR
    for index, step in enumerate(steps):
        alive = sorted((buffer for buffer in alive if last[buffer] >= index), key=lambda buffer: buffer.offset)
        place = VECTOR
        for buffer in alive:
            if place + step.target.size <= buffer.offset:
                break
            place = max(place, buffer.offset + buffer.size)
        step.target.offset = place
        alive.append(step.target)
        size = max(size, place + step.target.size)
    return size
