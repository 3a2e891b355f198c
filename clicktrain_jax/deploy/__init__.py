"""Pruned nets made fast: the one room that uses `pallas_kernels`, and it imports them when they are needed."""

from clicktrain_jax.deploy.accelerate import Accelerated, AccelerateReport, ConvolutionReport, accelerate
from clicktrain_jax.deploy.export import export
from clicktrain_jax.deploy.inference import InferenceNet
from clicktrain_jax.deploy.load import inference_net, load
from clicktrain_jax.deploy.portable import PortableNet
from clicktrain_jax.deploy.structures import structures
from clicktrain_jax.deploy.timing import layer_times

__all__ = [
    "AccelerateReport",
    "Accelerated",
    "ConvolutionReport",
    "InferenceNet",
    "PortableNet",
    "accelerate",
    "export",
    "inference_net",
    "layer_times",
    "load",
    "structures",
]
