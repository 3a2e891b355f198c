"""Convolutions by patterns on a GPU."""

import jax
import numpy as np

from experiments.bench import conv_ways
from experiments.bench.gpu_convolutions import kernels, kernels_missing
from pallas_kernels.pattern_conv import cases

# Real layers among the others; float64 on the CPU takes seconds for each.
LARGE = ("vgg16-n128-16x16-128-128-2.25x", "vgg16-n128-2x2-512-512-8x", "resnet50-n128-14x14-256-256-s2-8x")


def judged(chosen, small):
    """``{(case, direction, way): why it is wrong, or None}``; inputs fresh, outputs poisoned."""
    ours = ("xla", "xla packed") if kernels_missing(small) else ("xla", "xla packed", "mosaic_gpu")
    rng, found = np.random.default_rng(), {}
    for case in chosen:
        problem = conv_ways.make_problem(case, rng)
        for direction in conv_ways.DIRECTIONS:
            # float32 is to mean float32: without this, a GPU rounds a product's factors to TF32.
            with kernels(small)(), jax.default_matmul_precision("highest"):
                wanted = conv_ways.expected(problem, direction, on_cpu=True)
                for way in conv_ways.ways(problem, direction, ours=ours)[0]:
                    _, found[case.name, direction, way.name] = conv_ways.judge(way, direction, wanted, problem)
    return found


def test_every_backend_and_direction_against_float64(small):
    large = [] if small else [case for case in cases.GPU if case.name in LARGE]
    blocks, others = (cases.SMALL_BLOCKS[-1:], cases.SMALL[:2]) if small else (cases.SMALL_BLOCKS, cases.SMALL)
    found = judged([*blocks, *large, *others], small)
    assert {("xla", direction) for direction in conv_ways.DIRECTIONS} <= {(way, what) for _, what, way in found}
    assert not {what: why for what, why in found.items() if why is not None}


def test_what_is_wrong_is_found(small, monkeypatch):
    monkeypatch.setitem(conv_ways.BOUNDS, "float32", 1e-12)
    assert any(judged(cases.SMALL[:1], small).values())
