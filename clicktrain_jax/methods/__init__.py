"""A pruning library for JAX: the methods beside ClickTrain, each an optax transformation around any optimizer.

| method | function | paper |
| --- | --- | --- |
| magnitude, once | `magnitude`, `magnitude_masks` | Han et al. 2015 |
| magnitude, gradual | `gradual_magnitude` | Zhu and Gupta 2017 |
| RigL | `rigl` | Evci et al. 2020 |
| SET | `sparse_evolutionary` | Mocanu et al. 2018 |
| n:m, once | `n_of_m`, `n_of_m_masks` | Mishra et al. 2021 |
| n:m, straight-through | `straight_through` and `sr_ste` | Zhou et al. 2021 |
| channels, PruneTrain | `prunetrain` | Lym et al. 2019 |
| patterns, ADMM | `admm` | PatDNN, Niu et al. 2020 |
| random | `random`, `random_importance` | Liu et al. 2022 |

All are used like `clicktrain_jax.clicktrain`: a plan says which layers (`clicktrain_jax.make_plan`; its fractions say
how much of a layer's weights goes, or `densities` do), the optimizer is wrapped, and the state holds the masks, for
`clicktrain_jax.masks_of`, `clicktrain_jax.status`, `clicktrain_jax.report`, `clicktrain_jax.export` and
`clicktrain_jax.accelerate`.

    plan = ct.make_plan(params, {"Conv_0/kernel": None, "Conv_.*/kernel": 0.9})
    optimizer = ct.methods.rigl(optax.sgd(0.1, momentum=0.9), plan, key=jax.random.key(0), every=100, end_step=7_500,
                                densities=ct.methods.densities(plan, 0.1, "erk"))

`Method` is what a training loop asks of any of them.
"""

from clicktrain_jax.methods.admm import AdmmState, admm, admm_residual
from clicktrain_jax.methods.densities import densities
from clicktrain_jax.methods.gradual import gradual_magnitude
from clicktrain_jax.methods.magnitude import magnitude, magnitude_masks
from clicktrain_jax.methods.method import Method
from clicktrain_jax.methods.n_of_m import n_of_m, n_of_m_mask, n_of_m_masks, sr_ste, straight_through
from clicktrain_jax.methods.prunetrain import (
    PruneTrainState,
    add_channel_lasso,
    channel_lasso,
    living_channels,
    prunetrain,
)
from clicktrain_jax.methods.random import random, random_importance, random_scores
from clicktrain_jax.methods.rigl import rigl
from clicktrain_jax.methods.set import sparse_evolutionary

__all__ = [
    "AdmmState",
    "Method",
    "PruneTrainState",
    "add_channel_lasso",
    "admm",
    "admm_residual",
    "channel_lasso",
    "densities",
    "gradual_magnitude",
    "living_channels",
    "magnitude",
    "magnitude_masks",
    "n_of_m",
    "n_of_m_mask",
    "n_of_m_masks",
    "prunetrain",
    "random",
    "random_importance",
    "random_scores",
    "rigl",
    "sparse_evolutionary",
    "sr_ste",
    "straight_through",
]
