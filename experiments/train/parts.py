"""A batch's gradient as the mean over parts of it: one after the other, to fit the memory, and side by side."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from experiments.train.devices import AXIS, Devices


def in_parts(
    of_images: Callable[..., Any],
    devices: Devices,
    *,
    accumulate: int,
    shards: int,
    ordered: bool,
    unrolled: bool,
    summed: Callable[[Any, Any], Any],
) -> Callable[..., Any]:
    """What is found on a batch, as the mean of what is found on its parts; the function itself where there is one part.

    Of ``accumulate`` smaller batches each has every so manieth image, so that no image moves to another device. Each of
    them is ``shards`` runs of images, and no device has but a part of a run. Which image is in which part does not
    depend on the number of devices.

    Args:
        of_images: ``(params, batch_stats, structures, images, (first, second, lam), key) -> tree`` of floating arrays,
            each of them a mean over images or made of such.
        devices: that the batch is divided over; their number divides ``shards``, or that is 1.
        accumulate: parts one after the other.
        shards: parts side by side.
        ordered: whether what shards have is summed in their order, whatever the number of devices.
        unrolled: whether the parts that follow each other are written out. XLA's convolutions in a loop are slow on
            CPUs; on a GPU a loop keeps one part's activations alone.
        summed: ``(found, retained) -> found``, the sum over the devices, where they do not send all that their shards
            have.

    Returns:
        A function like ``of_images``, with one argument more, ``retained`` for ``summed``; its results are float32 or
        wider.
    """
    if accumulate * shards == 1:
        return lambda *arguments: of_images(*arguments[:-1])
    sends = devices.mesh is not None and shards > 1

    def of_shards(
        params: Any, batch_stats: Any, structures: Any, images: Any, labels: Any, lam: Any, keys: Any, retained: Any
    ) -> Any:
        """Of those on a device."""
        found = []
        for one in range(len(keys)):
            own = jax.tree.map(lambda array: array[one], (images, labels, keys))  # noqa: B023
            # What is fused with what lies around a shard depends on how many there are, and may round otherwise.
            own_images, own_labels, key = jax.lax.optimization_barrier(own) if ordered else own
            result = _wide(of_images(params, batch_stats, structures, own_images, (*own_labels, lam), key))
            found.append(jax.lax.optimization_barrier(result) if ordered else result)
        if sends and ordered:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
            stacked = jax.lax.all_gather(stacked, AXIS, tiled=True)
            found = [jax.tree.map(lambda leaf: leaf[one], stacked) for one in range(shards)]  # noqa: B023
        total = functools.reduce(_sum, found)
        if sends and not ordered:
            total = summed(total, retained)
        return jax.tree.map(lambda leaf: leaf / shards, total)

    if sends:
        along, whole = PartitionSpec(AXIS), PartitionSpec()
        of_part = jax.shard_map(
            of_shards,
            mesh=devices.mesh,
            in_specs=(whole, whole, whole, along, along, whole, along, whole),
            out_specs=whole,
            check_vma=False,  # else a gradient in what all devices have is summed over them unasked
        )
    else:
        of_part = of_shards

    def found(params: Any, batch_stats: Any, structures: Any, images: Any, labels: Any, key: Any, retained: Any) -> Any:
        first, second, lam = labels
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(accumulate * shards))
        parts = jax.tree.map(lambda array: _parts(array, accumulate, shards), (images, (first, second)))
        parts = *devices.divided(parts, 1 if shards > 1 else 2), keys.reshape(accumulate, shards)

        def once(part: Any) -> Any:
            images, labels, keys = part
            return of_part(params, batch_stats, structures, images, labels, lam, keys, retained)

        if accumulate == 1:
            return once(jax.tree.map(lambda array: array[0], parts))
        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(once, jax.tree.map(lambda array: array[0], parts)),
        )
        total, _ = jax.lax.scan(lambda total, part: (_sum(total, once(part)), None), nothing, parts, unroll=unrolled)
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    return found


def _parts(array: jax.Array, accumulate: int, shards: int) -> jax.Array:
    """(batch, ...) -> (accumulate, shards, images, ...)."""
    return jnp.moveaxis(array.reshape(shards, -1, accumulate, *array.shape[1:]), 2, 0)


def _sum(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _wide(tree: Any) -> Any:
    """Sums of short floats would lose what the last ones add."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree)
