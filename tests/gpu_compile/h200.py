"""Compile for an H200 where there is none, and say what the compiler made: registers, spills, instructions.

XLA's CUDA plugin compiles ahead of time for a described device. The description is `h200.txtpb`. Mosaic GPU's dumps
hold the PTX, what `ptxas -v` says and the disassembly. Kernels that XLA itself writes (fusions, reductions) are
compiled too but not dumped; a convolution of cuDNN stays a call.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
import types
from collections.abc import Callable

# Read when jax and the plugin are loaded: no device is to be looked for, and none checked.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

DESCRIPTION = pathlib.Path(__file__).with_name("h200.txtpb")
# Shared memory that one thread block may have on an H200.
SHARED_BYTES_LIMIT = 232448


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the compiler made of one Mosaic GPU kernel.

    Attributes:
        name: its symbol.
        registers: per thread, at launch.
        spill_store_bytes, spill_load_bytes, stack_bytes: per thread, as `ptxas -v` says.
        ptx: the text.
        sass: the disassembly, one instruction a line.
    """

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    ptx: str = dataclasses.field(repr=False)
    sass: str = dataclasses.field(repr=False)

    def count(self, *mnemonics: str) -> int:
        """How many instructions have one of these names, with whatever suffixes ("HGMMA", "UTMALDG.4D")."""
        names = "|".join(re.escape(name) for name in mnemonics)
        return len(re.findall(rf"^.*\*/\s+(?:@!?U?P\w+\s+)?(?:{names})(?![A-Z0-9])", self.sass, re.MULTILINE))

    @property
    def tensor_core(self) -> int:
        """Warpgroup matrix products (wgmma)."""
        return self.count("HGMMA")

    @property
    def tma_loads(self) -> int:
        """Bulk tensor copies from global to shared memory."""
        return self.count("UTMALDG")

    @property
    def async_copies(self) -> int:
        """Copies from global to shared memory that threads start (cp.async)."""
        return self.count("LDGSTS")

    @property
    def local_memory(self) -> int:
        """Loads and stores of thread-local memory: spills, or arrays that did not fit registers."""
        return self.count("LDL", "STL")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
        kernels: its distinct Mosaic GPU kernels, in the order of the program.
        shared_bytes: scratch in shared memory of the kernel that takes most, without its barriers.
        hlo: the optimised program; library calls stand in it as custom calls.
    """

    kernels: tuple[Kernel, ...]
    shared_bytes: int
    hlo: str = dataclasses.field(repr=False)


def shape(*lengths: int, dtype: jax.typing.DTypeLike = jax.numpy.bfloat16) -> jax.ShapeDtypeStruct:
    """An argument of `compile_for_h200`."""
    return jax.ShapeDtypeStruct(lengths, dtype)


def compile_for_h200(function: Callable, *arguments: object) -> Program:
    """Compile ``function`` of these arguments (trees of ShapeDtypeStruct or arrays) for one H200.

    Raises:
        RuntimeError: a kernel of it was compiled in this process past this function, so that nothing was dumped.
        Whatever jax raises where a kernel cannot be lowered or needs more shared memory than there is.
    """
    on_h200 = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement()), arguments)
    with tempfile.TemporaryDirectory(prefix="h200-") as folder:
        previous = os.environ.get("MOSAIC_GPU_DUMP_TO")
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            lowered = jax.jit(function).trace(*on_h200).lower()
            compiled = lowered.compile()
        finally:
            if previous is None:
                del os.environ["MOSAIC_GPU_DUMP_TO"]
            else:
                os.environ["MOSAIC_GPU_DUMP_TO"] = previous
        # Mosaic compiles one after the other, in the order of the program.
        written = sorted(pathlib.Path(folder).glob("*.ptx"), key=lambda path: path.stat().st_mtime_ns)
        dumped = [_read(path) for path in written]
        shared = [_shared_bytes(path) for path in pathlib.Path(folder).glob("*.resources.txt")]
    hlo = compiled.as_text()
    hashes = list(dict.fromkeys(re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', hlo)))
    new = [kernel for kernel in hashes if kernel not in _KERNELS]
    # Mosaic compiles a kernel once in a process, and dumps it then alone.
    if len(new) != len(dumped):
        raise RuntimeError(
            f"{len(new)} kernels are new here but {len(dumped)} were dumped: compile for the H200 through "
            "compile_for_h200 alone in this process"
        )
    _KERNELS.update(zip(new, dumped))
    if hashes and tuple(hashes) not in _SHARED:
        _SHARED[tuple(hashes)] = max(shared)
    return Program(tuple(_KERNELS[kernel] for kernel in hashes), _SHARED.get(tuple(hashes), 0), hlo)


# By the hash that Mosaic gives a kernel; by those of a program.
_KERNELS: dict[str, Kernel] = {}
_SHARED: dict[tuple[str, ...], int] = {}


@functools.cache
def topology_devices() -> list[jax.Device]:
    """The one device that is compiled for; it cannot run anything."""
    from jax.experimental import topologies

    # The tools of the environment, not those that happen to lie on the machine.
    flags = f"--xla_gpu_cuda_data_dir={_toolchain().cuda_root()}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    text = DESCRIPTION.read_text(encoding="utf-8")
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text).devices


@functools.cache
def placement() -> jax.sharding.NamedSharding:
    """Where arguments lie that are compiled for that device."""
    mesh = jax.sharding.Mesh(np.array(topology_devices()[:1]), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def _toolchain() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_compile_toolchain", DESCRIPTION.with_name("toolchain.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(ptx: pathlib.Path) -> Kernel:
    said = ptx.with_suffix(".ptxas").read_text()
    facts = {
        "name": r"Compiling entry function '(\w+)'",
        "registers": r"Used (\d+) registers",
        "spill_store_bytes": r"(\d+) bytes spill stores",
        "spill_load_bytes": r"(\d+) bytes spill loads",
        "stack_bytes": r"(\d+) bytes stack frame",
    }
    values = {}
    for field, pattern in facts.items():
        found = re.search(pattern, said)
        if found is None:
            raise RuntimeError(f"ptxas did not say {field}:\n{said}")
        values[field] = found[1] if field == "name" else int(found[1])
    return Kernel(**values, ptx=ptx.read_text(), sass=ptx.with_suffix(".sass_ctrl").read_text())


def _shared_bytes(path: pathlib.Path) -> int:
    return int(re.search(r"smem_scratch_bytes=(\d+)", path.read_text())[1])
