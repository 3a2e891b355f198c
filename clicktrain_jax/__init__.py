"""ClickTrain in JAX: train a convolutional net once, and get it accurate, small and fast.

Pure functions on parameter trees (Flax linen ``params``, ``nnx.State``, any tree of arrays), and one optax
transformation that composes them.
"""

from clicktrain_jax import channels, importance, methods, patterns, reduction
from clicktrain_jax.accounting import Report, report
from clicktrain_jax.deploy import accelerate, export, layer_times, load  # they import pallas_kernels when called
from clicktrain_jax.deploy.storage import masks_from_zeros
from clicktrain_jax.lasso import add_group_lasso, group_lasso
from clicktrain_jax.latency import LayerTime, LayerTimes
from clicktrain_jax.masks import LayerMask, Masks, apply_masks
from clicktrain_jax.phases import Phase, PhaseSchedule
from clicktrain_jax.plan import Plan, make_plan, schedule
from clicktrain_jax.selection import select_masks
from clicktrain_jax.states import ClickTrainState, Status, masks_of, status
from clicktrain_jax.transform import PhaseUpdates, clicktrain, phase_updates

__version__ = "0.1.0"

__all__ = [
    "ClickTrainState",
    "LayerMask",
    "LayerTime",
    "LayerTimes",
    "Masks",
    "Phase",
    "PhaseSchedule",
    "PhaseUpdates",
    "Plan",
    "Report",
    "Status",
    "accelerate",
    "add_group_lasso",
    "apply_masks",
    "channels",
    "clicktrain",
    "export",
    "group_lasso",
    "importance",
    "layer_times",
    "load",
    "make_plan",
    "masks_from_zeros",
    "masks_of",
    "methods",
    "patterns",
    "phase_updates",
    "reduction",
    "report",
    "schedule",
    "select_masks",
    "status",
]
