"""Calls of the native kernels in programs for several devices and under `jax.vmap`, where jax divides and maps none."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters.mlir import ir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels import compat

Arrays = tuple[jax.Array, ...]
# For the mesh's axes that images lie along, none where a device has them all: what it runs on its own images.
OnShares = Callable[[tuple[str, ...]], Callable[..., Arrays]]


def call(
    function: OnShares, arguments: Sequence, batched: Sequence[bool], ranks: Sequence[int], results: Sequence[bool]
) -> Arrays:
    """A kernel's results, wherever its images are: where they lie on several devices, each computes its own ones.

    Under `jax.vmap` of the first argument alone the images of all become one batch, where nothing else has a batch.

    Args:
        function: see `OnShares`; its results are a tuple.
        arguments: arrays, images the first one.
        batched: for each argument, whether its first axis is the batch.
        ranks: of the results.
        results: for each result, whether its first axis is the batch; the others are alike on all devices.
    """
    # Inside of `jax.shard_map` a program is divided already, and the older partitioner takes no such rule.
    is_divided = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    is_whole = is_divided or not jax.config.jax_use_shardy_partitioner
    arrays = [jnp.asarray(argument) for argument in arguments]
    whole = function(()) if is_whole else _divisible(function, batched, results)
    mapped: Callable[..., Any] = _mappable(_undifferentiable(whole), folds=sum(batched) == 1 and all(results))
    place = jax.typeof(arrays[0]).sharding
    kinds = zip(place.mesh.axis_names, place.mesh.axis_types)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if explicit:
        # The type says where the images are, and so where the results are.
        specs = [(*(place.spec[:1] if has else ()), *[None] * (rank - has)) for rank, has in zip(ranks, results)]
        places = tuple(NamedSharding(place.mesh, PartitionSpec(*spec)) for spec in specs)
        mapped = jax.sharding.auto_axes(mapped, axes=explicit, out_sharding=places)
    # A call's own type says nothing of it, and what does not vary is taken for the same on all devices.
    return tuple(compat.varying_like(result, *arrays) for result in mapped(*arrays))


def _divisible(function: OnShares, batched: Sequence[bool], results: Sequence[bool]) -> Callable[..., Arrays]:
    divisible = custom_partitioning(function(()))

    def rule(mesh: Any, operands: Sequence[Any], found: Sequence[Any]) -> str:
        names = (f"d{index}" for index in itertools.count())

        def axes(shaped: Any, has_batch: bool) -> str:
            own = [next(names) for _ in range(ir.RankedTensorType(shaped).rank)]
            return " ".join(["batch", *own[1:]] if has_batch else own)

        taken, given = (", ".join(map(axes, *pair)) for pair in ((operands, batched), (found, results)))
        return f"{taken} -> {given}"

    def partition(mesh: Any, operands: Sequence[Any], _: Any) -> tuple:
        along = next(iter(getattr(operands[0].sharding, "spec", ())), None)
        names = () if along is None else along if isinstance(along, tuple) else (along,)
        # What pads an uneven share would be counted with the images.
        if operands[0].shape[0] % math.prod(mesh.shape[name] for name in names):
            names = ()
        whole, own = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(names or None))
        places, found = (tuple(own if has else whole for has in each) for each in (batched, results))

        def alone(*arrays: jax.Array) -> Arrays:
            # An axis whose type says where arrays lie is not to be asked on one device.
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return function(names)(*arrays)

        return mesh, alone, found, places

    divisible.def_partition(partition, sharding_rule=rule)
    return divisible


def _undifferentiable(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """The same function; what would differentiate it, a second derivative say, is told in words."""
    refusing = jax.custom_jvp(function)

    @refusing.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        raise TypeError("native kernels cannot be differentiated further: choose backend='xla' for a second derivative")

    return refusing


def _mappable(function: Callable[..., Arrays], folds: bool) -> Callable[..., Arrays]:
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, is_batched: Sequence[bool], *arrays: jax.Array) -> tuple[Arrays, Any]:
        if folds and is_batched[0] and not any(is_batched[1:]):
            first, *others = arrays
            found = mapped(first.reshape(-1, *first.shape[2:]), *others)
            found = tuple(y.reshape(size, -1, *y.shape[1:]) for y in found)
        else:
            alone = [array for array, batched in zip(arrays, is_batched) if batched]

            def one(parts: list[jax.Array]) -> Arrays:
                own = iter(parts)
                return mapped(*(next(own) if batched else array for array, batched in zip(arrays, is_batched)))

            found = jax.lax.map(one, alone)
        return found, (True,) * len(found)

    return mapped
