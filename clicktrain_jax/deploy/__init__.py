"""Pruned nets made fast: the one room that uses `pallas_kernels`, and it imports them when they are needed."""

from clicktrain_jax.deploy.accelerate import (
    Accelerated,
    AccelerateReport,
    ConvolutionReport,
    accelerate,
)
from clicktrain_jax.deploy.structures import structures

__all__ = ["AccelerateReport", "Accelerated", "ConvolutionReport", "accelerate", "structures"]
