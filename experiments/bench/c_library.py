"""A net in C as a library that is called through ctypes; nothing of jax is needed to import."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

LIBRARY = "net.so"
# Several images side by side, each in a thread and a workspace of its own; else all threads take one image.
_DRIVER = """
#include <omp.h>
#include <stdlib.h>
#include "net.h"

int bench_classes(void) { return NET_CLASSES; }
int bench_load(const char *path) { %s }
void bench_run(const net_pixel *images, int count, float *logits, int threads) {
  static char *spaces[64];
  omp_set_num_threads(threads);
  for (int i = 0; i < threads; ++i)
    if (!spaces[i]) spaces[i] = aligned_alloc(64, (NET_WORKSPACE_BYTES + 63) / 64 * 64);
#pragma omp parallel for schedule(static) if (count > 1)
  for (int i = 0; i < count; ++i)
    net_run_in(images + (size_t)i * NET_HEIGHT * NET_WIDTH * NET_CHANNELS, logits + (size_t)i * NET_CLASSES,
               spaces[omp_get_thread_num()]);
}
"""


def compile_c(files: Mapping[str, bytes], folder: Path) -> None:
    """Compile a net in C for this machine, as `LIBRARY`; its compiler's name and version go into a text beside it.

    Args:
        files: of `clicktrain_jax.deploy.c_net.to_c`.
        folder: to write into.

    Raises:
        ValueError: there is no compiler, or it refuses the source.
    """
    for name, data in files.items():
        (folder / name).write_bytes(data)
    load = "return net_load(path);" if "net.weights" in files else "(void)path; return 0;"
    (folder / "driver.c").write_text(_DRIVER % load)
    compiler = os.environ.get("CC", "cc")
    flags = ["-std=c11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        command = [compiler, *flags, "net.c", "driver.c", "-o", LIBRARY, "-lm"]
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except OSError as reason:
        raise ValueError(f"no compiler: {reason}") from reason
    except subprocess.CalledProcessError as reason:
        words = reason.stderr.strip().splitlines() or ["?"]
        error = next((line for line in words if "error" in line), words[0])
        raise ValueError(f"{compiler} failed: {error}") from reason
    (folder / f"{LIBRARY}.txt").write_text(version.splitlines()[0])
