"""Every shape of VGG-16 and ResNet-50 becomes H200 code that uses tensor cores and copies in the background.

Shared memory that does not fit is an error of the compiler, so that compiling at all is a check of it.
"""

import jax
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.pattern_conv import cases, mosaic_gpu

every_case = pytest.mark.parametrize("case", cases.COMPILED, ids=str)


def check(program, h200):
    assert program.kernels
    for kernel in program.kernels:
        assert kernel.tensor_core > 0, f"{kernel.name} does not use the tensor cores"
        assert kernel.tma_loads + kernel.async_copies > 0, f"{kernel.name} waits for its copies"
        spilled = (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.local_memory)
        assert spilled == (0, 0, 0), f"{kernel.name} spills: {spilled}"
    assert 0 < program.shared_bytes <= h200.SHARED_BYTES_LIMIT
    # Nothing is left to a dense library, nor a sum of what is not retained.
    assert "__cudnn$conv" not in program.hlo and "__cublas" not in program.hlo


def arguments(case, h200):
    """(x, w, dy, structure) as shapes, the structure's arrays among them: new masks need no new code."""
    x, w, dy = (h200.shape(*shape, dtype=case.dtype) for shape in (case.x_shape, case.w_shape, case.y_shape))
    structure = cases.structure_of(case, np.random.default_rng(0))
    structure = jax.tree.map(lambda leaf: h200.shape(*leaf.shape, dtype=leaf.dtype), structure)
    reason = mosaic_gpu.why_not(structure, case.geometry(), x.dtype, case.batch)
    assert reason is None, reason
    return x, w, dy, structure


def test_work_is_cut_for_the_multiprocessors_of_an_h200(h200):
    seen = []

    def traced(x):
        seen.append(compat.multiprocessors(x))
        return x + 1

    h200.compile_for_h200(traced, h200.shape(8, 8))
    assert seen == [132]


@every_case
def test_forward(h200, case):
    x, w, _, structure = arguments(case, h200)
    check(h200.compile_for_h200(lambda x, w, s: mosaic_gpu.forward(x, w, s, case.geometry()), x, w, structure), h200)


@every_case
def test_input_gradient(h200, case):
    _, w, dy, structure = arguments(case, h200)
    check(
        h200.compile_for_h200(lambda dy, w, s: mosaic_gpu.input_gradient(dy, w, s, case.geometry()), dy, w, structure),
        h200,
    )


@every_case
def test_weight_gradient(h200, case):
    x, _, dy, structure = arguments(case, h200)
    check(
        h200.compile_for_h200(lambda x, dy, s: mosaic_gpu.weight_gradient(x, dy, s, case.geometry()), x, dy, structure),
        h200,
    )
