"""A net as one C file: no dependency but libm, shapes, patterns and weights compiled in."""

from clicktrain_jax.deploy.c_net.write import HEADER, WEIGHTS, C, to_c

__all__ = ["C", "HEADER", "WEIGHTS", "to_c"]
