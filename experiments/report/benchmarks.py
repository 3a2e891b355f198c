"""BENCHMARKS.md from the committed records below experiments/results/bench and experiments/results/gpu."""

from pathlib import Path
from typing import Any

from experiments.records import read_json
from experiments.report import deploy, gpu
from experiments.report.conv import conv_tables, gpu_tables, sweep_table
from experiments.report.exports import collectives_table, dtypes_table, sizes_table
from experiments.report.layers import latency_table, layers_tables
from experiments.report.results import RECORDS, machine, made
from experiments.report.statistics import markdown_table

BENCHMARKS_FILE = Path(__file__).parents[2] / "BENCHMARKS.md"
# What `experiments.bench.gpu_measures` has, named here: a table says what is missing without a GPU's imports.
GPU_MEASURES = {
    "conv-shift": "one pattern a channel: shift and a dense 2x2 convolution, without a kernel of our own",
    "conv-sweeps": "tiles of 16 and 32, and how the kernels' tiles use the second cache",
    "conv-dense": "the dense convolutions of VGG-16 and ResNet-50, NHWC and HWNC",
    "conv-mosaic": "the Hopper kernels on the layers of VGG-16 and ResNet-50, against dense",
    "steps": "whole training steps, dense against pruned",
    "deploy": "exported VGG-13 against its dense form, both layouts, four batch sizes",
    "update-costs": "updates of every phase against the plain optax step",
    "selection": "seconds of the selection with each option, whole VGG-16",
    "training": "images a second of whole VGG-13 epochs",
}
_HEADER = """# Benchmarks

Generated from records by `python -m experiments table --write`; no figure here is typed. Every ratio compares functions
that were called in turns in one process: the median of the ratios of neighbouring calls, for convolutions the ratio of
the medians. Machines are shared and noisy; a row that repeats the first one shows how much.
"""


def generate(folder: Path = RECORDS) -> str:
    """The text of BENCHMARKS.md."""
    parts = [_HEADER]
    records = [read_json(path) for path in sorted((folder / "bench").glob("*.json"))]
    parts += [_section(record) for record in records]
    if not any(record["what"] == "torch" for record in records):
        parts.append("## torch\n\n`python -m experiments bench torch --torch-python ...`: not measured.\n")
    if not any(record["what"] == "latency target" for record in records):
        parts.append("## latency target\n\n`python -m experiments bench latency`: not measured.\n")
    parts.append(deploy.generate(folder))
    parts.append(_deployed(folder / "deploy"))
    parts.append(_gpu(folder / "gpu"))
    parts.append(gpu.benchmarks(folder / "gpu"))
    return "\n".join(part for part in parts if part)


def bench_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `experiments.bench.updates`: medians with 20/80 percentiles, ratios to the first row."""
    header = ("what", "median s", "20%", "80%", "ratio", "goal")
    return markdown_table(
        header,
        [
            (
                row["name"],
                *(f"{row[key]:.3f}" for key in ("median", "p20", "p80")),
                "" if row["ratio"] is None else f"{row['ratio']:.3f}",
                row["goal"],
            )
            for row in rows
        ],
    )


def step_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `experiments.bench.updates.measure_step`: whole updates, times faster than the fastest dense one."""
    # A record of several nets says which.
    several = any("net" in row for row in rows)
    first = ("net",) if several else ()
    header = (*first, "what", "precision", "median s", "20%", "80%", "images/s", "times faster", "goal")
    lines = []
    for row in rows:
        seconds = (f"{row[key]:.4g}" for key in ("median", "p20", "p80"))
        goal = ""
        if row["goal"]:
            goal = f"{row['goal']:g}: {'met' if row['times_faster'] >= row['goal'] else 'not met'}"
        rates = (f"{row['images_per_s']:,.0f}", f"{row['times_faster']:.2f}")
        lines.append((*((row["net"],) if several else ()), row["name"], row["precision"], *seconds, *rates, goal))
    return markdown_table(header, lines)


def torch_table(record: dict[str, Any]) -> str:
    """A record of `experiments.bench.torch_epochs`: the training loop beside eager PyTorch with a host loader."""
    torch, net = record["torch"], record["net"]
    loads = [f"{load[0]:.1f}" for load in record["load_average"]]
    explained = (
        f"{net['name']} of width {net['width']:g}, batches of {record['batch_size']}, float32, trained dense from the "
        f"same weights on the same {record['images']:,} images with the same cores: ours with the images on the device "
        f"and augmentation in the compiled update; {torch['version']}, eager, {torch['threads']} threads and "
        f"{torch['workers']} workers of its loader, which crop, flip and normalise image by image. Whole epochs in "
        f"turns, {record['rounds']} of each after a first one; medians. Load average {loads[0]} at the start, "
        f"{loads[1]} at the end.\n"
    )
    rows = [
        (
            row["name"],
            *(f"{row[key]:,.1f}" for key in ("images_per_s", "p20", "p80")),
            f"{record['images'] / row['images_per_s']:.3g}",
            f"{row['slower']:.2f}",
        )
        for row in record["results"]
    ]
    header = ("loop", "images/s", "20%", "80%", "seconds an epoch", "ours is times faster")
    return f"{explained}\n{markdown_table(header, rows)}"


def input_table(record: dict[str, Any]) -> str:
    """A record of `experiments.bench.input`: the input pipeline beside decoding alone."""
    photos, memory = record["photos"], record["memory_mb"]
    width, height = photos["size"]
    pillow = ""
    if "pillow" in record:
        one = record["pillow"]
        pillow = (
            " by the native library (with Pillow's resize "
            f"{one['images_per_s']:,.0f} images/s, {one['ratio']:.2f} of decoding alone)"
        )
    explained = (
        f"{photos['count']} made-up photographs of {width}x{height} pixels and {photos['bytes'] / 1e3:.0f} kB, as "
        f"ImageNet's are, in the page cache; {record['threads']} threads. Decoding alone: Pillow, from memory into "
        f"arrays that are thrown away; the crop is at random, to {record['image_size']} pixels a side{pillow}. "
        f"The pipeline reads, decodes, crops and puts batches of {record['batch_size']} on the device. Whole passes in "
        f"turns, {record['rounds']} of each; medians. A consumer that takes a quarter longer a batch than the "
        f"pipeline waits for {100 * record['waiting']:.1f}% of its time. Resident memory after each quarter of a pass "
        f"four times as long: "
        f"{', '.join(f'{each:.0f}' for each in memory)} MB.\n"
    )
    rows = []
    for row in record["results"]:
        is_ceiling = row["name"].startswith("decode")
        goal = "" if is_ceiling else f"{record['goal']:g}: {'met' if row['ratio'] >= record['goal'] else 'not met'}"
        rates = (f"{row[key]:,.0f}" for key in ("images_per_s", "p20", "p80"))
        rows.append((row["name"], *rates, f"{row['ratio']:.2f}", goal, f"{row['of_crop']:.2f}"))
    header = ("source", "images/s", "20%", "80%", "of decoding alone", "goal", "of decoding and cropping")
    return f"{explained}\n{markdown_table(header, rows)}"


def tables_of(record: dict[str, Any]) -> str:
    """What `python -m experiments bench` prints, of a record of any kind."""
    tables = {
        "collectives": collectives_table,
        "conv": conv_tables,
        "input": input_table,
        "latency target": latency_table,
        "layers": layers_tables,
        "step": lambda record: step_table(record["results"]),
        "torch": torch_table,
    }
    return tables.get(record["what"], lambda record: bench_table(record["results"]))(record)


def _section(record: dict[str, Any]) -> str:
    return f"## {record['what']}\n\n{made(record)}\n\n{tables_of(record)}"


def _gpu(folder: Path) -> str:
    lines = ["## On a GPU\n", "`python -m experiments bench gpu --out experiments/results/gpu`\n"]
    rows, details = [], []
    for name, what in GPU_MEASURES.items():
        path = folder / f"{name}.json"
        if not path.exists() or read_json(path)["smoke"]:
            rows.append((name, what, "not measured", "", ""))
            continue
        record = read_json(path)
        outcome = "passed" if record["ok"] else "FAILED"
        if record["ok"] and "skipped" in record:
            outcome = f"not measured: {record['skipped']}"
        if record.get("left_out"):
            outcome += f", without {', '.join(record['left_out'])}"
        # A process that was stopped before it had its device knows nothing of it.
        known = "setting" in record
        where = (machine(record), record["setting"]["date"][:10]) if known else ("", "")
        rows.append((name, what, outcome, *where))
        details += [f"\n### {name}\n\n{text}" for text in _details(record)]
    table = markdown_table(("check", "what", "outcome", "device", "date"), rows)
    return "\n".join(lines) + "\n" + table + "".join(details)


def deployed_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `experiments.bench.gpu_exports`: an exported net against its dense form."""
    lines = []
    for row in rows:
        dense, ours = (row["seconds"][name]["median_s"] for name in ("dense (XLA)", "this net"))
        sparse = sum(way.startswith("sparse") for way in row["ways"])
        figures = (f"{1e3 * dense:.3f}", f"{1e3 * ours:.3f}", f"{row['batch'] / ours:,.0f}", f"{dense / ours:.2f}")
        lines.append((row["precision"], row["layout"], row["batch"], f"{sparse} of {len(row['ways'])}", *figures))
    header = ("precision", "layout", "N", "layers by pattern", "dense ms", "this net ms", "images/s", "times faster")
    return markdown_table(header, lines)


def _deployed(folder: Path) -> str:
    """What exports weigh, and what they cost."""
    parts = []
    if (folder / "sizes.json").exists():
        table = sizes_table(read_json(folder / "sizes.json"))
        parts.append(f"## Size of exports\n\n`python -m experiments bench sizes`\n\n{table}")
    of_dtypes = sorted(folder.glob("dtypes-*.json"))
    if not of_dtypes:
        command = "`python -m experiments bench dtypes RUN --data.dir DIR`"
        parts.append(f"## Weights in fewer bits\n\n{command}: not measured.\n")
    for path in of_dtypes:
        record = read_json(path)
        command = f"`python -m experiments bench dtypes RUN --data.dir DIR`; {record['setting']['date'][:10]}"
        parts.append(f"## Weights in fewer bits\n\n{command}\n\n{dtypes_table(record)}")
    return "\n".join(parts)


def _details(record: dict[str, Any]) -> list[str]:
    """The tables of one check's record."""
    tables = []
    if record.get("conv_rows"):
        tables.append(gpu_tables(record))
    if record.get("sweeps"):
        tables.append(sweep_table(record["sweeps"]))
    if record.get("steps"):
        tables.append(step_table(record["steps"]))
    if record.get("deployed"):
        tables.append(deployed_table(record["deployed"]))
    if record.get("rows"):
        tables.append(bench_table(record["rows"]))
    if record.get("images_per_second"):
        rates = [(run, f"{rate:,.0f}") for run, rate in record["images_per_second"].items()]
        tables.append(markdown_table(("run", "images a second"), rates))
    return tables
