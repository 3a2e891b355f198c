"""Convolutions whose kernels each have a pattern of their own: C for maps that lie in lanes."""

from collections.abc import Callable

import numpy as np

from clicktrain_jax.deploy.c_net.forms import Group, Taps, blocks
from clicktrain_jax.deploy.c_net.layouts import Buffer, Step
from clicktrain_jax.deploy.c_net.source import Source, finish, lines

Key = Callable[[np.ndarray], np.ndarray]

# Vectors that hold sums, as in tiles.
_WIDE, _NARROW = 16, 4
# Each sum waits for the last product: there must be as many independent ones.
_INDEPENDENT = 8
# Pieces of so few pixels are computed channel by channel, all filters of a block together.
_SMALL_PIECE = 2
# What a block's sums, or the channels that a block of them reads, may take of the first cache, in floats.
_BLOCK_FLOATS = 5120
# Fewer kernels than these are not worth the way to memory and back that a filter's sums make.
_FEW_KERNELS = 8


def emit(source: Source, step: Step, name: str) -> None:
    """Write the functions of a convolution, and its call.

    Args:
        source: to write to.
        step: of kind "lanes".
        name: of the functions.
    """
    is_small = step.form.pixels <= _SMALL_PIECE
    (_by_channel if is_small else _by_filter)(source, step, name)
    arguments = [f"m + {buffer.offset}" for buffer in (step.sources[0], step.target, *step.sources[1:])]
    source.body.append(f"{name}({', '.join(arguments)});")


def _keeps(source: Source, step: Step) -> str | None:
    """The table that tells which lanes are inside of the image, where not all are."""
    return None if step.target.lanes.covers(step.node.shape) else inside(source, step.target)


def _first(step: Step) -> int:
    """Where the window of the first pixel begins."""
    image, (above, left) = step.sources[0], step.node.padding
    return image.first - above * image.row - left * image.column


def _head(step: Step, name: str, total: int, how: str) -> str:
    kernel = "x".join(map(str, step.node.kernel.shape))
    z = ", const float *restrict z" if len(step.sources) == 2 else ""
    return f"""
/* {step.node.name}: {kernel}, {total} weights kept, pixels in lanes, {how}. */
static void {name}(const float *restrict x, float *restrict y{z}) {{
"""


def _in_order(step: Step, first: Key, second: Key, last: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All kernels in the order of two keys, then group by group, then of a third key.

    Args:
        step: of the convolution.
        first: from the places of some kernels (n, 4), as `LaneForm.entries` gives them, to numbers (n,).
        second: as first.
        last: as first.

    Returns:
        ``(keys, places, sizes, weights)``: int (n, 3) of first, second and group, the places, how many weights each
        has, and the weights.
    """
    entries = step.form.entries(step.node)
    keys = [
        np.column_stack([first(places), second(places), np.full(len(places), g), last(places)])
        for g, (places, _) in enumerate(entries)
    ]
    if not keys:
        return np.zeros((0, 3), int), np.zeros((0, 4), int), np.zeros(0, int), np.zeros(0, np.float32)
    keys = np.concatenate(keys)
    order = np.lexsort(keys.T[::-1])
    rows = [row for _, weights in entries for row in weights]
    sizes = np.array([len(group.taps) for group in step.form.groups])[keys[:, 2]]
    weights = np.concatenate([rows[index] for index in order])
    return keys[order, :3], np.concatenate([places for places, _ in entries])[order], sizes[order], weights


def _starts(numbers: np.ndarray) -> np.ndarray:
    """Where each of several lists begins, by their lengths."""
    return np.concatenate([[0], np.cumsum(numbers)])[:-1]


def _by_channel(source: Source, step: Step, name: str) -> None:
    """Small pieces: what a channel holds is read by all filters that keep anything of it, one after the other."""
    node, form, image, target = step.node, step.form, step.sources[0], step.target
    lanes, pixels, groups = form.target.count, form.pixels, len(form.groups)
    cin, cout = node.kernel.shape[2:]
    room = pixels * lanes
    block = max(1, min(cout, _BLOCK_FLOATS // room))
    blocks_of_filters = -(-cout // block)
    keys, places, sizes, weights = _in_order(
        step, lambda places: places[:, 0] // block, lambda places: places[:, 1], lambda places: places[:, 0]
    )
    counts = np.zeros((blocks_of_filters, cin, groups), np.int64)
    np.add.at(counts, tuple(keys.T), 1)
    bias, all_weights = source.weights(node.bias), source.weights(weights)
    offset = source.table(f"{name}_from", places[:, 2] * image.row + places[:, 3] * image.column)
    to = source.table(f"{name}_to", places[:, 0] % block * room)
    count = source.table(f"{name}_counts", counts.reshape(-1), "uint16_t")
    begin = source.table(f"{name}_begins", _starts(counts.sum(axis=(1, 2))), "int32_t")
    of_block = np.zeros(blocks_of_filters, np.int64)
    np.add.at(of_block, keys[:, 0], sizes)
    place = source.table(f"{name}_places", _starts(of_block), "int32_t")
    kind = source.kinds[offset], source.kinds[to]
    width = target.lanes.piece[1]
    own = [(r, c) for r in range(target.lanes.piece[0]) for c in range(width)]
    loops = "".join(_kernels(step, g, group, own) for g, group in enumerate(form.groups))
    keep = _keeps(source, step)
    last = ""
    for p, (r, c) in enumerate(own):
        z = ""
        if len(step.sources) == 2:
            other = step.sources[1]
            z = f"z + {other.first + r * other.row + c * other.column} + (size_t)f * {other.channel}"
        put = f"y + {target.first + r * target.row + c * target.column} + (size_t)f * {target.channel}"
        last += f"      {{ v{lanes} s = load{lanes}(a + {p * lanes}); {finish(lanes, 's', node.ops, z)}"
        if keep is not None:
            last += f" s = keep{lanes}(s, {keep} + {(r * width + c) * lanes});"
        last += f" store{lanes}({put}, s); }}\n"
    source.parts.append(f"""{_head(step, name, len(weights), "channel by channel")}  NET_PARALLEL
  for (int b = 0; b < {blocks_of_filters}; ++b) {{
    float sums[{block * room}] NET_ALIGNED;
    const int begin = b * {block}, end = b == {blocks_of_filters - 1} ? {cout} : begin + {block};
    for (int f = begin; f < end; ++f)
      for (int p = 0; p < {pixels}; ++p)
        store{lanes}(sums + (f - begin) * {room} + p * {lanes}, splat{lanes}({bias}[f]));
    const {kind[0]} *off = {offset} + {begin}[b];
    const {kind[1]} *to = {to} + {begin}[b];
    const float *w = {all_weights} + {place}[b];
    const uint16_t *n = {count} + b * {cin * groups};
    for (int c = 0; c < {cin}; ++c, n += {groups}) {{
      const float *xc = x + {_first(step)} + (size_t)c * {image.channel};
{loops}    }}
    (void)off;
    for (int f = begin; f < end; ++f) {{
      const float *a = sums + (f - begin) * {room};
{last}    }}
  }}
}}
""")


def _kernels(step: Step, g: int, group: Group, pixels: list[tuple[int, int]]) -> str:
    """The kernels of one channel and one group, for a block of filters whose sums are in memory."""
    lanes, image, taps = step.form.target.count, step.sources[0], group.taps
    ways = max(1, min(len(taps), 4 // len(pixels)))
    sums = [f"s{r}_{c}" for r, c in pixels]
    text = []
    is_fixed = len(group.places) == 1 and len(pixels) == 1
    if is_fixed:
        # The same vectors for all of them: they stay in registers.
        ((row, column),) = group.places
        for i, (r, c) in enumerate(taps):
            place = (row + r) * image.row + (column + c) * image.column
            text.append(f"      {'{ ' if not i else '  '}const v{lanes} x{i} = load{lanes}(xc + {place});")
    text.append(f"      for (int k = n[{g}]; k; --k) {{ /* {' '.join(f'({r}, {c})' for r, c in taps)} */")
    text.append(f"        {'' if is_fixed else 'const float *xk = xc + *off; '}++off;")
    text.append("        float *a = sums + *to++;")
    text += [f"        v{lanes} {s} = load{lanes}(a + {p * lanes});" for p, s in enumerate(sums)]
    for way in range(1, ways):
        text.append(f"        v{lanes} " + ", ".join(f"{s}_{way} = splat{lanes}(0)" for s in sums) + ";")
    splats = ", ".join(f"w{i} = splat{lanes}(w[{i}])" for i in range(len(taps)))
    text.append(f"        const v{lanes} {splats};")
    text.append("        NET_FETCH(w);")
    if is_fixed:
        for i in range(len(taps)):
            s = sums[0] + (f"_{i % ways}" if i % ways else "")
            text.append(f"        {s} = madd{lanes}({s}, x{i}, w{i});")
    else:
        products = _products(step.node.strides, image, taps, pixels, ways, lanes)
        text += ["    " + line for line in products]
    for p, s in enumerate(sums):
        whole = s
        for way in range(1, ways):
            whole = f"add{lanes}({whole}, {s}_{way})"
        text.append(f"        store{lanes}(a + {p * lanes}, {whole});")
    return "\n".join([*text, f"        w += {len(taps)};", "      }" + (" }" if is_fixed else ""), ""])


def _by_filter(source: Source, step: Step, name: str) -> None:
    """Larger pieces: a block of pixels of one filter stays in registers, for a block of channels at a time."""
    node, form, image, target = step.node, step.form, step.sources[0], step.target
    groups = len(form.groups)
    cin, cout = node.kernel.shape[2:]
    kernels = sum(len(places) for places, _ in form.entries(node))
    # Of each channel about what a block of pixels and its window reads.
    window = (4 * node.strides[0] + node.kernel.shape[0] - 1) * (4 * node.strides[1] + node.kernel.shape[1] - 1)
    block = max(_BLOCK_FLOATS // (window * form.source.count), -(-_FEW_KERNELS * cin * cout // max(kernels, 1)))
    count_of_blocks = -(-cin // block)
    block = -(-cin // count_of_blocks)
    keys, places, _, weights = _in_order(
        step, lambda places: places[:, 1] // block, lambda places: places[:, 0], lambda places: places[:, 1]
    )
    counts = np.zeros((count_of_blocks, cout, groups), np.int64)
    np.add.at(counts, tuple(keys.T), 1)
    sizes = np.array([len(group.taps) for group in form.groups])
    begins = _starts(counts.sum(axis=2).reshape(-1))
    starts = _starts((counts * sizes).sum(axis=2).reshape(-1))
    offsets = places[:, 1] * image.channel + places[:, 2] * image.row + places[:, 3] * image.column
    offset = source.table(f"{name}_offsets", offsets, "int32_t")
    count = source.table(f"{name}_counts", counts.reshape(-1), "uint16_t")
    begin = source.table(f"{name}_begins", begins, "int32_t")
    place = source.table(f"{name}_places", starts, "int32_t")
    all_weights, bias = source.weights(weights), source.weights(node.bias)
    other = step.sources[1] if len(step.sources) == 2 else None
    keep = _keeps(source, step)
    rows, columns = node.strides

    def loops(most: int) -> str:
        text = ""
        for top, side, height, width, block_rows, block_columns in blocks(*target.lanes.piece, most):
            function = _block(source, step, block_rows, block_columns, keep is not None)
            here = f"h * {target.row} + v * {target.column} + {target.first}"
            more = ""
            if other is not None:
                more = f", z + (h * {other.row} + v * {other.column} + {other.first}) + (size_t)f * {other.channel}"
            if keep is not None:
                more += f", {keep} + (h * {target.lanes.piece[1]} + v) * {target.lanes.count}"
            text += f"""  for (int h = {top}; h < {top + height}; h += {block_rows})
    for (int v = {side}; v < {side + width}; v += {block_columns})
      for (int b = 0; b < {count_of_blocks}; ++b) {{
        NET_PARALLEL
        for (int f = 0; f < {cout}; ++f) {{
          const int i = b * {cout} + f;
          {function}(x + (h * {rows * image.row} + v * {columns * image.column} + {_first(step)}),
              {count} + i * {groups}, {offset} + {begin}[i], {all_weights} + {place}[i], {bias}[f],
              y + ({here}) + (size_t)f * {target.channel}, b == 0, b == {count_of_blocks - 1}{more});
        }}
      }}
"""
        return text

    wide, narrow = loops(_WIDE), loops(_NARROW)
    inner = wide if wide == narrow else f"#ifdef NET_WIDE\n{wide}#else\n{narrow}#endif\n"
    source.parts.append(f"{_head(step, name, len(weights), 'filter by filter')}{inner}}}\n")


def _block(source: Source, step: Step, rows: int, columns: int, is_masked: bool) -> str:
    """The function for a block of pixels of each piece, one filter and some channels."""
    node, form, image, target = step.node, step.form, step.sources[0], step.target
    lanes = form.target.count
    pixels = [(r, c) for r in range(rows) for c in range(columns)]
    most_taps = max((len(group.taps) for group in form.groups), default=1)
    ways = max(1, min(most_taps, _INDEPENDENT // len(pixels)))
    sums = [f"s{r}_{c}" for r, c in pixels]
    puts = [f"y + {r * target.row + c * target.column}" for r, c in pixels]
    text = [f"  v{lanes} {', '.join(sums)};", "  if (is_first) {"]
    text += [f"    {s} = splat{lanes}(bias);" for s in sums] + ["  } else {"]
    text += [f"    {s} = load{lanes}({put});" for s, put in zip(sums, puts)] + ["  }"]
    for way in range(1, ways):
        text.append(f"  v{lanes} " + ", ".join(f"{s}_{way} = splat{lanes}(0)" for s in sums) + ";")
    for g, group in enumerate(form.groups):
        taps = group.taps
        text.append(f"  for (int k = n[{g}]; k; --k) {{ /* {' '.join(f'({r}, {c})' for r, c in taps)} */")
        text.append("    const float *xk = x + *off++;")
        weights = ", ".join(f"w{i} = splat{lanes}(w[{i}])" for i in range(len(taps)))
        text.append(f"    const v{lanes} {weights};")
        text.append("    NET_FETCH(w);")
        text += _products(node.strides, image, taps, pixels, ways, lanes)
        text += [f"    w += {len(taps)};", "  }"]
    for way in range(1, ways):
        text += [f"  {s} = add{lanes}({s}, {s}_{way});" for s in sums]
    has_other = any(op.name == "add" for op in node.ops)
    other = step.sources[1] if has_other else None
    text.append("  if (is_last) {")
    for s, (r, c) in zip(sums, pixels):
        z = f"z + {r * other.row + c * other.column}" if other else ""
        keep = f"{s} = keep{lanes}({s}, keep + {(r * target.lanes.piece[1] + c) * lanes});" if is_masked else ""
        if node.ops or keep:
            text.append(f"    {finish(lanes, s, node.ops, z)} {keep}")
    text.append("  }")
    text += [f"  store{lanes}({put}, {s});" for s, put in zip(sums, puts)]
    more = (", const float *z" if has_other else "") + (", const uint32_t *keep" if is_masked else "")
    head = (
        "static NET_SPARE void NAME(const float *restrict x, const uint16_t *n, const int32_t *off, const float *w,\n"
        f"    float bias, float *restrict y, int is_first, int is_last{more}) {{"
    )
    number = len(source._functions)
    return source.function(f"lanes_{rows}x{columns}_{number}", "\n".join([head, *text, "}\n"]))


def _products(
    strides: tuple[int, int], image: Buffer, taps: Taps, pixels: list[tuple[int, int]], ways: int, lanes: int
) -> list[str]:
    """One kernel at each pixel of a block; each vector is read once, row by row."""
    uses: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for r, c in pixels:
        for tap, (row, column) in enumerate(taps):
            uses.setdefault((r * strides[0] + row, c * strides[1] + column), []).append((tap, r, c))
    text = []
    for (row, column), products in sorted(uses.items()):
        place = row * image.row + column * image.column
        sums = []
        for tap, r, c in products:
            way = tap % ways
            s = f"s{r}_{c}" + (f"_{way}" if way else "")
            sums.append(f"{s} = madd{lanes}({s}, x, w{tap});")
        text.append(f"    {{ const v{lanes} x = load{lanes}(xk + {place}); {' '.join(sums)} }}")
    return text


def neighbours(source: Source, target: Buffer, name: str) -> None:
    """Write the call that fills a buffer's margin, if it has one."""
    if not any(target.margin):
        return
    above, below, left, right = target.margin
    (height, width), (down, across) = target.lanes.piece, target.lanes.grid
    lanes = target.lanes.count
    copies, masks, known = [], [], {}
    for row in range(-above, height + below):
        for column in range(-left, width + right):
            if 0 <= row < height and 0 <= column < width:
                continue
            # This pixel of each piece is that pixel of the piece so many down and across.
            (pieces_down, own_row), (pieces_across, own_column) = divmod(row, height), divmod(column, width)
            key = pieces_down, pieces_across
            if key not in known:
                known[key] = len(masks)
                masks += [
                    0xFFFFFFFF if 0 <= piece_row + key[0] < down and 0 <= piece_column + key[1] < across else 0
                    for piece_row in range(down)
                    for piece_column in range(across)
                ]
            shift = pieces_down * across + pieces_across
            if not any(masks[known[key] : known[key] + lanes]):
                own_row, own_column, shift = 0, 0, 0  # zero in any case: nothing far away is read
            to = target.first + row * target.row + column * target.column
            start = target.first + own_row * target.row + own_column * target.column + shift
            copies.append((to, start, known[key]))
    table = source.table(f"{name}_masks", masks, "uint32_t")
    text = f"static const net_copy NAME[{len(copies)}] = {{\n{lines(f'{{{a}, {b}, {c}}}' for a, b, c in copies)}}};\n"
    copies_table = source.function(f"{name}_copies", text)
    source.body.append(
        f"net_neighbours(m + {target.offset}, {target.shape[2]}, {target.channel}, {lanes}, {copies_table}, "
        f"{len(copies)}, {table});"
    )


def inside(source: Source, target: Buffer) -> str:
    """A table: all bits for what is inside of the image, none for what is not, for each pixel of a piece."""
    (height, width), (down, across) = target.lanes.piece, target.lanes.grid
    bits = [
        0xFFFFFFFF if d * height + row < target.shape[0] and a * width + column < target.shape[1] else 0
        for row in range(height)
        for column in range(width)
        for d in range(down)
        for a in range(across)
    ]
    return source.table(f"inside_{len(source.parts)}", bits, "uint32_t")


def pool(source: Source, step: Step, name: str) -> None:
    """Write pooling in windows that no two pieces share, and its call."""
    node, image, target = step.node, step.sources[0], step.target
    lanes, (height, width) = target.lanes.count, target.lanes.piece
    rows, columns = node.window
    reads = [f"load{lanes}(from + {r * image.row + c * image.column})" for r in range(rows) for c in range(columns)]
    operation = {"max": "max", "min": "min", "sum": "add"}[node.kind]
    value = reads[0]
    for read in reads[1:]:
        value = f"{operation}{lanes}({value}, {read})"
    if not target.lanes.covers(node.shape):
        value = f"keep{lanes}({value}, {inside(source, target)} + (h * {width} + v) * {lanes})"
    source.parts.append(f"""
static void {name}(const float *restrict x, float *restrict y) {{
  NET_PARALLEL
  for (int f = 0; f < {node.shape[2]}; ++f)
    for (int h = 0; h < {height}; ++h)
      for (int v = 0; v < {width}; ++v) {{
        const float *from = x + (size_t)f * {image.channel}
            + (h * {rows * image.row} + v * {columns * image.column} + {image.first});
        float *to = y + (size_t)f * {target.channel} + (h * {target.row} + v * {target.column} + {target.first});
        store{lanes}(to, {value});
      }}
}}
""")
    source.body.append(f"{name}(m + {image.offset}, m + {target.offset});")
