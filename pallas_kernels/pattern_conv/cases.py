"""One list of convolutions for tests, tuner and benchmark: small odd ones, the layers of real nets, and their masks.

The first convolution of a net is in no list: its three channels have no blocks to share.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.pattern_conv.geometry import Geometry, Layout, Padding, make_geometry
from pallas_kernels.pattern_conv.structure import Structure, Taps, make_structure

# The 2x2 corners of a 3x3 kernel, tap = row * 3 + column.
CORNERS: tuple[Taps, ...] = ((0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7), (4, 5, 7, 8))

Tile = tuple[int | None, int | None]
Sharing = Literal["tile", "channels"]
BLOCK: Tile = (64, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution, and how its mask is drawn.

    Attributes:
        name: tells it from the others of its list.
        image: (height, width) of the input.
        batch: images.
        cin, cout: channels.
        window: (kh, kw).
        strides, padding: as `pattern_conv` takes them.
        tile: (filters, channels) that are removed together and have all their taps in common; None for all; the
            last tile along either axis may be short.
        patterns: the tap sets that tiles draw from; empty: whole kernels, no patterns.
        pattern_of: what has one pattern: "tile", or "channels": a tile's channels with all filters.
        removed: share of the tiles that are removed: round(removed * tiles) of them, drawn uniformly.
        dtype: of x and w, by name.
        layout: of x and y.
        layers: how many layers of the net are of this kind.
    """

    name: str
    image: tuple[int, int]
    batch: int
    cin: int
    cout: int
    window: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    tile: Tile = (None, 1)
    patterns: tuple[Taps, ...] = CORNERS
    pattern_of: Sharing = "tile"
    removed: float = 0.0
    dtype: str = "float32"
    layout: Layout = "NHWC"
    layers: int = 1

    def __post_init__(self):
        taps = math.prod(self.window)
        for pattern in self.patterns:
            if not pattern or not set(pattern) <= set(range(taps)):
                raise ValueError(f"{self.name}: patterns hold taps from 0 to {taps - 1}, at least one, got {pattern}")
        if not 0 <= self.removed <= 1:
            raise ValueError(f"{self.name}: removed is a share between 0 and 1, got {self.removed}")
        if self.pattern_of not in ("tile", "channels"):
            raise ValueError(f"{self.name}: pattern_of is 'tile' or 'channels', got {self.pattern_of!r}")
        if any(size is not None and size < 1 for size in self.tile):
            raise ValueError(f"{self.name}: tile holds (filters, channels), positive or None, got {self.tile}")

    def __str__(self) -> str:
        return self.name

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        """(kh, kw, cin, cout)."""
        return *self.window, self.cin, self.cout

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """Of the input, in the case's layout."""
        if self.layout == "NHWC":
            return self.batch, *self.image, self.cin
        return *self.image, self.batch, self.cin

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        """Of the output, in the case's layout."""
        geometry = self.geometry()
        return geometry.shape(self.batch, geometry.output, self.cout)

    @property
    def grid(self) -> tuple[int, int]:
        """(channel blocks, filter tiles)."""
        filters, channels = self.tile
        return math.ceil(self.cin / (channels or self.cin)), math.ceil(self.cout / (filters or self.cout))

    @property
    def num_removed(self) -> int:
        """How many tiles are removed."""
        return round(self.removed * math.prod(self.grid))

    def geometry(self) -> Geometry:
        """As the backends take it."""
        return make_geometry(self.x_shape, self.window, self.strides, self.padding, self.layout)

    def dense_flops(self) -> int:
        """Of the unmasked convolution, a multiply-add counted as two, border taps in full."""
        return 2 * self.batch * math.prod(self.geometry().output) * math.prod(self.w_shape)


def make_mask(case: Case, rng: np.random.Generator) -> np.ndarray:
    """A mask of the case: bool (kh, kw, cin, cout), True where retained.

    Patterns are drawn uniformly; exactly ``case.num_removed`` tiles are empty, whatever ``rng``.
    """
    blocks, tiles = case.grid
    kh, kw, cin, cout = case.w_shape
    table = np.zeros((max(len(case.patterns), 1), kh * kw), bool)
    for row, taps in zip(table, case.patterns or (tuple(range(kh * kw)),)):
        row[list(taps)] = True
    columns = 1 if case.pattern_of == "channels" else tiles
    ids = np.broadcast_to(rng.integers(len(table), size=(blocks, columns)), (blocks, tiles))
    retained = np.ones(blocks * tiles, bool)
    retained[rng.permutation(blocks * tiles)[: case.num_removed]] = False
    grid = table[ids] & retained.reshape(blocks, tiles, 1)  # (blocks, tiles, taps)
    filters, channels = case.tile
    whole = grid.repeat(channels or cin, axis=0)[:cin].repeat(filters or cout, axis=1)[:, :cout]
    return np.ascontiguousarray(np.moveaxis(whole, 2, 0)).reshape(kh, kw, cin, cout)


def structure_of(case: Case, rng: np.random.Generator) -> Structure:
    """The structure of a fresh mask, with the tile that the case states."""
    return make_structure(make_mask(case, rng), tile=case.tile)


def make_inputs(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fresh (x, w, dy) of the case's dtype, so scaled that outputs are about 1; w is dense."""
    dtype = jnp.dtype(case.dtype)
    fan_in = math.prod(case.w_shape[:3])
    x, w, dy = (rng.standard_normal(shape) for shape in (case.x_shape, case.w_shape, case.y_shape))
    return x.astype(dtype), (w / math.sqrt(fan_in)).astype(dtype), dy.astype(dtype)


def with_changes(cases: Sequence[Case], suffix: str = "", **changes: object) -> tuple[Case, ...]:
    """The same cases with some fields changed, and their names lengthened."""
    return tuple(dataclasses.replace(case, name=case.name + suffix, **changes) for case in cases)


def removed_for(reduction: float, pattern: Taps = CORNERS[0], taps: int = 9) -> float:
    """The share of tiles to remove, so that 1 / ``reduction`` of the work is left beside patterns of this size.

    Raises:
        ValueError: the patterns alone save more than that.
    """
    removed = 1 - taps / len(pattern) / reduction
    if removed < 0:
        raise ValueError(f"patterns of {len(pattern)} of {taps} taps save {taps / len(pattern):.4g}x, not {reduction}x")
    return removed


def vgg16(batch: int) -> tuple[Case, ...]:
    """Every distinct 3x3 layer of VGG-16 for 32x32 images but the first, bfloat16, HWNC, blocks of (64, 64)."""
    rows = [  # size, cin, cout, layers
        (32, 64, 64, 1),
        (16, 64, 128, 1),
        (16, 128, 128, 1),
        (8, 128, 256, 1),
        (8, 256, 256, 2),
        (4, 256, 512, 1),
        (4, 512, 512, 2),
        (2, 512, 512, 3),
    ]
    return tuple(
        _layer(f"vgg16-n{batch}-{size}x{size}-{cin}-{cout}", size, batch, cin, cout, layers=layers)
        for size, cin, cout, layers in rows
    )


def resnet50(batch: int) -> tuple[Case, ...]:
    """Every distinct 3x3 layer of ResNet-50 for 224x224 images, likewise; the stride stands in the 3x3 layer."""
    cases = []
    for size, width, layers in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        name = f"resnet50-n{batch}-{{}}x{{}}-{width}-{width}"
        if width > 64:
            wide = 2 * size
            cases.append(_layer(name.format(wide, wide) + "-s2", wide, batch, width, width, strides=(2, 2)))
            layers -= 1
        cases.append(_layer(name.format(size, size), size, batch, width, width, layers=layers))
    return tuple(cases)


def resnet50_1x1(batch: int) -> tuple[Case, ...]:
    """Every distinct 1x1 layer of ResNet-50 for 224x224 images, shortcuts among them, half of the blocks removed."""
    cases = []
    before = 64
    for size, width, layers in ((56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)):
        # The first block's entry and shortcut see the map before the stride.
        wide = size if width == 64 else 2 * size
        rows = [(wide, before, width, 1, 1), (size, width, 4 * width, 1, layers)]
        rows.append((size, 4 * width, width, 1, layers - 1))
        if width == 64:
            rows[1] = (size, width, 4 * width, 1, layers + 1)  # the shortcut is of the same shape
        else:
            rows.append((wide, before, 4 * width, 2, 1))
        for image, cin, cout, stride, count in rows:
            name = f"resnet50-n{batch}-1x1-{image}x{image}-{cin}-{cout}" + ("-s2" if stride == 2 else "")
            case = _layer(name, image, batch, cin, cout, strides=(stride, stride), layers=count)
            changes = {"window": (1, 1), "padding": ((0, 0), (0, 0)), "patterns": (), "removed": 0.5}
            cases.append(dataclasses.replace(case, **changes))
        before = 4 * width
    return tuple(cases)


def _layer(
    name: str, size: int, batch: int, cin: int, cout: int, strides: tuple[int, int] = (1, 1), layers: int = 1
) -> Case:
    return Case(
        name,
        (size, size),
        batch,
        cin,
        cout,
        strides=strides,
        padding=((1, 1), (1, 1)),
        tile=BLOCK,
        dtype="bfloat16",
        layout="HWNC",
        layers=layers,
    )


# Sizes that divide nothing, every kind of mask, stride, padding and window.
SMALL: tuple[Case, ...] = (
    Case("per-channel", (5, 7), 3, 6, 10),
    Case("per-channel-hwnc", (5, 7), 3, 6, 10, layout="HWNC"),
    Case("per-kernel", (6, 5), 2, 5, 7, tile=(1, 1)),
    Case("per-kernel-removed", (6, 5), 2, 5, 7, tile=(1, 1), removed=0.6),
    Case("short-last-tiles", (5, 5), 2, 7, 11, tile=(4, 3), removed=0.4),
    Case("short-last-tiles-hwnc", (5, 5), 2, 7, 11, tile=(4, 3), removed=0.4, layout="HWNC"),
    Case("tiles-one-channel", (4, 6), 2, 9, 12, tile=(4, 1), removed=0.6),
    Case("one-filter-all-channels", (4, 4), 2, 6, 5, tile=(1, None), removed=0.4),
    Case("channels-share", (5, 5), 2, 8, 12, tile=(4, 2), pattern_of="channels", removed=0.5),
    Case("stride-2", (7, 9), 2, 6, 8, strides=(2, 2), tile=(4, 2), removed=0.25),
    Case("stride-2-even-padded", (8, 6), 2, 6, 8, strides=(2, 2), padding=((1, 1), (1, 1))),
    Case("stride-2-by-1-hwnc", (7, 6), 2, 6, 8, strides=(2, 1), tile=(4, 2), layout="HWNC"),
    Case("valid", (5, 6), 2, 4, 6, padding="VALID", tile=(2, 2), removed=0.3),
    Case("lopsided-padding", (4, 5), 2, 4, 6, padding=((0, 2), (1, 0)), tile=(2, 2)),
    Case("wide-padding", (3, 3), 2, 4, 6, padding=((2, 2), (3, 1)), tile=(2, 2)),
    Case("one-pixel", (1, 1), 3, 6, 10, tile=(2, 3)),
    Case("free-patterns", (5, 5), 2, 6, 8, tile=(2, 2), patterns=((0,), (1, 3, 8), tuple(range(9)))),
    Case("window-5x5", (6, 7), 2, 4, 6, window=(5, 5), tile=(2, 2), patterns=((0, 6, 12), (4, 12, 24)), removed=0.3),
    Case("window-1x3", (5, 6), 2, 4, 6, window=(1, 3), tile=(3, 2), patterns=((0, 1), (1, 2))),
    Case("window-2x2", (4, 5), 2, 4, 6, window=(2, 2), tile=(3, 2), patterns=((0, 1), (1, 2))),
    Case("1x1", (5, 4), 3, 9, 10, window=(1, 1), tile=(4, 2), patterns=(), removed=0.5),
    Case("1x1-stride-2", (5, 4), 3, 9, 10, window=(1, 1), strides=(2, 2), tile=(4, 2), patterns=(), removed=0.5),
    Case("whole-kernels", (5, 4), 2, 6, 8, tile=(2, 2), patterns=(), removed=0.5),
    Case("nothing-removed", (4, 4), 2, 4, 4, tile=(None, None), patterns=()),
    Case("all-removed", (4, 4), 2, 6, 8, tile=(2, 2), removed=1.0),
    Case("one-channel-one-filter", (4, 5), 2, 1, 1, tile=(1, 1)),
)

# The same, in blocks that tensor cores take; small enough to be interpreted.
SMALL_BLOCKS: tuple[Case, ...] = tuple(
    dataclasses.replace(case, dtype="float16" if "float16" in case.name else "bfloat16", layout="HWNC")
    for case in (
        Case("blocks", (3, 4), 8, 128, 64, tile=BLOCK),
        Case("blocks-removed", (3, 3), 16, 128, 128, tile=BLOCK, removed=0.5),
        Case("blocks-all-removed", (2, 2), 8, 64, 64, tile=BLOCK, removed=1.0),
        Case("blocks-stride-2", (5, 4), 8, 64, 128, strides=(2, 2), padding=((1, 1), (1, 1)), tile=BLOCK, removed=0.5),
        Case("blocks-1x1", (3, 2), 8, 128, 128, window=(1, 1), tile=BLOCK, patterns=(), removed=0.5),
        Case("blocks-1x1-stride-2", (3, 4), 8, 64, 64, window=(1, 1), strides=(2, 2), tile=BLOCK, patterns=()),
        Case("blocks-one-pixel", (1, 1), 24, 64, 64, tile=BLOCK),
        Case("blocks-lopsided-padding", (2, 3), 8, 64, 64, padding=((0, 2), (1, 0)), tile=BLOCK),
        Case("blocks-of-one-pattern", (3, 3), 8, 128, 128, tile=(None, 64)),
        Case("blocks-float16", (2, 3), 8, 64, 64, tile=BLOCK),
    )
)

_PLAIN_SHAPES = ((32, 64), (16, 256), (8, 512))


def _plain(kind: str, batch: int, size: int, width: int, tile: Tile, removed: float) -> Case:
    return Case(f"{kind}-n{batch}-{size}x{size}-{width}", (size, size), batch, width, width, tile=tile, removed=removed)


# What the portable form is measured on: kernels kept with one pattern a channel, then 60% of the tiles removed.
PORTABLE: tuple[Case, ...] = (
    *(_plain("channel", batch, size, width, (None, 1), 0.0) for batch in (1, 32) for size, width in _PLAIN_SHAPES),
    *(_plain("tile64", batch, size, width, (64, 1), 0.6) for batch in (1, 32) for size, width in _PLAIN_SHAPES[1:]),
    *(_plain("block64", batch, size, width, BLOCK, 0.6) for batch in (1, 32) for size, width in _PLAIN_SHAPES[1:]),
    *(_plain("tile16", batch, size, width, (16, 1), 0.6) for batch in (1, 32) for size, width in _PLAIN_SHAPES[1:]),
)

# Layers of VGG-13 and ResNet-50 on a CPU: (net, rows and columns, channels and filters).
_CPU_LAYERS = (
    ("vgg13", 32, 64),
    ("vgg13", 16, 128),
    ("vgg13", 16, 256),
    ("vgg13", 8, 256),
    ("vgg13", 8, 512),
    ("vgg13", 4, 512),
    ("resnet50", 56, 64),
    ("resnet50", 28, 128),
    ("resnet50", 14, 256),
    ("resnet50", 7, 512),
)
# (filters that share patterns and removal, times less work by name, share of the tiles that is removed).
_CPU_MASKS = (
    (64, "5.6x", 0.6),
    (32, "5.6x", 0.6),
    (16, "5.6x", 0.6),
    (1, "5.6x", 0.6),
    (64, "2.25x", 0.0),
    (1, "2.25x", 0.0),
)

# What the native kernels are measured on. Masks of one layer and batch follow each other: they share the dense forms.
CPU: tuple[Case, ...] = tuple(
    Case(
        f"{net}-n{batch}-{size}x{size}-{width}-tile{filters}-{reduction}",
        (size, size),
        batch,
        width,
        width,
        tile=(filters, 1),
        removed=removed,
    )
    for batch in (1, 32)
    for net, size, width in _CPU_LAYERS
    for filters, reduction, removed in _CPU_MASKS
)

# The 3x3 layers that a GPU is measured on, patterns alone (2.25x) and with tiles removed (8x).
_GPU_LAYERS = (*vgg16(512), *vgg16(128), *resnet50(128))
GPU: tuple[Case, ...] = (
    *with_changes(_GPU_LAYERS, "-2.25x"),
    *with_changes(_GPU_LAYERS, "-8x", removed=removed_for(8.0)),
)

# Every shape that must compile for a GPU.
COMPILED: tuple[Case, ...] = (*_GPU_LAYERS, *resnet50_1x1(128))
