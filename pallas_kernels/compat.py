"""The names that differ between the versions of jax, in one place."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3])

# Mosaic GPU kernels as they are written here, and their interpretation on the CPU, are public from this version on.
HAS_MOSAIC_GPU = VERSION >= (0, 11, 2)
MOSAIC_GPU_NEEDS = "the Mosaic GPU kernels need jax 0.11.2 or later"


@contextlib.contextmanager
def interpreted(**params: Any) -> Iterator[None]:
    """Mosaic GPU kernels traced inside are interpreted on the CPU; ``params`` of `plgpu.InterpretGPUParams`.

    Raises:
        RuntimeError: jax is older than `MOSAIC_GPU_NEEDS` says.
    """
    if not HAS_MOSAIC_GPU:
        raise RuntimeError(f"{MOSAIC_GPU_NEEDS}; this is {jax.__version__}")
    import jax.experimental.pallas.mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
        yield


@contextlib.contextmanager
def traced_for(device_kind: str = "NVIDIA H200", multiprocessors: int = 132) -> Iterator[None]:
    """Functions traced and lowered inside are for such a GPU, whether there is one here or not."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, platform="gpu", num_cores=multiprocessors)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def multiprocessors(x: jax.Array) -> int:
    """Of the GPU that ``x`` is traced for; 2 where none is known, since a kernel can then be interpreted only."""
    for mesh in (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()):
        device = getattr(mesh, "abstract_device", None)
        if device is not None and device.platform == "gpu" and device.num_cores:
            return device.num_cores
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return 2


def platform() -> str:
    """What programs traced now are for, "cpu", "gpu" and so on; of the first device where nothing is said."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    named = getattr(device, "platform", None)
    return named or jax.default_backend()


def varying_like(array: jax.Array, *others: jax.Array) -> jax.Array:
    """``array`` with a type that says along which axes of a `jax.shard_map` it varies: those of the others."""
    axes = frozenset[str]().union(*(_varying(other) for other in others)) - _varying(array)
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def _varying(array: jax.Array) -> frozenset[str]:
    return getattr(getattr(jax.typeof(array), "manual_axis_type", None), "varying", frozenset())


def compiler_options(dtype: jax.typing.DTypeLike) -> dict[str, str]:
    """For ``jax.jit(..., compiler_options=)`` of a net that computes in ``dtype``.

    On CPUs XLA of jax 0.12 fuses 16-bit additions and maxima into programs that read memory nobody has written: whole
    nets give NaN (flax's own too). Without those fusions they do not.
    """
    is_short = jnp.dtype(dtype).itemsize < 4
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if is_short and jax.default_backend() == "cpu" else {}
