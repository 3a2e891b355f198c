"""The plan: which leaves are pruned, how much of them goes, in what shapes, and when.

`convolutions` tells which leaves are kernels, `rules` which of them a path names, `layer_plan` what happens to one of
them, `targets` how much each loses where one number is given for the net, and `plan` puts it together; `shares` has the
steps of a run. Each module imports those named before it.
"""

from clicktrain_jax.plan.layer_plan import LayerPlan
from clicktrain_jax.plan.plan import Plan, check_plan, make_plan
from clicktrain_jax.plan.shares import schedule

__all__ = ["LayerPlan", "Plan", "check_plan", "make_plan", "schedule"]
