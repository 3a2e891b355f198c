"""Convolutions in tiles of filters: C for maps that lie pixel by pixel."""

import numpy as np

from clicktrain_jax.deploy.c_net.forms import blocks
from clicktrain_jax.deploy.c_net.layouts import Step
from clicktrain_jax.deploy.c_net.source import Source, at, finish

# Vectors of 16 floats that hold sums: with 32 registers of 16 floats, and with fewer or smaller ones.
_WIDE, _NARROW = 16, 4
# Each sum waits for the last product: there must be as many independent ones.
_INDEPENDENT = 8


def emit(source: Source, step: Step, name: str) -> None:
    """Write the functions of a convolution, and its call.

    Args:
        source: to write to.
        step: of kind "tiles".
        name: of the functions.
    """
    node, form, image, target = step.node, step.form, step.sources[0], step.target
    filters = form.filters
    lists: dict[bytes, int] = {}
    offsets: list[int] = []
    begins, counts, places, weights = [], [], [], []
    total = 0
    for entries, values in form.entries(node):
        rows, columns, channels = entries.T
        line = (rows * image.row + columns * image.column + channels * image.channel).astype(np.int64)
        key = line.tobytes()
        if key not in lists:
            lists[key] = len(offsets)
            offsets += line.tolist()
        begins.append(lists[key])
        counts.append(len(line))
        places.append(total)
        weights.append(values.reshape(-1))
        total += len(line)
    tiles = len(counts)
    bias = np.zeros(tiles * filters, np.float32)
    bias[: len(node.bias)] = node.bias
    table = source.table(f"{name}_offsets", offsets, "int32_t")
    begin = source.table(f"{name}_begins", begins, "int32_t")
    count = source.table(f"{name}_counts", counts, "int32_t")
    place = source.table(f"{name}_places", places, "int32_t")
    all_weights = source.weights(np.concatenate(weights))
    all_bias = source.weights(bias)
    other = step.sources[1] if len(step.sources) == 2 else None
    above, left = node.padding
    row, column = node.strides[0] * image.row, node.strides[1] * image.column
    first = image.first - above * image.row - left * image.column

    def loops(most: int) -> str:
        text = ""
        for top, side, height, width, block_rows, block_columns in blocks(node.shape[0], node.shape[1], most):
            function = _block(source, filters, block_rows, block_columns, node.ops)
            y = f"y + (h * {target.row} + v * {target.column} + {target.first}) + t * {filters}"
            z = ""
            if other is not None:
                z = (
                    f", z + (h * {other.row} + v * {other.column} + {other.first}) + t * {filters}, "
                    f"{other.row}, {other.column}"
                )
            text += f"""    for (int h = {top}; h < {top + height}; h += {block_rows})
      for (int v = {side}; v < {side + width}; v += {block_columns})
        {function}({at(f"x + (h * {row} + v * {column})", first)}, {row}, {column}, off, n, w, bias, {y},
            {target.row}, {target.column}{z});
"""
        return text

    vectors = max(1, filters // 16)
    wide, narrow = loops(_WIDE // vectors), loops(_NARROW // vectors)
    inner = wide if wide == narrow else f"#ifdef NET_WIDE\n{wide}#else\n{narrow}#endif\n"
    z = ", const float *restrict z" if other is not None else ""
    kernel = "x".join(map(str, node.kernel.shape))
    source.parts.append(f"""
/* {node.name}: {kernel}, {total * filters} weights kept, in tiles of {filters} filters. */
static void {name}(const float *restrict x, float *restrict y{z}) {{
  NET_PARALLEL
  for (int t = 0; t < {tiles}; ++t) {{
    const int32_t *off = {table} + {begin}[t];
    const int n = {count}[t];
    const float *w = {all_weights} + (size_t){place}[t] * {filters};
    const float *bias = {all_bias} + t * {filters};
{inner}  }}
}}
""")
    arguments = [f"m + {buffer.offset}" for buffer in (image, target, *step.sources[1:])]
    source.body.append(f"{name}({', '.join(arguments)});")


def _block(source: Source, filters: int, rows: int, columns: int, ops: list) -> str:
    """The function for a block of pixels of one tile."""
    vector, count = (8, 1) if filters == 8 else (16, filters // 16)
    pixels = [(r, c) for r in range(rows) for c in range(columns)]
    ways = max(1, min(4, _INDEPENDENT // (len(pixels) * count)))
    has_other = any(op.name == "add" for op in ops)
    sums = [f"s{p}_{v}" for p in range(len(pixels)) for v in range(count)]
    text = [f"  v{vector} " + ", ".join(f"{s} = load{vector}(bias + {int(s.split('_')[1]) * vector})" for s in sums)]
    for way in range(1, ways):
        text.append(f"  v{vector} " + ", ".join(f"{s}_{way} = splat{vector}(0)" for s in sums))
    text = [line + ";" for line in text]

    def entry(k: str, way: int) -> list[str]:
        body = [f"    {{ const float *xk = x + off[{k}], *wk = w + (size_t)({k}) * {filters};"]
        loads = ", ".join(f"w{v} = load{vector}(wk + {v * vector})" for v in range(count))
        body.append(f"      const v{vector} {loads};")
        fetches = " ".join(f"NET_FETCH(wk + {line});" for line in range(0, filters, 16))
        body.append(f"      {fetches}")
        for p, (r, c) in enumerate(pixels):
            terms = [term for term in (f"{r} * xr" if r else "", f"{c} * xc" if c else "") if term]
            body.append(f"      const v{vector} x{p} = splat{vector}(xk[{' + '.join(terms) or '0'}]);")
            for v in range(count):
                s = f"s{p}_{v}" + (f"_{way}" if way else "")
                body.append(f"      {s} = madd{vector}({s}, w{v}, x{p});")
        return [*body, "    }"]

    if ways > 1:
        text += ["  int k = 0;", f"  for (; k + {ways} <= n; k += {ways}) {{"]
        for way in range(ways):
            text += entry(f"k + {way}", way)
        text += ["  }", "  for (; k < n; ++k) {", *entry("k", 0), "  }"]
        for way in range(1, ways):
            text += [f"  {s} = add{vector}({s}, {s}_{way});" for s in sums]
    else:
        text += ["  for (int k = 0; k < n; ++k) {", *entry("k", 0), "  }"]
    for p, (r, c) in enumerate(pixels):
        for v in range(count):
            other = f"z + {r} * zr + {c} * zc + {v * vector}"
            steps = finish(vector, f"s{p}_{v}", ops, other)
            text.append(f"  {steps} store{vector}(y + {r} * yr + {c} * yc + {v * vector}, s{p}_{v});")
    z = ", const float *z, int zr, int zc" if has_other else ""
    unused = "  (void)xr; (void)xc; (void)yr; (void)yc;" + ("  (void)zr; (void)zc;" if has_other else "")
    head = (
        "NET_INLINE void NAME(const float *x, int xr, int xc, const int32_t *off, int n, const float *w,\n"
        f"    const float *bias, float *y, int yr, int yc{z}) {{"
    )
    number = len(source._functions)
    return source.function(f"tile{filters}_{rows}x{columns}_{number}", "\n".join([head, unused, *text, "}\n"]))
