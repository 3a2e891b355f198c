"""What training costs, beside seconds: multiply-adds and memory."""

import math
from typing import Any

import jax

import clicktrain_jax as ct
from clicktrain_jax import models


def multiply_adds(trainer: Any, state: Any) -> int:
    """Of the last epoch's updates as they were run, forward and backward: three times the forward ones.

    Args:
        trainer: `experiments.train.step.Trainer`, after the epoch.
        state: its state; a narrowed net counts as it is, layers that ran by pattern count what they retain.
    """
    sizes = models.output_sizes(trainer.model, trainer.image_shape)
    dense = ct.report(state.params, None, output_sizes=sizes).multiply_adds
    parts = [part for *_, first, end in trainer.ran for part in trainer.by_batch_size(first, end)]
    by_pattern_images, pruned = trainer.images_by_pattern, dense
    if by_pattern_images:
        by_pattern = set(trainer.pruned.choice.layers)
        retained = ct.report(state.params, trainer.masks(state), output_sizes=sizes)
        pruned = sum(
            (layer.retained_multiply_adds if layer.name in by_pattern else layer.multiply_adds) or 0
            for layer in retained.layers
        )
    images = sum((end - first) * batch for first, end, batch in parts) - by_pattern_images
    return 3 * (images * dense + by_pattern_images * pruned)


def size_of(tree: Any) -> int:
    """Bytes of all arrays, or of their `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_of(program: Any) -> int:
    """What a compiled program holds at its peak; 0 where the backend does not tell."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes
