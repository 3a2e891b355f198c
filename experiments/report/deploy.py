"""Tables of `experiments.bench.deploy`: an exported net beside dense engines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.records import read_json
from experiments.report.results import RECORDS, made
from experiments.report.statistics import markdown_table

FOLDER = "deploy"
THIS_NET, IN_C = "this net", "this net in C"
DENSE_ENGINES = ("dense (native)", "dense (XLA)", "dense (onnxruntime)", "dense (PyTorch)")
# Of these nets at full width, 8x fewer weights: times faster than the fastest dense engine, by filters of a tile.
GOAL_NETS, GOALS = ("vgg13", "resnet18"), {32: 3.0, 1: 2.2}
# Seconds from loading to the first answer; the net in C over the loaded one, in one thread.
STARTUP_GOAL_S, C_GOAL = 1.0, 1.0
_NOT_MEASURED = "not measured"
_EXPLAINED = """Every engine ran in a process of its own on {cores}, in rounds that go from one to the next; the dense
ones run the same net with all of its weights (those that are removed being zero), in float32, BatchNorm folded except
"as trained": by this project's native kernels, by XLA, by other libraries. "This net" is the loaded export, its form
says which kernels ran; "in C" is its net.c. An engine's best form counts. No figure without right logits: within
{tolerance:g} of the largest. Times are medians (20th to 80th percentile); a ratio is an engine's median over this
net's. Load average {load[0]:.1f} at the start, {load[1]:.1f} at the end. {versions}.
"""


def generate(folder: Path = RECORDS) -> str:
    """The part of BENCHMARKS.md about exported nets, from the records bench-*.json."""
    records = [read_json(path) for path in sorted((folder / FOLDER).glob("bench-*.json"))]
    records = [record for record in records if not record["quick"]]
    parts = ["## deploy\n\n`python -m experiments bench deploy EXPORT`: exported nets beside dense engines.\n"]
    if not records:
        parts.append(f"On a CPU: {_NOT_MEASURED}.\n")
    parts += [f"### {title(record)}\n\n{made(record)}\n\n{deploy_tables(record)}" for record in records]
    if all(record["setting"]["device"]["platform"] == "cpu" for record in records):
        parts.append(f"On a GPU: {_NOT_MEASURED}.\n")
    return "\n".join(parts)


def title(record: Mapping[str, Any]) -> str:
    """What net it is, and on how many cores."""
    net, sizes, cores = record["net"]["net"], record["sizes"], record["setting"]["cpu"]["cores"]
    width = "" if net["width"] == 1 else f" of width {net['width']:g}"
    tile = "" if record["tile"] is None else f", tiles of {tuple(record['tile'])}"
    smaller = f"{sizes['conv_weights'] / sizes['conv_kept']:.2f}x fewer convolution weights"
    return f"{net['name']}{width}, {smaller}{tile}, on {cores} {'core' if cores == 1 else 'cores'}"


def deploy_tables(record: Mapping[str, Any]) -> str:
    """Everything about one record: how it was measured, what it comes to, every engine, layer by layer."""
    versions = ", ".join(dict.fromkeys(record["engines"].values()))
    cores = record["setting"]["cpu"]["cores"]
    loads = [load[0] for load in record["load_average"]]
    parts = [
        _EXPLAINED.format(
            cores=f"{cores} {'core' if cores == 1 else 'cores'}",
            tolerance=record["tolerance"],
            load=loads,
            versions=versions,
        ),
        summary_table(record),
        engine_table(record),
        troubles(record),
        start_table(record),
        size_lines(record),
        layer_table(record["layers"]),
    ]
    return "\n".join(part for part in parts if part)


def ratios(batch: Mapping[str, Any]) -> dict[str, float]:
    """Each engine's median over this net's, of one batch size; those that were timed."""
    ours = batch.get(THIS_NET, {}).get("median_s")
    if not ours:
        return {}
    return {name: found["median_s"] / ours for name, found in batch.items() if name != THIS_NET and "median_s" in found}


def summary_table(record: Mapping[str, Any]) -> str:
    """How many times faster than the fastest dense engine and than each of them, by batch size; the net in C."""
    rows = []
    for size, batch in record["batches"].items():
        found = ratios(batch)
        in_c = found.pop(IN_C, None)
        fastest = min(found, key=found.__getitem__, default=None)
        least = _NOT_MEASURED if fastest is None else f"{found[fastest]:.2f}: {fastest}"
        goals = [_met(found[fastest], goal) for goal in [_goal(record)] if goal and fastest]
        # On several cores a loaded net may share one image among them, which is not what C is for.
        if in_c is not None and int(size) == record["setting"]["cpu"]["cores"] == 1:
            goals.append(f"in C at most {C_GOAL:g} of this net's time: {'met' if in_c <= C_GOAL else 'not met'}")
        columns = (f"{found[name]:.2f}" if name in found else _NOT_MEASURED for name in DENSE_ENGINES)
        rows.append((size, least, *columns, "" if in_c is None else f"{in_c:.2f}", "; ".join(goals)))
    header = ("N", "times faster than the fastest dense engine", *DENSE_ENGINES, "in C: times this net's", "goals")
    return markdown_table(header, rows)


def _goal(record: Mapping[str, Any]) -> float | None:
    """How many times faster than the fastest dense engine it shall be; None where nothing is asked."""
    net, sizes = record["net"]["net"], record["sizes"]
    if net["name"] not in GOAL_NETS or net["width"] != 1 or sizes["conv_weights"] / sizes["conv_kept"] > 8.5:
        return None
    # What wider tiles reach is asked of them too.
    filters = 0 if record["tile"] is None else record["tile"][0]
    return next((goal for least, goal in GOALS.items() if filters >= least), None)


def _met(ratio: float, goal: float) -> str:
    return f"{goal:g}: {'met' if ratio >= goal else 'not met'}"


def engine_table(record: Mapping[str, Any]) -> str:
    """Every engine at every batch size."""
    rows = []
    for size, batch in record["batches"].items():
        found = ratios(batch)
        for name, engine in batch.items():
            if "median_s" not in engine:
                continue
            rate = f"{int(size) / engine['median_s']:,.0f}" if int(size) in record["throughput"] else ""
            ratio = f"{found[name]:.2f}" if name in found else ""
            rows.append((size, name, engine["form"], _milliseconds(engine), rate, ratio))
        rows += [(size, name, "", _NOT_MEASURED, "", "") for name in record["unavailable"]]
    return markdown_table(("N", "engine", "best form", "ms a call", "images/s", "times this net's"), rows)


def troubles(record: Mapping[str, Any]) -> str:
    """What was not timed, and why."""
    lines = [f"- {name}: {_NOT_MEASURED}, {reason}" for name, reason in record["unavailable"].items()]
    refused: dict[str, list[str]] = {}
    for size, batch in record["batches"].items():
        for name, engine in batch.items():
            for form, reason in engine["refused"].items():
                what = name if form == "all" else f"{name}, {form}"
                refused.setdefault(f"- {what}, not timed for N = {{}}: {reason}", []).append(size)
    lines += [text.replace("{}", ", ".join(sizes), 1) for text, sizes in refused.items()]
    return "\n".join(lines) + "\n" if lines else ""


def start_table(record: Mapping[str, Any]) -> str:
    """Seconds to the first answer and memory, each engine in a fresh process."""
    rows = []
    for name, start in record["starts"].items():
        memory = [f"{count / 1e6:,.0f}" for count in start["bytes"].values()]
        if any(count is not None for count in start["device_bytes"].values()):
            memory = [
                f"{cell} ({start['device_bytes'][size] / 1e6:,.0f} on the device)"
                for cell, size in zip(memory, start["bytes"])
            ]
        goal = ""
        if name == THIS_NET:
            goal = f"under {STARTUP_GOAL_S:g} s: {'met' if start['seconds'] < STARTUP_GOAL_S else 'not met'}"
        rows.append((name, f"{start['seconds']:.2f}", goal, *memory))
    sizes = list(record["batches"])
    header = ("engine", "s to the first answer", "goal", *(f"MB, N = {size}" for size in sizes))
    # One that failed at a size has fewer columns.
    rows = [(*row, *[_NOT_MEASURED] * (len(header) - len(row))) for row in rows]
    words = (
        "Fresh processes, from loading to the first answer of the smallest batch (the library's own import comes "
        "before, for jax that of jax alone), and the most memory above what the process had with its library.\n"
    )
    return f"{words}\n{markdown_table(header, rows)}"


def size_lines(record: Mapping[str, Any]) -> str:
    """Bytes on disk."""
    sizes = record["sizes"]
    files, needed = sizes["files"], ("manifest.json", "weights.safetensors")
    loaded = sum(files[name] for name in needed)
    others = ", ".join(f"{name} {count / 1e6:.2f} MB" for name, count in files.items() if name not in needed)
    whole, convolutions = sizes["dense_bytes"] / loaded, sizes["conv_dense_bytes"] / sizes["conv_bytes"]
    return (
        f"On disk: {loaded / 1e6:.2f} MB to load ({' and '.join(needed)}) for {sizes['dense_bytes'] / 1e6:.2f} MB of "
        f"dense float32, {whole:.2f}x smaller; convolutions alone, manifest included, {convolutions:.2f}x."
        f"{f' Beside it: {others}.' if others else ''}\n"
    )


def layer_table(layers: list[dict[str, Any]]) -> str:
    """Each convolution alone, dense and by its pattern."""
    rows = []
    for layer in layers:
        dense, pattern = layer["dense_s"], layer["pattern_s"]
        by_pattern = ("", "") if pattern is None else (f"{1e3 * pattern:.3g}", f"{dense / pattern:.2f}")
        rows.append((layer["name"], f"{1e3 * dense:.3g}", *by_pattern, layer["runs"], layer["why"]))
    words = "Each convolution alone, for the smallest batch (its weights stay in a cache, in the net they do not).\n"
    header = ("layer", "dense, ms", "by pattern, ms", "times faster", "runs in the net", "why")
    return f"{words}\n{markdown_table(header, rows)}"


def _milliseconds(engine: Mapping[str, Any]) -> str:
    low, median, high = (1e3 * engine[key] for key in ("low_s", "median_s", "high_s"))
    return f"{median:.3g} ({low:.3g} to {high:.3g})"
