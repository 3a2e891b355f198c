"""What ClickTrain is compared with: pruning after training, and other ways of pruning during training.

Each method that trains is an optax transformation around any optimizer, so that one loop runs them all.
"""

from clicktrain_jax.baselines.admm import AdmmState, admm, admm_residual
from clicktrain_jax.baselines.gradual import gradual_magnitude
from clicktrain_jax.baselines.nm import n_of_m_mask, n_of_m_masks, straight_through
from clicktrain_jax.baselines.prunetrain import (
    PruneTrainState,
    add_channel_lasso,
    channel_lasso,
    living_channels,
    prunetrain,
)
from clicktrain_jax.baselines.random import random_importance, random_scores
from clicktrain_jax.baselines.rigl import rigl
from clicktrain_jax.baselines.sparse import SparseState, densities, masks_of

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
    "prunetrain",
    "random_importance",
    "random_scores",
    "rigl",
    "straight_through",
]
