"""File sizes of every net of the zoo at the published recipes' sparsities, and their table.

    python -m experiments bench sizes --out experiments/results/deploy/sizes.json

Nothing is trained: the selection runs on freshly initialised nets, as accuracy plays no part in a file's size. The
bytes are those of real exports, written and read back.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.deploy import storage
from clicktrain_jax.masks import combine
from clicktrain_jax.trees import named_leaves
from experiments.bench import drawn
from experiments.configs import published
from experiments.configs.base import PruneConfig
from experiments.records import setting, write_json
from experiments.report.exports import ratio, sizes_table

TILES = ((1, 1), (64, 1))
DTYPES = ("float32", "int8")
# Nets of the zoo that have no published recipe, and the share of kernels that makes 8x of patterns of 4 taps in 9.
WITHOUT_RECIPE, SHARE = ("resnet18", "resnet32", "small"), 0.72


def cases() -> list[tuple[str, str, PruneConfig]]:
    """(name, net, how it is pruned) of every published recipe, then of the nets without one."""
    found = [(config.name, config.net, config.prune) for config in published.configs() if config.prune is not None]
    share = PruneConfig(fractions=(SHARE,), coeff=0.0, select_epoch=0, prune_epoch=1)
    return found + [(f"{net}, no recipe, {100 * SHARE:g}%", net, share) for net in WITHOUT_RECIPE]


def measure(
    wanted: Iterable[tuple[str, str, PruneConfig]] | None = None, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Export nets and look at the bytes.

    Args:
        wanted: as from `cases`, by default all.
        log: takes a line a net and tile.

    Returns:
        The record: plain data, ``{"setting": ..., "width": ..., "rows": [{"name", "net", "tile", "patterns",
        "float32": {...}, "int8": {...}}]}`` with counts of weights and sizes in bytes.

    Raises:
        ValueError: an export read back is not what was written.
    """
    rows = []
    variables_of: dict[str, Any] = {}
    for name, net, prune in cases() if wanted is None else wanted:
        model = models.build(net, num_classes=10)
        if net not in variables_of:
            variables_of[net] = drawn.initialised(model, models.default_image_shape(net))
        variables = variables_of[net]
        for tile in TILES:
            masks = drawn.select(model, variables["params"], net, dataclasses.replace(prune, tile=tile))
            row = {"name": name, "net": net, "tile": list(tile), "patterns": prune.num_patterns}
            row |= {dtype: _export(variables, masks, dtype) for dtype in DTYPES}
            rows.append(row)
            log(f"{name}, tile {tile}: {ratio(row['float32']):.2f}x, int8 {ratio(row['int8']):.2f}x")
    return {"setting": setting(), "width": 1.0, "rows": rows}


def _export(variables: Any, masks: ct.Masks, dtype: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        storage.write(Path(folder) / "export", variables, masks, facts={}, dtype=dtype)
        back = storage.read(Path(folder) / "export")
    for (name, given), (_, found) in zip(named_leaves(combine(masks)), named_leaves(combine(back.masks))):
        if given is not None and not bool((given == found).all()):
            raise ValueError(f"the mask of {name!r} was not read back as it was written: sizes would mean nothing")
    sizes = storage.sizes(back.manifest)
    return sizes.convolutions._asdict() | {"headers": sizes.headers, "all_files": sum(sizes.files.values())}


def run(out: Path | None = None) -> str:
    """Bytes of the exports of every published recipe; nothing is trained. Takes 20 minutes.

    Args:
        out: a JSON file to save the record in.
    """
    record = measure(log=lambda line: print(line, flush=True))
    if out is not None:
        write_json(out, record)
    return sizes_table(record)
