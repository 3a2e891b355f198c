"""The counter of kernels and bytes, on a program counted by hand and on one that is compiled here."""

import jax
import jax.numpy as jnp
import pytest

from tests.program_counts import epoch_loop

# A gather of 2 rows of a large array; a sum that updates one entry of 100 in place; a library's convolution; a branch.
HLO = """\
HloModule jit_run, is_scheduled=true

%fused_gather (param_0: f32[1000,8], param_1: s32[2,1]) -> f32[2,8] {
  %param_0 = f32[1000,8]{1,0} parameter(0)
  %param_1 = s32[2,1]{1,0} parameter(1)
  ROOT %gather = f32[2,8]{1,0} gather(%param_0, %param_1), offset_dims={1}
}

%fused_update (param_0.1: f32[100], param_1.1: f32[1], param_2.1: s32[]) -> f32[100] {
  %param_0.1 = f32[100]{0} parameter(0)
  %param_1.1 = f32[1]{0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  ROOT %dynamic-update-slice = f32[100]{0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}

%fused_double (param_0.2: f32[2,8]) -> f32[2,8] {
  %param_0.2 = f32[2,8]{1,0} parameter(0)
  ROOT %add = f32[2,8]{1,0} add(%param_0.2, %param_0.2)
}

%branch (arg: (f32[2,8])) -> f32[2,8] {
  %arg = (f32[2,8]{1,0}) parameter(0)
  %x = f32[2,8]{1,0} get-tuple-element(%arg), index=0
  ROOT %double = f32[2,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_double
}

%other_branch (arg.1: (f32[2,8])) -> f32[2,8] {
  %arg.1 = (f32[2,8]{1,0}) parameter(0)
  ROOT %x.1 = f32[2,8]{1,0} get-tuple-element(%arg.1), index=0
}

%condition (carry.1: (s32[], f32[1000,8], f32[100], s32[2,1])) -> pred[] {
  %carry.1 = (s32[], f32[1000,8]{1,0}, f32[100]{0}, s32[2,1]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry.1), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%body (carry: (s32[], f32[1000,8], f32[100], s32[2,1])) -> (s32[], f32[1000,8], f32[100], s32[2,1]) {
  %carry = (s32[], f32[1000,8]{1,0}, f32[100]{0}, /*index=3*/s32[2,1]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry), index=0
  %data = f32[1000,8]{1,0} get-tuple-element(%carry), index=1
  %sums = f32[100]{0} get-tuple-element(%carry), index=2
  %which = s32[2,1]{1,0} get-tuple-element(%carry), index=3
  %rows = f32[2,8]{1,0} fusion(%data, %which), kind=kLoop, calls=%fused_gather, metadata={op_name="jit(run)/gather"}
  %flag = pred[] constant(true)
  %packed = (f32[2,8]{1,0}) tuple(%rows)
  %mixed = f32[2,8]{1,0} conditional(%flag, %packed, %packed), true_computation=%branch, false_computation=%other_branch
  %conv = (f32[1]{0}, u8[0]{0}) custom-call(%mixed, %rows), custom_call_target="__cudnn$convForward"
  %one = f32[1]{0} get-tuple-element(%conv), index=0
  %copied = f32[1]{0} copy(%one)
  %updated = f32[100]{0} fusion(%sums, %copied, %i.1), kind=kLoop, calls=%fused_update
  ROOT %next = (s32[], f32[1000,8]{1,0}, f32[100]{0}, s32[2,1]{1,0}) tuple(%i.1, %data, %updated, %which)
}

ENTRY %main (a: s32[], b: f32[1000,8], c: f32[100], d: s32[2,1]) -> f32[100] {
  %a = s32[] parameter(0)
  %b = f32[1000,8]{1,0} parameter(1)
  %c = f32[100]{0} parameter(2)
  %d = s32[2,1]{1,0} parameter(3)
  %start = (s32[], f32[1000,8]{1,0}, f32[100]{0}, s32[2,1]{1,0}) tuple(%a, %b, %c, %d)
  %loop = (s32[], f32[1000,8]{1,0}, f32[100]{0}, s32[2,1]{1,0}) while(%start), condition=%condition, body=%body, TRIP
  ROOT %result = f32[100]{0} get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize("trips", [None, 7])
def test_a_program_counted_by_hand(trips):
    known = "" if trips is None else f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    loop = epoch_loop(HLO.replace(", TRIP", f", {known}" if known else ""))
    assert (loop.trip_count, loop.conditionals, loop.inner_loops) == (trips, 1, 0)
    assert {kernel.name: kernel.bytes_moved for kernel in loop.kernels} == {
        "rows": 64 + 8 + 64,  # the two rows alone are read
        "conv": 64 + 64 + 4,
        "copied": 8,
        "updated": 4 + 4 + 4,  # and one entry is written
    }
    assert {kernel.name: kernel.bytes_moved for kernel in loop.kernels_inside} == {"double": 128}
    assert loop.bytes_beside_convolutions == 136 + 8 + 12 + 128
    assert loop.record()["kinds"] == {"fusion": 2, "__cudnn$convForward": 1, "copy": 1}
    assert loop.kernels[0].source == "jit(run)/gather"


def test_a_loop_that_is_compiled_here():
    def run(x, w, end):
        return jax.lax.fori_loop(0, end, lambda _, x: jax.nn.relu(x @ w), x)

    shapes = jnp.ones((16, 16)), jnp.ones((16, 16))
    known = jax.jit(run, static_argnums=2).lower(*shapes, 5).compile().as_text()
    traced = jax.jit(run).lower(*shapes, 5).compile().as_text()
    assert epoch_loop(known).trip_count == 5 and epoch_loop(known).kernels
    assert epoch_loop(traced).trip_count is None and epoch_loop(traced).conditionals == 0
    with pytest.raises(ValueError, match="runs no loop"):
        epoch_loop(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text())
