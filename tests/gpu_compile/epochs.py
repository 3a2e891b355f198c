"""The training loop's epochs of VGG-13 on CIFAR-10 in bfloat16, compiled for an H200, and what their loops do.

    JAX_PLATFORMS=cpu PYTHONPATH=. .venv-gpu-compile/bin/python tests/gpu_compile/epochs.py RECORD.json

writes the counts of `CASES`, and keeps what the record holds under other names. ``--hlo FOLDER`` keeps the programs.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments import configs
from experiments.bench import step as bench_step
from experiments.configs.base import PruneConfig
from experiments.data import Dataset
from experiments.records import read_json, write_json
from experiments.train.state import Images
from experiments.train.step import Trainer
from experiments.train.update import update_loop
from pallas_kernels.pattern_conv import mosaic_gpu
from tests.program_counts import epoch_loop

IMAGES = 50_000
# (kind of `Trainer`'s loops, images of an update).
CASES = (("dense", 128), ("dense", 512), ("masked", 128), ("pruned", 128), ("pruned", 512))


def epoch(kind: str, batch: int, net: str = "vgg13") -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``(function, arguments)`` of a loop over an epoch; the arguments are shapes.

    Args:
        kind: "dense", "masked" or "pruned"; the last two at 8x in blocks of (64, 64).
        batch: images of an update.
        net: a name of `clicktrain_jax.models.names`.
    """
    config = configs.get("vgg13-cifar10-dense")
    prune = PruneConfig(fractions=(), target=8.0, coeff=1e-4, select_epoch=1, prune_epoch=2, tile=(64, 64), floor=False)
    loop = dataclasses.replace(config.loop, epoch_program="scan", convolution="xla")
    config = dataclasses.replace(
        config, net=net, batch_size=batch, precision="bfloat16", method=None if kind == "dense" else prune, loop=loop
    )
    # Never copied to the device: programs are compiled for shapes.
    images, labels = np.zeros((4 * batch, 32, 32, 3), np.uint8), np.zeros(4 * batch, np.int32)
    dataset = Dataset("zeros", images, labels, images, labels, 10, (0.5,) * 3, (0.25,) * 3, "test", "raw", "none")
    trainer = Trainer(config, dataset, platform="gpu")
    structures: dict[str, Any] = {}
    if kind == "pruned":
        state, structures = bench_step.pruned_state(trainer)
    else:
        state = jax.eval_shape(trainer.fresh, jax.random.key(0))
    steps = -(-IMAGES // batch)
    trainer.steps_per_epoch = steps
    shape = jax.ShapeDtypeStruct
    data = Images(shape((IMAGES, 32, 32, 3), jnp.uint8), shape((IMAGES,), jnp.int32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    order = shape((steps * batch,), jnp.int32)
    arguments = state, shape((steps, 2), jnp.float32), data, order, shape((), jnp.int32), key, structures
    way = "pattern_hwnc" if structures else "dense"
    return update_loop(trainer, kind, batch, way, steps), arguments


def compiled(h200: ModuleType, kind: str, batch: int, net: str = "vgg13") -> str:
    """The text of the program of `epoch`, optimised for an H200.

    It is compiled past `h200.compile_for_h200`, whose dumps of kernels nobody reads here.
    """
    with mock.patch.object(mosaic_gpu, "why_not_here", lambda: None):
        function, arguments = epoch(kind, batch, net)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=h200.placement()), arguments
        )
        return jax.jit(function, donate_argnums=(0, 1)).trace(*placed).lower().compile().as_text()


def main(arguments: list[str]) -> None:
    """Record the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", help="cases, as in dense-128")
    parser.add_argument("--hlo", type=pathlib.Path)
    asked = parser.parse_args(arguments)
    spec = importlib.util.spec_from_file_location("h200", pathlib.Path(__file__).with_name("h200.py"))
    h200 = sys.modules["h200"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(h200)
    for kind, batch in CASES:
        name = f"{kind}-{batch}"
        if asked.only and name not in asked.only:
            continue
        text = compiled(h200, kind, batch)
        if asked.hlo:
            (asked.hlo / f"{name}.hlo").write_text(text)
        record = read_json(asked.record) if asked.record.exists() else {}
        record[name] = epoch_loop(text).record()
        write_json(asked.record, record)
        print(name, record[name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
