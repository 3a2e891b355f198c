"""Tables of bytes: exports (`experiments.bench.sizes`), weights in fewer bits (`experiments.studies.dtypes`), gradients
between devices (`experiments.bench.collectives`)."""

from typing import Any

from experiments.report.statistics import coding, markdown_table

_MB = 1e6


def ratio(part: dict[str, int]) -> float:
    """Dense float32 convolutions over the exported ones with all of the manifest and the file's header."""
    return 4 * part["weights"] / stored(part)


def stored(part: dict[str, int]) -> int:
    """Bytes of the exported convolutions: values, indices and scales, and all of the headers."""
    return part["values"] + part["indices"] + part["scales"] + part["headers"]


def sizes_table(record: dict[str, Any]) -> str:
    """The table, in Markdown, with a word on what it shows."""
    tiles = tuple(dict.fromkeys(tuple(row["tile"]) for row in record["rows"]))
    by_name: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for row in record["rows"]:
        by_name.setdefault(row["name"], {})[tuple(row["tile"])] = row
    header = ["convolutions of", "float32 MB", "weights kept"]
    for tile in tiles:
        header += [f"{tile} MB", "of it indices", "ratio", "int8 MB", "int8 ratio"]
    body = []
    for name, rows in by_name.items():
        weights, kept = rows[tiles[0]]["float32"]["weights"], rows[tiles[0]]["float32"]["kept"]
        line = [name, f"{4 * weights / _MB:.2f}", f"{100 * kept / weights:.1f}%"]
        for tile in tiles:
            whole, small = rows[tile]["float32"], rows[tile]["int8"]
            line += [f"{stored(whole) / _MB:.2f}", f"{100 * whole['indices'] / stored(whole):.1f}%"]
            line += [f"{ratio(whole):.2f}x", f"{stored(small) / _MB:.2f}", f"{ratio(small):.2f}x"]
        body.append(tuple(line))
    where = record["setting"]
    return (
        "Sizes of exports at the published recipes' sparsities (shares of kernels removed in each layer; the recipes' "
        "own patterns), and of nets without a recipe at one share for all layers: in the paper's form, a choice for "
        "every kernel, and the same shares in tiles of 64 filters that share pattern and removal. A ratio is dense "
        "float32 over the export's convolutions with indices, scales, manifest and headers. Masks by the size of "
        "freshly initialised weights: accuracy plays no part in sizes. "
        f"jax {where['versions']['jax']}, {where['date'][:10]}.\n\n"
        f"{markdown_table(tuple(header), body)}"
    )


def dtypes_table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    examples = record["examples"]
    rows = [
        (
            row["dtype"],
            f"{100 * row['top1']:.2f}",
            f"{round((row['top1'] - record['run_top1']) * examples):+d}",
            f"{row['conv_bytes'] / 1e6:.3f}",
            f"{row['conv_ratio']:.2f}x",
        )
        for row in record["rows"]
    ]
    header = ("weights stored as", "top-1, %", "images against the run", "convolutions, MB", "than dense float32")
    return (
        markdown_table(header, rows) + f"\n{record['name']}, seed {record['seed']}, {record['data']['name']} "
        f"({coding(record['data']['encoding'])}), {record['split']} set of {examples}; the run itself has "
        f"{100 * record['run_top1']:.2f}. Weights are widened again when a net is loaded: what is saved is storage.\n"
    )


def collectives_table(record: dict[str, Any]) -> str:
    """What an update's reductions carry, as Markdown."""
    header = ("recipe", "whole MB", "retained MB", "times fewer", "of convolutions")
    rows = []
    for row in record["rows"]:
        whole, compact = row["float32"]["dense"], row["float32"]["compact"]
        convolutions = row["convolutions"]["dense"] / row["convolutions"]["compact"]
        rows.append(
            (
                row["name"],
                f"{whole / _MB:.2f}",
                f"{compact / _MB:.2f}",
                f"{whole / compact:.2f}x",
                f"{convolutions:.2f}x",
            )
        )
    where = record["setting"]
    return (
        f"What a device puts into an update's all-reduce, read from programs compiled for {record['devices']} devices: "
        "the whole gradient in float32, and the retained weights alone (`ct.reduction`), from the prune on. Masks by "
        f"the size of freshly initialised weights. jax {where['versions']['jax']}, {where['date'][:10]}.\n\n"
        f"{markdown_table(header, rows)}"
    )
