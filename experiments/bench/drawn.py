"""Nets, exports and images that are drawn at random, for what does not depend on accuracy: size, speed, exactness."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax import models
from experiments.configs import PruneConfig
from experiments.data import Dataset
from experiments.train.recipe import make_plan, pattern_source

# resnet18-8x-32x1: the net, how many times fewer weights its convolutions keep, (filters, channels) of a tile.
NAME = re.compile(r"(?P<net>\w+)-(?P<target>\d+(\.\d+)?)x-(?P<filters>\d+)x(?P<channels>\d+)")


@functools.cache
def images(shape: tuple[int, int, int], count: int, evaluated: int | None = None) -> Dataset:
    """A set of so many random images of 10 classes, evaluated on the first so many of them; on all when None."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, 10, count).astype(np.int32)
    few = pixels[:evaluated], labels[:evaluated]
    return Dataset("random", pixels, labels, *few, 10, (0.5,) * shape[2], (0.25,) * shape[2], "test", "raw", "none")


def initialised(model: Any, image_shape: tuple[int, ...]) -> Any:
    """Variables of a fresh net, from key 0."""
    init = jax.jit(functools.partial(model.init, train=False))
    return init(jax.random.key(0), jnp.zeros((1, *image_shape), jnp.float32))


def select(model: Any, params: Any, net: str, prune: PruneConfig) -> ct.Masks:
    """The masks that a recipe chooses by the size of these weights."""
    plan = make_plan(prune, model, params, models.default_image_shape(net), net)
    patterns = pattern_source(prune)
    return jax.jit(lambda scores: ct.select_masks(scores, plan, patterns))(ct.importance.magnitude(params))


def export_named(name: str, folder: Path, **options: Any) -> bool:
    """Export the net that a name such as "vgg13-8x-64x1" asks for; False for a name of another form.

    Args:
        name: of the form `NAME`.
        folder: to be written.
        options: of `export`.

    Raises:
        ValueError: there is no such net, or the target cannot be reached.
    """
    found = NAME.fullmatch(name)
    if found is None:
        return False
    export(folder, found["net"], float(found["target"]), (int(found["filters"]), int(found["channels"])), **options)
    return True


def export(
    folder: Path,
    name: str,
    target: float,
    tile: tuple[int, int],
    *,
    width: float = 1.0,
    precision: str = "float32",
    **options: Any,
) -> Callable[[Any], Any]:
    """Prune a net with drawn weights towards one target, by their size, and export it.

    Args:
        folder: to be written.
        name: of a net of `clicktrain_jax.models`, for 10 classes.
        target: times fewer weights in all convolutions.
        tile: (filters, channels) that share a pattern and a removal.
        width: of the net.
        precision: that it computes in.
        options: of `clicktrain_jax.export`.

    Returns:
        The masked net's float32 logits as a function of pixels in [0, 1].

    Raises:
        ValueError: there is no such net, or the target cannot be reached.
    """
    shape = models.default_image_shape(name)
    model = models.build(name, num_classes=10, width=width)
    variables = initialised(model, shape)
    prune = PruneConfig((), 0.0, select_epoch=0, prune_epoch=1, target=target, tile=tile, floor=False)
    masks = select(model, variables["params"], name, prune)
    variables = {**variables, "params": ct.apply_masks(variables["params"], masks)}

    def apply_fn(variables: Any, images: Any) -> Any:
        return model.apply(variables, images, train=False)

    ct.export(
        folder,
        apply_fn,
        variables,
        masks,
        image_shape=shape,
        normalise={"mean": [0.5] * shape[2], "std": [0.25] * shape[2]},
        net={"name": name, "num_classes": 10, "width": width, "precision": precision},
        stablehlo=False,
        **options,
    )

    def logits(pixels: Any) -> Any:
        # A GPU would compute float32 in TF32.
        with jax.default_matmul_precision("highest"):
            return jax.jit(apply_fn)(variables, (pixels - 0.5) / 0.25)

    return logits
