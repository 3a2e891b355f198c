"""Memory that a process frees and takes again in every update stays with it, where the C library would give it back."""

import ctypes
import platform
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed() -> bool:
    """Have glibc keep what is freed, for this process and from now on; whether that was done.

    XLA takes the memory of a program's intermediate results anew in every call. Blocks of more than 32 MB glibc asks
    of Linux each time, which fills every page with zeros: some 3 ms for the maps of a small net's update, in which a
    pruned net's convolutions take 16. Kept, the pages are there from the second update on. What a process once needed
    it holds until it ends.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
