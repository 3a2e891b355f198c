"""The reference's masks on a GPU, where products round to TF32 unless they are told not to."""

import pathlib
import re

import jax
import numpy as np

import clicktrain_jax as ct

GOLDEN = pathlib.Path(__file__).parents[1] / "clicktrain_jax" / "golden_small.npz"


def _select(params, grads, plan, patterns):
    return ct.select_masks(ct.importance.taylor(params, grads), plan, patterns)


def test_masks_are_the_references_bit_for_bit():
    """From its own weights and gradients: TF32 would flip near-ties."""
    with np.load(GOLDEN) as stored:
        facts = dict(stored)
    compared = 0
    for case in sorted({key.partition(":")[0] for key in facts}):
        part = {key.partition(":")[2]: value for key, value in facts.items() if key.startswith(f"{case}:")}
        names = [str(name) for name in part["names"]]
        # PyTorch's OIHW to HWIO.
        params, grads = (
            {name: part[f"{key}/{name}"].transpose(2, 3, 1, 0) for name in names}
            for key in ("w_before_e1b0", "g_select")
        )
        rules = {re.escape(name): int(ratio) / 100 for name, ratio in zip(names, part["ratios"])}
        plan, patterns = ct.make_plan(params, rules), ct.patterns.fixed_set(int(part["num_patterns"]))
        masks = jax.jit(_select, static_argnums=2)(params, grads, plan, patterns)
        for kind, key in (("pattern", "pmask"), ("kernel", "kmask")):
            for name in names:
                if f"{key}/{name}" in part:
                    np.testing.assert_array_equal(
                        getattr(masks, kind)[name], part[f"{key}/{name}"].transpose(2, 3, 1, 0), f"{case} {kind} {name}"
                    )
                    compared += 1
    assert compared > 10
