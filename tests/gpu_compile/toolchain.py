"""Is what it takes to compile for an H200 installed? Imports no jax, so that asking changes nothing."""

import importlib.util
import pathlib

HOW = "`make test-gpu-compile` makes an environment that has it"


def why_not() -> str | None:
    """None if this environment can compile for an H200, else the reason, for a skip."""
    for module in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"cannot compile for an H200: no {module} here; {HOW}"
    for tool in ("ptxas", "nvlink", "nvdisasm"):
        root = cuda_root()
        if root is None or not (root / "bin" / tool).exists():
            return f"cannot compile for an H200: no {tool} of the nvidia-cuda-* packages here; {HOW}"
    return None


def cuda_root() -> pathlib.Path | None:
    """Where the nvidia-cuda-* packages lie, None if there are none."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else [pathlib.Path(folder) / "cu13" for folder in found.submodule_search_locations]
    return next((folder for folder in folders if folder.is_dir()), None)
