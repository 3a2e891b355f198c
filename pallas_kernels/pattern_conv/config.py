"""How the work of a GPU kernel is cut: checked configurations, and a first choice by shape."""

import dataclasses
import itertools
import math

# Of one multiprocessor from Hopper on: bytes of shared memory a block may have, less what barriers and
# alignment take, and float32 registers that a computing warpgroup's sums may fill without spilling.
SHARED_MEMORY = 227 * 1024 - 2048
ACCUMULATOR = 64 * 256
# Output tiles that can be dealt evenly to the multiprocessors of a large Hopper GPU: four each.
BUSY = 4 * 132
# Its multiprocessors.
BLOCKS = 132
# Products of the tensor cores in the time that one byte comes from the second cache to a multiprocessor.
PRODUCTS_A_BYTE = 45
# How much longer than a row its strips may be in all: what is past the end is computed for nothing.
_LONGEST = 1.15


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """Tiles of the kernel of the forward pass and of the input gradient.

    Attributes:
        images: images at one pixel of an output tile, a multiple of 8, at most 256.
        outputs: output channels of an output tile, a multiple of 16, at most 256.
        depth: channels summed in one step: 16, 32 or 64.
        stages: slots of each warpgroup's ring of operands, at least 2.
        warpgroups: computing warpgroups in a block, each with output tiles of its own; one more copies.
        outputs_first: whether output channels are the rows of the tensor core's product (``outputs`` a multiple
            of 64) or the images are (``images`` a multiple of 64).
    """

    images: int
    outputs: int
    depth: int = 64
    stages: int = 3
    warpgroups: int = 2
    outputs_first: bool = True

    def __post_init__(self):
        _check("images", self.images, 8, 256)
        _check("outputs", self.outputs, 16, 256)
        _check_swizzle("depth", self.depth)
        _check_ring(self.stages, self.warpgroups)
        rows = "outputs" if self.outputs_first else "images"
        if getattr(self, rows) % 64:
            raise ValueError(
                f"{rows} are the rows of the product, a multiple of 64, got {getattr(self, rows)}; "
                f"outputs_first={not self.outputs_first} takes the other side"
            )
        _check_room(self.images * self.outputs, self.shared_memory())

    @property
    def stored(self) -> int:
        """Images that are written out at a time."""
        return 128 if self.images == 256 else self.images

    def shared_memory(self) -> int:
        """Bytes of shared memory that a block takes."""
        slot = (self.images + self.outputs) * self.depth
        return 2 * self.warpgroups * (self.stages * slot + self.stored * self.outputs)


@dataclasses.dataclass(frozen=True)
class StripTiles:
    """Tiles of the kernel that reads an input row once for all taps of a row of the window, at stride 1.

    Attributes:
        pixels: of one output row in an output tile.
        images: images in an output tile, a multiple of 8; with ``pixels`` at most 256.
        outputs: output channels of an output tile, a multiple of 64.
        depth: channels summed in one step, 16, 32 or 64.
        window: columns of the window; 3 unless another is given.
        x_stages: slots of each warpgroup's ring of input strips, at least 2.
        w_stages: slots of each warpgroup's ring of weights, at least 2.
        warpgroups: computing warpgroups in a block.
    """

    pixels: int
    images: int
    outputs: int = 64
    depth: int = 64
    window: int = 3
    x_stages: int = 2
    w_stages: int = 3
    warpgroups: int = 2

    def __post_init__(self):
        if self.pixels < 1 or self.window < 1:
            raise ValueError(f"pixels and window are at least 1, got {self.pixels} and {self.window}")
        _check("images", self.images, 8, 256)
        _check("pixels * images", self.pixels * self.images, 8, 256)
        _check("outputs", self.outputs, 64, 256)
        _check_swizzle("depth", self.depth)
        for stages in (self.x_stages, self.w_stages):
            _check_ring(stages, self.warpgroups)
        _check_room(self.pixels * self.images * self.outputs, self.shared_memory())

    def shared_memory(self) -> int:
        """Bytes of shared memory that a block takes."""
        x_slot = (self.pixels + self.window - 1) * self.images * self.depth
        stored = 2 * self.images * self.outputs
        return 2 * self.warpgroups * (self.x_stages * x_slot + self.w_stages * self.outputs * self.depth + stored)


@dataclasses.dataclass(frozen=True)
class WeightTiles:
    """Tiles of the kernel of the weight gradient.

    Attributes:
        images: images summed in one step: 16, 32 or a multiple of 64, at most 256.
        channels: input channels of a product, a multiple of 16, at most 256.
        filters: filters of a product, a multiple of 16, at most 256.
        entries: retained (channel block, tap) of one filter tile that share one reading of the output gradient; each
            warpgroup has as many of them.
        least: steps that a block does at least, where sums are cut into parts so that all have work.
        stages: slots of a block's ring of operands, at least 2; one more where steps look back (`WeightPlan.back`).
        warpgroups: computing warpgroups in a block.
        filters_first: whether filters are the rows of the tensor core's product (``filters`` a multiple of 64) or
            channels are (``channels`` a multiple of 64).
    """

    images: int
    channels: int
    filters: int
    entries: int = 2
    least: int = 4
    stages: int = 2
    warpgroups: int = 2
    filters_first: bool = False

    def __post_init__(self):
        if self.images not in (16, 32, 64, 128, 192, 256):
            raise ValueError(f"images of a step are 16, 32 or a multiple of 64 up to 256, got {self.images}")
        _check("channels", self.channels, 16, 256)
        _check("filters", self.filters, 16, 256)
        for name in ("entries", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        _check_ring(self.stages, self.warpgroups)
        if self.entries % self.warpgroups:
            raise ValueError(f"each of {self.warpgroups} warpgroups has as many entries, got {self.entries}")
        rows = "filters" if self.filters_first else "channels"
        if getattr(self, rows) % 64:
            raise ValueError(f"{rows} are the rows of the product, a multiple of 64, got {getattr(self, rows)}")
        _check_room(self.entries // self.warpgroups * self.channels * self.filters, self.shared_memory())

    def shared_memory(self) -> int:
        """Bytes of shared memory that a block takes."""
        slot = 2 * self.images * (self.entries * self.channels + self.filters)
        return self.stages * slot + 4 * self.warpgroups * self.channels * self.filters


def product_options(
    batch: int, size: tuple[int, int], outputs: int, tile: int, depth: int, window: int = 1
) -> list[ProductTiles | StripTiles]:
    """Tiles for the forward pass or the input gradient, what reads least for a product first.

    Args:
        batch: images, a multiple of 8.
        size: (rows, columns) of the result.
        outputs: output channels in all.
        tile: output channels that share a list of what is retained.
        depth: channels of one entry of that list.
        window: columns of the window at stride 1: strips are among the options where it is more than 1.

    Raises:
        ValueError: nothing fits the tensor cores' shapes.
    """
    options = [*_products(batch, size, outputs, tile, depth), *_strips(batch, size, outputs, tile, depth, window)]
    if not options:
        raise ValueError(f"no tiles for {batch} images, {tile} outputs that share a list, {depth} channels an entry")
    return [tiles for *_, tiles in sorted(options, key=lambda option: option[:-1])]


def product_tiles(batch: int, size: tuple[int, int], outputs: int, tile: int, depth: int) -> ProductTiles:
    """The first of `product_options` that is no strip."""
    options = product_options(batch, size, outputs, tile, depth)
    return next(tiles for tiles in options if isinstance(tiles, ProductTiles))


def strip_tiles(batch: int, size: tuple[int, int], tile: int, depth: int, window: int) -> StripTiles | None:
    """The first strips of `product_options`; None where a strip would save nothing, or does not fit."""
    options = sorted(_strips(batch, size, tile, tile, depth, window), key=lambda option: option[:-1])
    return options[0][-1] if options else None


def _products(batch: int, size: tuple[int, int], outputs: int, tile: int, depth: int) -> list[tuple]:
    """(cost, how gladly else, tiles)."""
    options = []
    # Parts of less than 64 read the other side too often; a batch or a tile under 256 may be taken whole.
    widths = [width for width in (256, 192, 128, 64, 32, 16, tile) if tile % width == 0 and width <= 256]
    for width in sorted({width for width in widths if width >= min(64, max(widths))}):
        for images in sorted({length for length in (256, 128, 64, 32, 16, 8, batch) if length <= min(batch, 256)}):
            waste = -(-batch // images) * images / batch
            for outputs_first in (True, False):
                tiles = _deepest(images, width, depth, outputs_first)
                if tiles is not None:
                    count = -(-batch // images) * math.prod(size) * -(-outputs // width)
                    # Bytes read for one product: less is better, once work can be dealt evenly. The second cache
                    # takes four times as long as the tensor cores where both sides are 64.
                    reading, product = 1 / images + 1 / width, _narrow(images if outputs_first else width) / 128
                    cost = waste * max(reading, product) * max(1.0, BUSY / count)
                    options.append((cost, not outputs_first, -images, tiles))
    return options


def _strips(batch: int, size: tuple[int, int], outputs: int, tile: int, depth: int, window: int) -> list[tuple]:
    """Likewise."""
    options = []
    if window == 1 or tile % 64 or size[1] == 1:
        return options
    for pixels in range(2, min(size[1], 16) + 1):
        images = min(batch, 256 // pixels // 8 * 8)
        tiles = _deepest_strip(pixels, images, depth, window)
        if tiles is not None and -(-size[1] // pixels) * pixels <= _LONGEST * size[1]:
            # What a row of the window reads, for two taps in it, of one product.
            reading = (pixels + 1) / (2 * pixels * 64) + 1 / (pixels * images)
            waste = -(-size[1] // pixels) * pixels / size[1] * -(-batch // images) * images / batch
            count = size[0] * -(-size[1] // pixels) * -(-batch // images) * -(-outputs // 64)
            options.append((reading * waste * max(1.0, BUSY / count), -tiles.depth, -images, tiles))
    return options


def weight_options(
    batch: int, size: tuple[int, int], lists: int, room: int, tile: tuple[int, int], looks_back: bool = False
) -> list[WeightTiles]:
    """Tiles for the weight gradient, what moves least first.

    Args:
        batch: images.
        size: (rows, columns) of the output.
        lists: filter tiles.
        room: entries that a filter tile may retain.
        tile: (filters, channels).
        looks_back: whether taps beside each other look at the same pixels, one step apart: half of them then read.

    Raises:
        ValueError: nothing fits the tensor cores' shapes.
    """
    parts = [[part for part in (128, 64, 32, 16) if length % part == 0] for length in tile]
    options = []
    # Patterns have four taps: of eight entries many would be half empty.
    for filters, channels, entries in itertools.product(*parts, (4, 2, 1)):
        for images in (length for length in (128, 64, 32, 16) if length <= max(batch, 16)):
            tiles = _deepest_weights(images, channels, filters, entries, looks_back)
            if tiles is not None:
                items = lists * (tile[0] // filters) * (tile[1] // channels) * -(-room // entries)
                steps = items * math.prod(size) * -(-batch // images)
                length = max(-(-steps // BLOCKS), tiles.least)
                reading = entries * (1 + 1 / size[1]) / 2 if looks_back and entries > 1 else entries
                read = 2 * images * (reading * channels + filters)
                # With half of the columns idle a product takes as long.
                columns = channels if tiles.filters_first else filters
                product = images * entries * channels * filters * _narrow(columns) / PRODUCTS_A_BYTE
                # The busiest block's bytes: a part is written, and read again, in float32.
                # A step that waits for its operands costs as much as some kilobytes.
                cost = length * (max(read, product) + 8192)
                cost += 8 * (length * items / steps + 1) * entries * channels * filters
                options.append((cost, -images, -entries, tiles))
    if not options:
        raise ValueError(f"no tiles for {batch} images and tiles of {tile} (filters, channels)")
    return [tiles for *_, tiles in sorted(options, key=lambda option: option[:-1])]


def weight_tiles(
    batch: int, size: tuple[int, int], lists: int, room: int, tile: tuple[int, int], looks_back: bool = False
) -> WeightTiles:
    """The first of `weight_options`."""
    return weight_options(batch, size, lists, room, tile, looks_back)[0]


def _narrow(columns: int) -> float:
    """How much longer than the product its operands' reading from shared memory takes, where it has few columns."""
    return max(1.0, (64 + columns) / (2 * columns))


def _deepest_weights(images: int, channels: int, filters: int, entries: int, looks_back: bool) -> WeightTiles | None:
    warpgroups = 2 if entries % 2 == 0 else 1
    # A slot that is looked at again is one less to copy into.
    for stages in range(8, 2 + (looks_back and entries > 1), -1):
        for filters_first in (False, True):
            try:
                least = max(1, 128 // images)
                return WeightTiles(images, channels, filters, entries, least, stages, warpgroups, filters_first)
            except ValueError:
                continue
    return None


def _deepest(images: int, width: int, depth: int, outputs_first: bool) -> ProductTiles | None:
    """With the deepest steps that leave room for three stages, and then with the most stages."""
    for step in (length for length in (64, 32, 16) if depth % length == 0):
        for stages in (6, 5, 4, 3):
            try:
                return ProductTiles(images, width, step, stages, outputs_first=outputs_first)
            except ValueError:
                continue
    return None


def _deepest_strip(pixels: int, images: int, depth: int, window: int) -> StripTiles | None:
    """Likewise; two slots would leave a copy little time."""
    # Narrow steps are many small copies.
    for step in (length for length in (64, 32, 16) if depth % length == 0 and length >= min(depth, 32)):
        for x_stages in (4, 3):
            try:
                return StripTiles(pixels, images, 64, step, window, x_stages, x_stages + 1)
            except ValueError:
                continue
    return None


def _check(name: str, value: int, multiple: int, most: int) -> None:
    if value < multiple or value % multiple or value > most:
        raise ValueError(f"{name} are a multiple of {multiple}, at most {most}, got {value}")


def _check_swizzle(name: str, value: int) -> None:
    if value not in (16, 32, 64):
        raise ValueError(f"{name} is 16, 32 or 64 channels, got {value}")


def _check_ring(stages: int, warpgroups: int) -> None:
    if stages < 2:
        raise ValueError(f"stages are at least 2, so that copies and products overlap, got {stages}")
    if warpgroups not in (1, 2):
        raise ValueError(f"warpgroups are 1 or 2, got {warpgroups}")


def _check_room(sums: int, shared_memory: int) -> None:
    if sums > ACCUMULATOR:
        raise ValueError(f"a warpgroup keeps at most {ACCUMULATOR} sums in its registers, got {sums}")
    if shared_memory > SHARED_MEMORY:
        raise ValueError(f"a block has {SHARED_MEMORY} bytes of shared memory, these tiles take {shared_memory}")
