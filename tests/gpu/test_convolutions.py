"""Convolutions by patterns on a GPU."""

import math

from experiments.bench import gpu_conv_checks


def test_every_backend_and_direction_against_float64(small):
    *_, found = gpu_conv_checks.check_correctness(small, math.inf)
    assert found["judged"] and not found["wrong"] and not found["left_out"]
