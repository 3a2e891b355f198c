"""C for all steps but convolutions: plain loops, which the compiler makes vectors of."""

import numpy as np

from clicktrain_jax.deploy.c_net import lanes
from clicktrain_jax.deploy.c_net.layouts import Buffer, Lanes, Rows, Step
from clicktrain_jax.deploy.c_net.nodes import Op
from clicktrain_jax.deploy.c_net.source import Source, number

_FIRST = {"max": "-INFINITY", "min": "INFINITY", "sum": "0.0f"}
_JOIN = {"max": "fmaxf(t, {})", "min": "fminf(t, {})", "sum": "t + {}"}


def image(source: Source, step: Step, name: str) -> None:
    """The image: 8-bit pixels are looked up in a table, floating ones are copied."""
    height, width, channels = step.node.shape
    table = step.node.table
    value = f"image[(h * {width} + v) * {channels} + c]"
    if table is not None:
        value = f"{source.weights(table.T)}[c * 256 + {value}]"
    rows, columns = _tables(source, step.target, name)
    if isinstance(step.target.layout, Lanes) and not step.target.lanes.covers(step.node.shape):
        _clear(source, step.target)
    source.parts.append(f"""
static void {name}(const net_pixel *image, float *restrict y) {{
  for (int h = 0; h < {height}; ++h)
    for (int v = 0; v < {width}; ++v)
      for (int c = 0; c < {channels}; ++c) y[{rows}[h] + {columns}[v] + c * {step.target.channel}] = {value};
}}
""")
    source.body.append(f"{name}(image, m + {step.target.offset});")


def pool(source: Source, step: Step, name: str) -> None:
    """Pooling; windows are cut off at the rim."""
    node, x, y = step.node, step.sources[0], step.target
    (height, width, channels), (in_height, in_width, _) = node.shape, node.inputs[0].shape
    (rows, columns), (row_stride, column_stride), (above, left) = node.window, node.strides, node.padding
    joined = _JOIN[node.kind].format(f"x[(r * {x.row} + q * {x.column} + {x.first}) + c]")
    if node.kind in ("max", "min"):
        sign = ">" if node.kind == "max" else "<"
        joined = f"x[(r * {x.row} + q * {x.column} + {x.first}) + c]"
        joined = f"({joined} {sign} t ? {joined} : t)"
    last = _operations(source, node.ops, f"(h * {width} + v) * {channels} + c", "")
    source.parts.append(f"""
static void {name}(const float *restrict x, float *restrict y) {{
  for (int h = 0; h < {height}; ++h)
    for (int v = 0; v < {width}; ++v) {{
      const int r0 = h * {row_stride} - {above}, q0 = v * {column_stride} - {left};
      const int r1 = r0 < 0 ? 0 : r0, r2 = r0 + {rows} > {in_height} ? {in_height} : r0 + {rows};
      const int q1 = q0 < 0 ? 0 : q0, q2 = q0 + {columns} > {in_width} ? {in_width} : q0 + {columns};
      float *to = y + (h * {y.row} + v * {y.column} + {y.first});
      for (int c = 0; c < {channels}; ++c) to[c] = {_FIRST[node.kind]};
      for (int r = r1; r < r2; ++r)
        for (int q = q1; q < q2; ++q)
          for (int c = 0; c < {channels}; ++c) {{
            const float t = to[c];
            to[c] = {joined};
          }}
{_last(channels, last)}    }}
}}
""")
    source.body.append(f"{name}(m + {x.offset}, m + {y.offset});")


def _last(channels: int, statements: str) -> str:
    if not statements:
        return ""
    return f"""      for (int c = 0; c < {channels}; ++c) {{
        float t = to[c];
        {statements}
        to[c] = t;
      }}
"""


def entrywise(source: Source, step: Step, name: str) -> None:
    """Steps on single entries of one map or of two."""
    node, x, y = step.node, step.sources[0], step.target
    height, width, channels = node.shape
    z = step.sources[1] if len(step.sources) == 2 else None
    second = ""
    if z is not None:
        is_one = node.inputs[1].shape == (1, 1, 1) != node.shape
        second = f"z[{z.first}]" if is_one else f"z[(h * {z.row} + v * {z.column} + {z.first}) + c]"
    statements = _operations(source, node.ops, f"(h * {width} + v) * {channels} + c", second)
    more = ", const float *restrict z" if z is not None else ""
    source.parts.append(f"""
static void {name}(const float *restrict x, float *restrict y{more}) {{
  for (int h = 0; h < {height}; ++h)
    for (int v = 0; v < {width}; ++v)
      for (int c = 0; c < {channels}; ++c) {{
        float t = x[(h * {x.row} + v * {x.column} + {x.first}) + c];
        {statements}
        y[(h * {y.row} + v * {y.column} + {y.first}) + c] = t;
      }}
}}
""")
    source.body.append(f"{name}({', '.join(f'm + {buffer.offset}' for buffer in (x, y, *step.sources[1:]))});")


def _operations(source: Source, ops: list[Op], place: str, second: str) -> str:
    text = []
    for op in ops:
        operand = op.operand
        if operand is None:
            text.append(op.statement(""))
        elif isinstance(operand, str):
            text.append(op.statement(second))
        elif np.ndim(operand) == 0:
            text.append(op.statement(number(operand)))
        else:
            text.append(op.statement(f"{source.weights(operand)}[{'c' if np.ndim(operand) == 1 else place}]"))
    return " ".join(text)


def total(source: Source, step: Step, name: str) -> None:
    """One number from a whole map."""
    node, x, y = step.node, step.sources[0], step.target
    height, width, channels = node.inputs[0].shape
    joined = _JOIN[node.kind].format(f"x[(h * {x.row} + v * {x.column} + {x.first}) + c]")
    statements = _operations(source, node.ops, "0", "")
    source.parts.append(f"""
static void {name}(const float *restrict x, float *restrict y) {{
  float t = {_FIRST[node.kind]};
  for (int h = 0; h < {height}; ++h)
    for (int v = 0; v < {width}; ++v)
      for (int c = 0; c < {channels}; ++c) t = {joined};
  {statements}
  y[{y.first}] = t;
}}
""")
    source.body.append(f"{name}(m + {x.offset}, m + {y.offset});")


def gather(source: Source, step: Step, name: str) -> None:
    """Entries in other places: by a table for each axis, where that is enough."""
    node, x, y = step.node, step.sources[0], step.target
    height, width, channels = node.shape
    places = x.places(node.where)
    kept = places >= 0
    axes = _separate(places, kept)
    to = f"y[(h * {y.row} + v * {y.column} + {y.first}) + c]"
    if axes is None:
        table = source.table(f"{name}_places", places.reshape(-1), "int32_t")
        read, condition = "x[k]", "k >= 0"
        place = f"const int k = {table}[(h * {width} + v) * {channels} + c];"
    else:
        # What is zero along any axis is far below zero.
        far = -(1 << 28)
        tables = [
            source.table(f"{name}_{axis}", np.where(inside, values, far), "int32_t")
            for axis, (values, inside) in zip("hvc", axes)
        ]
        place = f"const int k = {tables[0]}[h] + {tables[1]}[v] + {tables[2]}[c];"
        read, condition = "x[k]", f"k >= {far // 2}"
    value = read if kept.all() else f"{condition} ? {read} : 0.0f"
    source.parts.append(f"""
static void {name}(const float *restrict x, float *restrict y) {{
  for (int h = 0; h < {height}; ++h)
    for (int v = 0; v < {width}; ++v)
      for (int c = 0; c < {channels}; ++c) {{
        {place}
        {to} = {value};
      }}
}}
""")
    source.body.append(f"{name}(m + {x.offset}, m + {y.offset});")


def _separate(places: np.ndarray, kept: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """``(places, which are kept)`` along each axis, if their sums are the places."""
    if not kept.any():
        return None
    inside = [kept.any(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
    if not np.array_equal(np.einsum("h,w,c->hwc", *inside), kept):
        return None
    first = tuple(int(np.flatnonzero(axis)[0]) for axis in inside)
    lines = [places[:, first[1], first[2]], places[first[0], :, first[2]], places[first[0], first[1], :]]
    start = places[first]
    sums = lines[0][:, None, None] + (lines[1] - start)[:, None] + (lines[2] - start)
    if not np.array_equal(sums[kept], places[kept]):
        return None
    return list(zip((lines[0], lines[1] - start, lines[2] - start), inside))


def to_lanes(source: Source, step: Step, name: str) -> None:
    """From pixel by pixel to lanes."""
    _convert(source, step, name, step.target, step.sources[0], "{inside} = {outside}")


def to_rows(source: Source, step: Step, name: str) -> None:
    """From lanes to pixel by pixel."""
    _convert(source, step, name, step.sources[0], step.target, "{outside} = {inside}")


def _convert(source: Source, step: Step, name: str, inner: Buffer, outer: Buffer, assignment: str) -> None:
    height, width, channels = step.node.shape
    (piece_height, piece_width), count = inner.lanes.piece, inner.lanes.count
    rows, columns = outer.rows_and_columns()
    # Where the pixel of each lane is; those outside of the image are left out.
    pixels = []
    for r in range(piece_height):
        for q in range(piece_width):
            for down in range(inner.lanes.grid[0]):
                for across in range(inner.lanes.grid[1]):
                    h, v = down * piece_height + r, across * piece_width + q
                    pixels.append(rows[h] + columns[v] if h < height and v < width else -1)
    table = source.table(f"{name}_pixels", pixels, "int32_t")
    is_whole = inner.lanes.covers(step.node.shape)
    to_inner = assignment.startswith("{inside}")
    inside, outside = ("y", "x") if to_inner else ("x", "y")
    statement = assignment.format(inside=f"{inside}[i + l]", outside=f"{outside}[pixel[l] + c]")
    if not is_whole:
        other = f" else {inside}[i + l] = 0.0f;" if to_inner else ""
        statement = f"if (pixel[l] >= 0) {statement};{other}"
    else:
        statement += ";"
    source.parts.append(f"""
static void {name}(const float *restrict x, float *restrict y) {{
  for (int r = 0; r < {piece_height}; ++r)
    for (int q = 0; q < {piece_width}; ++q) {{
      const int32_t *pixel = {table} + (r * {piece_width} + q) * {count};
      for (int c = 0; c < {channels}; ++c) {{
        const size_t i = (size_t)c * {inner.channel} + (size_t)(r * {inner.row} + q * {inner.column} + {inner.first});
        for (int l = 0; l < {count}; ++l) {{ {statement} }}
      }}
    }}
}}
""")
    source.body.append(f"{name}(m + {step.sources[0].offset}, m + {step.target.offset});")


def margin(source: Source, step: Step, name: str) -> None:
    """What stands around a map: zeros, or copies of the neighbours' pixels."""
    target = step.target
    if isinstance(target.layout, Rows):
        if any(target.margin):
            above, below, left, right = (
                size * unit for size, unit in zip(target.margin, (1, 1, target.column, target.column))
            )
            source.body.append(
                f"net_rim(m + {target.offset}, {target.shape[0]}, {target.row}, {above}, {below}, {left}, {right});"
            )
        return
    lanes.neighbours(source, target, name)


def _clear(source: Source, target: Buffer) -> None:
    source.body.append(f"memset(m + {target.offset}, 0, sizeof(float) * {target.size});")


def _tables(source: Source, target: Buffer, name: str) -> tuple[str, str]:
    rows, columns = target.rows_and_columns()
    return source.table(f"{name}_rows", rows, "int32_t"), source.table(f"{name}_columns", columns, "int32_t")
