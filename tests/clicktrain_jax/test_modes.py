"""The wrapper's whole life where jax is asked to be strict."""

import jax
import numpy as np
import optax
import pytest

import clicktrain_jax as ct


@pytest.mark.parametrize("patterns", [None, ct.patterns.Generated(4)], ids=["fixed", "generated"])
@pytest.mark.parametrize("options", [{}, {"target": 4.0, "tile": (4, 1)}], ids=["fraction", "target"])
def test_no_rank_is_promoted(options, patterns):
    rng = np.random.default_rng(0)
    params = {"kernel": jax.numpy.asarray(rng.normal(size=(3, 3, 8, 16)), "float32")}
    with jax.numpy_rank_promotion("raise"):
        plan = ct.make_plan(params, {"kernel": "auto" if options else 0.5}, **options)
        tx = ct.clicktrain(optax.adam(0.1), plan, select_step=1, prune_step=3, coeff=1e-3, patterns=patterns)
        state, step = tx.init(params), jax.jit(tx.update)
        for _ in range(5):
            updates, state = step(params, state, params)
            params = optax.apply_updates(params, updates)
        masks = ct.masks_of(state)
        ct.group_lasso(params, masks)
        assert ct.report(params, masks).marked == 0
