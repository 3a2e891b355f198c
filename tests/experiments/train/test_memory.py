"""What is freed stays with the process: taken again, its pages are not new."""

import platform
import subprocess
import sys

import pytest

# In a process of its own, as the setting stays. Page faults of a buffer taken and filled several times.
COUNT = """
import ctypes, resource, sys
from experiments.train.memory import keep_freed

if sys.argv[1] == "keep":
    assert keep_freed()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
size, faults = 80 << 20, []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(size)
    ctypes.memset(block, 1, size)
    library.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_are_taken_once():
    found = {}
    for how in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
        found[how] = [int(count) for count in done.stdout.split()]
    assert found["keep"][0] > 30 and sum(found["keep"][1:]) < found["keep"][0] / 10
    assert min(found["plain"][1:]) > found["plain"][0] / 2
