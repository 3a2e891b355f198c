"""Exported nets on a GPU: are their logits right, and how many images a second do they take?"""

import importlib.util
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax import models
from experiments.configs import PruneConfig
from experiments.deployment import timing
from experiments.recipe import make_plan

# A net's logits may differ by this share of the largest one: bfloat16 has 8 bits, and GPUs take 10 bits of float32.
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}
_SMOKE_WIDTH = 0.25
BATCHES = (1, 8, 128, 512)


def measure(smoke: bool, budget_s: float) -> Iterator[dict[str, Any]]:
    """VGG-13 pruned 8x in tiles of (64, 1), exported and loaded again: against its own dense form, by batch size."""
    if importlib.util.find_spec("safetensors") is None:
        yield {"skipped": "safetensors is not installed"}
        return
    end = time.monotonic() + budget_s
    rows: list[dict[str, Any]] = []
    left_out = []
    width, batches = (_SMOKE_WIDTH, (2,)) if smoke else (1.0, BATCHES)
    nets = list(itertools.product(("bfloat16", "float32"), ("HWNC", "NHWC")))
    for precision, layout in nets[::3] if smoke else nets:
        with tempfile.TemporaryDirectory() as folder:
            expected = _export(Path(folder), width, precision)
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
            functions = {timing.DENSE: timing.bound(net.dense(batch), images), timing.OURS: timing.bound(net, images)}
            ways = [f"{row.runs} {row.backend} {row.layout}".strip() for row in net.report(batch).convolutions]
            rows.append(
                {"precision": precision, "layout": layout, "batch": batch, "error": float(error), "ways": ways}
                | {"seconds": timing.seconds_of(functions)}
            )
            yield {"deployed": rows, "left_out": left_out}
    yield {"deployed": rows, "left_out": left_out}


def _export(folder: Path, width: float, precision: str) -> Any:
    """Export a pruned net that was never trained; returns the masked net's float32 logits as a function of pixels."""
    shape = models.default_image_shape("vgg13")
    model = models.build("vgg13", num_classes=10, width=width)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, *shape)), train=False))(jax.random.key(0))
    # The slim net has no room for wide tiles.
    target, filters = (4.0, 16) if width == _SMOKE_WIDTH else (8.0, 64)
    prune = PruneConfig((), 0.0, select_epoch=0, prune_epoch=1, target=target, tile=(filters, 1), floor=False)
    plan = make_plan(prune, model, variables["params"], shape, "vgg13")
    masks = ct.select_masks(ct.importance.magnitude(variables["params"]), plan, ct.patterns.fixed_set(4))
    variables = {**variables, "params": ct.apply_masks(variables["params"], masks)}
    net = {"name": "vgg13", "num_classes": 10, "width": width, "precision": precision}
    normalise = {"mean": [0.5] * 3, "std": [0.25] * 3}

    def apply_fn(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=False)

    options = {"image_shape": shape, "normalise": normalise, "net": net, "stablehlo": False}
    ct.export(folder, apply_fn, variables, masks, **options)

    def logits(pixels: Any) -> Any:
        # A GPU would compute float32 in TF32.
        with jax.default_matmul_precision("highest"):
            return jax.jit(apply_fn)(variables, (pixels - 0.5) / 0.25)

    return logits
