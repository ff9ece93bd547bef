"""From a recipe to a plan: which modules are targeted, what the budget leaves them, and what each of them becomes.

By shapes alone, or, for a measured allocation, by the weights and by moments of the layers' inputs.
"""

from kronpress.planning.plans import check_stages, make_plan, plan_stages
from kronpress.planning.sizes import target_params
from kronpress.planning.targets import Totals, find_targets, meta_model, stored_dtype

__all__ = [
    "Totals",
    "check_stages",
    "find_targets",
    "make_plan",
    "meta_model",
    "plan_stages",
    "stored_dtype",
    "target_params",
]
