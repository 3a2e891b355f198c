"""Structures of a whole net get the worklists of a GPU's kernels by the shapes that the net convolves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax import models
from clicktrain_jax.deploy.structures import structures
from experiments.train.pruned_phase import scheduled
from pallas_kernels import compat
from pallas_kernels.pattern_conv.launches import launch

pytestmark = pytest.mark.skipif(not compat.HAS_MOSAIC_GPU, reason=compat.MOSAIC_GPU_NEEDS)


def test_every_structure_of_a_net_is_dealt_for_its_own_images():
    convolve = functools.partial(pk.pattern_conv, backend="mosaic_gpu")
    net = models.build(
        "vgg11",
        num_classes=10,
        width=1.0,
        dtype=jnp.bfloat16,
        layout="HWNC",
        conv=functools.partial(models.PatternConv, convolve=convolve),
    )
    params = models.abstract_variables(net, (32, 32, 3))["params"]
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), params)
    plan = ct.make_plan(scores, {"Conv_0/kernel": None, "Conv_[1-9]/kernel": 0.5}, tile=(64, 64))
    found = structures(ct.select_masks(scores, plan, ct.patterns.fixed_set(4)), tile=(64, 64))
    with compat.traced_for("NVIDIA H200", 132):
        dealt = scheduled(net, (128, 32, 32, 3), found)
    flat = jax.tree.leaves(dealt, is_leaf=lambda leaf: isinstance(leaf, pk.Structure))
    assert len(flat) == 7
    for structure in flat:
        assert [work.plan.transposed for work in structure.work] == [False, True]
        assert all(work.plan.batch == 128 and work.plan.blocks <= 132 for work in structure.work)
        for work in structure.work:
            asked = structure, work.plan.geometry, 128, work.plan.transposed, 132
            assert launch(*asked) is work
    assert [structure.work[0].plan.geometry.image[0] for structure in flat] == [16, 8, 8, 4, 4, 2, 2]
    assert jax.tree.structure(scheduled(net, (128, 32, 32, 3), dealt)) == jax.tree.structure(dealt)
