"""What ClickTrain is compared with: pruning after training, and other ways of pruning during training.

Each method that trains is an optax transformation around any optimizer, so that one loop runs them all.
"""

from clicktrain_jax.baselines.narrowing import narrow, narrow_shapes, widths
from clicktrain_jax.methods.admm import AdmmState, admm, admm_residual
from clicktrain_jax.methods.gradual import gradual_magnitude
from clicktrain_jax.methods.n_of_m import n_of_m_mask, n_of_m_masks, straight_through
from clicktrain_jax.methods.prunetrain import (
    PruneTrainState,
    add_channel_lasso,
    channel_lasso,
    living_channels,
    prunetrain,
)
from clicktrain_jax.methods.random import random_importance, random_scores
from clicktrain_jax.methods.rigl import rigl
from clicktrain_jax.methods.sparse import SparseState, densities, masks_of

__all__ = [
    "AdmmState",
    "PruneTrainState",
    "SparseState",
    "add_channel_lasso",
    "admm",
    "admm_residual",
    "channel_lasso",
    "densities",
    "gradual_magnitude",
    "living_channels",
    "masks_of",
    "n_of_m_mask",
    "n_of_m_masks",
    "narrow",
    "narrow_shapes",
    "prunetrain",
    "random_importance",
    "random_scores",
    "rigl",
    "straight_through",
    "widths",
]
