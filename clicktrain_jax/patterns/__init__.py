"""Pattern sets: the published ones, and sets generated from the scores of a net."""

from clicktrain_jax.patterns.generation import Generated, generate, objective
from clicktrain_jax.patterns.sets import FIXED_SIZES, check_set, fixed_set, parse, to_text
from clicktrain_jax.patterns.tap_sets import candidates

__all__ = [
    "FIXED_SIZES",
    "Generated",
    "candidates",
    "check_set",
    "fixed_set",
    "generate",
    "objective",
    "parse",
    "to_text",
]
