"""A convolution compiled for the patterns of its kernel."""

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
from pallas_kernels.pattern_conv.mosaic_gpu import scheduled
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
