"""What it costs to store a run's weights in fewer bits: accuracy on its evaluation set, and bytes."""

import tempfile
from pathlib import Path
from typing import Any

from clicktrain_jax.deploy import storage
from experiments.records import setting, write_json
from experiments.report.exports import dtypes_table
from experiments.studies.export import export_run

DTYPES = ("float32", "bfloat16", "float16", "int8")


def measure(run: Path, data_dir: str | None = None) -> dict[str, Any]:
    """Export a finished run in each dtype, and evaluate each export.

    Args:
        run: its folder.
        data_dir: where the images are now, if not where they were.

    Returns:
        A record: accuracies are fractions, sizes are bytes.

    Raises:
        ValueError: as `export_run`.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in DTYPES:
            manifest = export_run(
                run, Path(temporary) / dtype, dtype=dtype, data_dir=data_dir, stablehlo=False, is_timed=False
            )
            sizes, accuracy = storage.sizes(manifest), manifest["facts"]["accuracy"]
            rows.append(
                {
                    "dtype": dtype,
                    "top1": accuracy["top1"],
                    "conv_bytes": sizes.convolutions.stored + sizes.headers,
                    "conv_ratio": sizes.convolution_ratio,
                }
            )
    facts = manifest["facts"]
    return {
        "what": "dtypes",
        "setting": setting(),
        "name": facts["run"]["name"],
        "seed": facts["run"]["seed"],
        "data": facts["data"],
        "split": accuracy["split"],
        "examples": accuracy["examples"],
        "run_top1": accuracy["run_top1"],
        "rows": rows,
    }


def run(path: Path, data_dir: str | None, out: Path | None) -> str:
    """Measure, save the record when asked to, and return the table."""
    record = measure(path, data_dir)
    if out is not None:
        write_json(out, record)
    return dtypes_table(record)
