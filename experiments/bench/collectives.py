"""What an update sends between devices, whole gradients against the weights that a prune retained, recipe by recipe.

    python -m experiments bench collectives --out experiments/results/bench/collectives.json

Bytes are read from the collectives of programs compiled for two devices (emulated on a CPU, in a process of its own):
what one device puts into the reductions. Nothing is trained: the selection runs on freshly initialised nets, as
accuracy plays no part in what travels.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

import clicktrain_jax as ct
from clicktrain_jax import models
from experiments.bench.drawn import initialised, select
from experiments.bench.sizes import cases
from experiments.configs.base import PruneConfig
from experiments.records import setting, write_json
from experiments.report.exports import collectives_table

_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8}


def reduced(program: str) -> tuple[int, int]:
    """``(bytes, how many)`` of all all-reduces in a compiled program's text; the bytes of one device's operands.

    Raises:
        ValueError: an all-reduce of a dtype that is no gradient's.
    """
    total, count = 0, 0
    for result in re.findall(r"= (.+?) all-reduce(?:-start)?\(", program):
        count += 1
        for dtype, dims in re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", result):
            if dtype not in _BYTES:
                raise ValueError(f"an all-reduce of {dtype}: gradients are floating; expected {sorted(_BYTES)}")
            total += _BYTES[dtype] * math.prod(int(size) for size in dims.split(",") if size)
    return total, count


def measure(
    wanted: Sequence[tuple[str, str, PruneConfig]] | None = None, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Compile the reductions, and read what they carry.

    Args:
        wanted: (name, net, how it is pruned), by default those of `experiments.bench.sizes.cases`.
        log: takes a line a net.

    Returns:
        The record: ``{"setting", "devices", "width", "rows": [{"name", "net", "convolutions": {"dense", "compact"},
        "float32": {"dense", "compact"}}]}``, bytes, of the convolutions alone and of the whole tree. A CPU's programs
        widen bfloat16 sums, so these are of float32 alone.

    Raises:
        ValueError: jax sees one device.
    """
    if jax.device_count() < 2:
        raise ValueError("one device sends nothing: set XLA_FLAGS=--xla_force_host_platform_device_count=2")
    rows = []
    for name, net, prune in cases() if wanted is None else wanted:
        model = models.build(net, num_classes=10)
        params = initialised(model, models.default_image_shape(net))["params"]
        retained = ct.reduction.retained(params, select(model, params, net, prune))
        row: dict[str, Any] = {"name": name, "net": net}
        row["float32"] = {"dense": _bytes(params, None), "compact": _bytes(params, retained)}
        convolutions = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4]
        others = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim != 4)
        row["convolutions"] = {
            "dense": 4 * sum(leaf.size for leaf in convolutions),
            "compact": row["float32"]["compact"] - 4 * others,
        }
        rows.append(row)
        log(f"{name}: {row['convolutions']['dense'] / row['convolutions']['compact']:.2f}x")
    facts = {"setting": setting(), "devices": jax.device_count(), "width": 1.0, "rows": rows}
    return {"what": "collectives", "command": "python -m experiments bench collectives", **facts}


def _bytes(params: Any, retained: ct.reduction.Retained | None) -> int:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))

    def reduce(grads: Any, retained: Any) -> Any:
        grads = jax.tree.map(lambda leaf: leaf[0], grads)
        if retained is None:
            return jax.lax.pmean(grads, "data")
        return ct.reduction.pmean(grads, retained, "data")

    mapped = functools.partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec(), check_vma=False)
    mapped = mapped(reduce, in_specs=(PartitionSpec("data"), PartitionSpec()))
    # A device's own gradient: the leading axis is the devices'.
    split = NamedSharding(mesh, PartitionSpec("data"))
    each = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype, sharding=split), params)
    total, _ = reduced(jax.jit(mapped).lower(each, retained).compile().as_text())
    return total


def run(out: Path | None = None) -> str:
    """Bytes of an update's all-reduce, whole gradients against retained weights, recipe by recipe. Nothing is trained.

    It is measured in a process that sees two devices.

    Args:
        out: a JSON file to save the record in.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.collectives"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
    )
    record = json.loads(done.stdout)
    if out is not None:
        write_json(out, record)
    return collectives_table(record)


if __name__ == "__main__":
    print(json.dumps(measure(log=lambda line: print(line, file=sys.stderr, flush=True))))
