"""A convolution compiled for the patterns of its kernel.

The module has the name of its function, and is called like it: ``pallas_kernels.pattern_conv(x, w, structure)`` and
``import pallas_kernels.pattern_conv.mosaic_gpu as mosaic_gpu`` both work.
"""

import inspect
import sys
import types
from typing import Any

from pallas_kernels.pattern_conv.api import (
    BACKENDS,
    LEAST_GAIN,
    dense_conv,
    estimated_gain,
    pack,
    packed_conv,
    pattern_conv,
    supported,
)
from pallas_kernels.pattern_conv.launches import scheduled
from pallas_kernels.pattern_conv.structure import Structure, make_structure, mask_of

__all__ = [
    "BACKENDS",
    "LEAST_GAIN",
    "Structure",
    "dense_conv",
    "estimated_gain",
    "make_structure",
    "mask_of",
    "pack",
    "packed_conv",
    "pattern_conv",
    "scheduled",
    "supported",
]


class _Callable(types.ModuleType):
    __signature__ = inspect.signature(pattern_conv)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return pattern_conv(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
