"""Convolutions that do the retained share of the work: arrays in, arrays out, knowing nothing of training."""

from pallas_kernels.pattern_conv import BACKENDS, Structure, make_structure, mask_of, pattern_conv, supported

__all__ = ["BACKENDS", "Structure", "make_structure", "mask_of", "pattern_conv", "supported"]
