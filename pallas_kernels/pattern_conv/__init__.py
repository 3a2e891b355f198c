"""A convolution compiled for the patterns of its kernel."""

from pallas_kernels.pattern_conv.api import BACKENDS, pattern_conv, supported
from pallas_kernels.pattern_conv.structure import Structure, make_structure, mask_of

__all__ = ["BACKENDS", "Structure", "make_structure", "mask_of", "pattern_conv", "supported"]
