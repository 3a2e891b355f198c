"""Whether a net is as fast as a target in time asked: slim VGG-11 and ResNet-18, whole nets beside their dense form.

    python -m experiments bench latency --out experiments/results/bench/latency.json

Masks of random scores, in tiles of 32 filters: accuracy plays no part in speed. To be run on a machine that does
nothing else, a quarter of an hour on two cores; the load before and after is recorded.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.deploy import inference_net
from experiments.records import setting, write_json
from experiments.report.layers import latency_table
from pallas_kernels.tuning import time_together

# Net, width.
NETS = (("vgg11", 0.25), ("resnet18", 1.0))
BATCHES, RATIOS, TILE = (1, 8), (1.25, 1.5, 2.0), (32, 1)
_ROUNDS, _BUDGET_S = 41, 60.0


def run(out: Path | None = None) -> str:
    """Ask nets for a speed, and measure what they reach. Takes a quarter of an hour on an idle machine.

    Args:
        out: a JSON file to save the record in.
    """
    loads = [os.getloadavg()]
    rows = [row for net, width in NETS for batch in BATCHES for row in _rows(net, width, batch)]
    record = {
        "what": "latency target",
        "command": "python -m experiments bench latency",
        "setting": setting(),
        "tile": TILE,
        "load_average": [*loads, os.getloadavg()],
        "results": rows,
    }
    if out is not None:
        write_json(out, record)
    return latency_table(record)


def _rows(name: str, width: float, batch: int) -> list[dict[str, Any]]:
    model = models.build(name, num_classes=10, width=width)
    shape = models.default_image_shape(name)
    images = jax.random.uniform(jax.random.key(1), (batch, *shape))
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    params = variables["params"]
    apply_fn = functools.partial(model.apply, train=False)
    options = {"tile": TILE, "floor": False}
    times = ct.layer_times(apply_fn, variables, images, ct.make_plan(params, target=4.0, **options))
    gradients = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    scores = ct.importance.taylor(params, gradients)

    def program(masks: Any) -> Callable[[], Any]:
        held = variables if masks is None else {**variables, "params": ct.apply_masks(params, masks)}
        net = inference_net(apply_fn, held, masks, image_shape=shape, normalise=None).tuned(batch)
        function, prepared = net.program(batch)
        return lambda: function(prepared, images)

    programs, rows = {"dense": program(None)}, []
    for ratio in RATIOS:
        row: dict[str, Any] = {"net": name, "width": width, "batch": batch, "asked": ratio}
        rows.append(row)
        try:
            plan = ct.make_plan(params, target=ratio, target_of="latency", costs=times, **options)
        except ValueError as error:
            row["refused"] = str(error).partition(" with these rules")[0]
            continue
        masks = ct.select_masks(scores, plan, ct.patterns.fixed_set(4))
        row["left_dense"] = len(times.layers) - len(plan.layers)
        row["conv_compression"] = ct.report(params, masks).conv_compression
        programs[f"{ratio:g}"] = program(masks)
    found = time_together(programs, rounds=_ROUNDS, budget_s=_BUDGET_S)
    for row in rows:
        if (timing := found.get(f"{row['asked']:g}")) is not None:
            row |= {
                "dense_s": found["dense"].median_s,
                "seconds": timing.median_s,
                # Other work on the machine only adds: the 20th percentiles are the better ratio.
                "reached": found["dense"].low_s / timing.low_s,
            }
    return rows
