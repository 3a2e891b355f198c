"""Exported nets on a GPU: are their logits right, and how many images a second do they take?"""

import importlib.util
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from experiments.bench import drawn, timing

# A net's logits may differ by this share of the largest one: bfloat16 has 8 bits, and GPUs take 10 bits of float32.
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}
BATCHES = (1, 8, 128, 512)


def measure(smoke: bool, budget_s: float, packed: str | None) -> Iterator[dict[str, Any]]:
    """VGG-13 pruned 8x in tiles of (64, 1), exported and loaded again: against its own dense form, by batch size."""
    if importlib.util.find_spec("safetensors") is None:
        yield {"skipped": "safetensors is not installed"}
        return
    end = time.monotonic() + budget_s
    rows: list[dict[str, Any]] = []
    left_out = []
    # The small net has no room for wide tiles.
    name, batches, target, tile = ("small", (2,), 4.0, (16, 1)) if smoke else ("vgg13", BATCHES, 8.0, (64, 1))
    nets = list(itertools.product(("bfloat16", "float32"), ("HWNC", "NHWC")))
    for precision, layout in nets[::3] if smoke else nets:
        with tempfile.TemporaryDirectory() as folder:
            expected = drawn.export(Path(folder), name, target, tile, precision=precision)
            net = ct.load(folder, layout=layout)
        for batch in batches:
            if not smoke and time.monotonic() > end:
                left_out.append(f"{precision} {layout} N={batch}")
                continue
            net = net.tuned(batch)
            images = timing.images_of(batch, net.folded.image_shape)
            wanted = np.asarray(expected(images))
            for form in (net, net.dense(batch)):
                error = np.abs(np.asarray(form(images)) - wanted).max() / np.abs(wanted).max()
                if not error <= _TOLERANCE[precision]:
                    raise AssertionError(f"{precision} {layout} N={batch}: logits off by {error:.3g} of the largest")
            images = jnp.asarray(images)
            dense = net.dense(batch, "xla")
            functions = {timing.DENSE: timing.bound(dense, images), timing.OURS: timing.bound(net, images)}
            ways = [f"{row.runs} {row.backend} {row.layout}".strip() for row in net.report(batch).convolutions]
            rows.append(
                {"precision": precision, "layout": layout, "batch": batch, "error": float(error), "ways": ways}
                | {"seconds": timing.seconds_of(functions)}
            )
            yield {"deployed": rows, "left_out": left_out}
    yield {"deployed": rows, "left_out": left_out}
