"""A matrix product as a Mosaic GPU kernel: TMA into shared memory, wgmma, pipelined. To try the harness on."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def make(rows: int, columns: int, steps: int = 3, name: str = "product"):
    """(a (M, K), b (K, N)) bfloat16 -> (M, N) bfloat16 in tiles of (rows, columns), ``steps`` copies ahead."""
    inner = 64
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matmul(a, b):
        def kernel(a_gmem, b_gmem, out_gmem, out_smem, total):
            row, column = jax.lax.axis_index("row"), jax.lax.axis_index("column")

            def step(_, a_smem, b_smem):
                plgpu.wgmma(total, a_smem, b_smem)
                plgpu.wgmma_wait(1)

            plgpu.emit_pipeline(
                step,
                grid=(a.shape[1] // inner,),
                in_specs=[
                    plgpu.BlockSpec((rows, inner), lambda k: (row, k), transforms=transforms, delay_release=1),
                    plgpu.BlockSpec((inner, columns), lambda k: (k, column), transforms=transforms, delay_release=1),
                ],
                max_concurrent_steps=steps,
            )(a_gmem, b_gmem)
            out_smem[...] = total[...].astype(out_smem.dtype)
            plgpu.commit_smem()
            place = out_gmem.at[pl.ds(row * rows, rows), pl.ds(column * columns, columns)]
            plgpu.copy_smem_to_gmem(out_smem, place)
            plgpu.wait_smem_to_gmem(0)

        kernel.__name__ = name
        return plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), jnp.bfloat16),
            grid=(a.shape[0] // rows, b.shape[1] // columns),
            grid_names=("row", "column"),
            scratch_types={
                "out_smem": plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=transforms),
                "total": plgpu.ACC((rows, columns), jnp.float32),
            },
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        )(a, b)

    return matmul
