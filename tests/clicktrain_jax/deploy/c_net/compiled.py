"""Compilers for the tests of nets in C, and the nets run by them."""

import functools
import platform
import shutil
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from clicktrain_jax.deploy.c_net import to_c

WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror")
# Reads images from its input and writes logits, one image a call; the weights' file comes first where there is one.
MAIN = """
#include "net.h"
#include <stdio.h>
int main(int count, char **arguments) {
#ifdef APART
  if (count != 2 || net_load("nowhere") != -1 || net_load(arguments[1])) return 3;
#else
  (void)count; (void)arguments;
#endif
  static net_pixel image[NET_HEIGHT * NET_WIDTH * NET_CHANNELS];
  static float logits[NET_CLASSES], again[NET_CLASSES];
  static union { float floats[NET_WORKSPACE_BYTES / 4]; } workspace __attribute__((aligned(64)));
  for (unsigned i = 0; i < NET_WORKSPACE_BYTES / 4; ++i) workspace.floats[i] = 1e30f; /* whatever is in it */
  while (fread(image, sizeof image, 1, stdin) == 1) {
    net_run(image, logits);
    net_run_in(image, again, workspace.floats);
    for (int i = 0; i < NET_CLASSES; ++i)
      if (logits[i] != again[i]) return 4;
    fwrite(logits, sizeof logits, 1, stdout);
  }
  return 0;
}
"""


def needs(*programs):
    """Skips the test where a program is missing, and says which."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@functools.cache
def instructions():
    """Flags for the vectors that this machine has and the compiler knows, the widest last."""
    found = [()]
    if platform.machine() != "x86_64":
        return found
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else ""
    if {"avx2", "fma"} <= set(text.split()):
        found.append(("-mavx2", "-mfma"))
    if "avx512f" in text.split():
        found.append(("-mavx512f", "-mfma"))
    return found


def build(files, folder, compiler="gcc", flags=("-O1",)):
    """Compiles a net into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "main.c").write_text(MAIN)
    apart = ("-DAPART",) if "net.weights" in files else ()
    command = [compiler, *WARNINGS, *flags, *apart, "net.c", "main.c", "-o", "net", "-lm"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]


def call(images, folder, emulator=()):
    """Logits (batch, classes) of the net that was compiled in a folder."""
    arguments = ["net.weights"] if (folder / "net.weights").exists() else []
    done = subprocess.run([*emulator, "./net", *arguments], cwd=folder, input=images.tobytes(), capture_output=True)
    assert done.returncode == 0, (done.returncode, done.stderr.decode()[-3000:])
    return np.frombuffer(done.stdout, np.float32).reshape(len(images), -1)


def images(net, count=3, seed=1):
    """Images of the kind that a net takes."""
    shape = (count, *net.folded.image_shape)
    rng = np.random.default_rng(seed)
    if net.image_dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.normal(size=shape).astype(np.float32)


def check(net, folder, files=None, emulator=(), **how):
    """The logits in C, which are those of the net."""
    x = images(net)
    build(files or to_c(net), folder, **how)
    found = call(x, folder, emulator)
    expected = np.asarray(net(jnp.asarray(x))).reshape(len(x), -1)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    return found
