"""Convolutions that do the retained share of the work: arrays in, arrays out, knowing nothing of training."""

from typing import TYPE_CHECKING

from pallas_kernels.compat import compiler_options
from pallas_kernels.norm import batch_norm
from pallas_kernels.pattern_conv import (
    BACKENDS,
    LEAST_GAIN,
    Structure,
    dense_conv,
    estimated_gain,
    make_structure,
    mask_of,
    pack,
    packed_conv,
    scheduled,
    supported,
)

if TYPE_CHECKING:
    from pallas_kernels.pattern_conv import pattern_conv
else:
    from pallas_kernels import pattern_conv  # the module, which is called like its function

__all__ = [
    "BACKENDS",
    "LEAST_GAIN",
    "Structure",
    "batch_norm",
    "compiler_options",
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
