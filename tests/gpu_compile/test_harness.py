"""The harness tells apart what later tests rely on: tensor cores, TMA, spills, shared memory, which kernel is which."""

import re

import jax
import jax.numpy as jnp
import pytest


def products(kernel):
    """The widths of the wgmma instructions in the disassembly."""
    return {int(width) for width in re.findall(r"HGMMA\.64x(\d+)x16", kernel.sass)}


def test_the_described_device_is_an_h200(h200):
    (device,) = h200.topology_devices()
    assert (device.device_kind, device.platform, device.core_count) == ("NVIDIA H200", "gpu", 132)


def test_a_product_takes_tensor_cores_and_tma_and_does_not_spill(h200, matmul):
    program = h200.compile_for_h200(matmul.make(128, 128), h200.shape(512, 256), h200.shape(256, 512))
    (kernel,) = program.kernels
    assert kernel.tensor_core > 0 and kernel.tma_loads > 0 and kernel.count("UTMASTG") == 1
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == kernel.stack_bytes == kernel.local_memory == 0
    assert products(kernel) == {128} and 128 < kernel.registers <= 255
    # Three steps of two 128 x 64 tiles in flight, and the 128 x 128 of the result.
    assert program.shared_bytes == (3 * 2 * 128 * 64 + 128 * 128) * 2
    assert "sm_90a" in kernel.ptx and "wgmma.mma_async" in kernel.ptx


def test_kernels_of_one_program_are_told_apart_and_remembered(h200, matmul):
    narrow, wide, other = matmul.make(64, 64), matmul.make(64, 128), matmul.make(64, 128, name="other")

    def all_of_them(a, b):
        return other(a, b) + narrow(a, b) + wide(a * 2, b) + narrow(a, b * 2)

    shapes = h200.shape(512, 256), h200.shape(256, 512)
    assert len(h200.compile_for_h200(all_of_them, *shapes).kernels) == 3
    for function, name, width in ((narrow, "product", 64), (wide, "product", 128), (other, "other", 128)):
        (kernel,) = h200.compile_for_h200(lambda a, b, f=function: f(a, b) + 1, *shapes).kernels
        assert kernel.name.startswith(name) and products(kernel) == {width}


def test_what_does_not_fit_registers_is_seen_to_spill(h200, matmul):
    program = h200.compile_for_h200(matmul.make(192, 256, steps=2), h200.shape(384, 128), h200.shape(128, 256))
    (kernel,) = program.kernels
    assert kernel.spill_store_bytes > 0 and kernel.spill_load_bytes > 0 and kernel.local_memory > 0


def test_too_much_shared_memory_is_an_error(h200, matmul):
    with pytest.raises(Exception, match="(?i)shared memory|smem"):
        h200.compile_for_h200(matmul.make(128, 128, steps=8), h200.shape(512, 1024), h200.shape(1024, 512))


def test_a_dense_convolution_is_left_to_cudnn(h200):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    program = h200.compile_for_h200(convolve, h200.shape(128, 28, 28, 128), h200.shape(3, 3, 128, 128))
    assert program.kernels == () and "__cudnn$convForward" in program.hlo


def test_a_kernel_compiled_past_the_harness_is_an_error(h200, matmul):
    function, shapes = matmul.make(64, 64, name="hidden"), (h200.shape(512, 256), h200.shape(256, 512))
    placed = [jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=h200.placement()) for s in shapes]
    jax.jit(function).trace(*placed).lower().compile()
    with pytest.raises(RuntimeError, match="compile_for_h200 alone"):
        h200.compile_for_h200(function, *shapes)
