"""Width plans: which channels of the wide network copy which of the student, and how to find out.

A `WidthPlan` holds the index maps of all tensors, `find_plan` finds it by running the student, and
`expand_tensor` and `slice_tensor` apply it to a single tensor.
"""

from gpd_cli.widening.plan import IndexMap, TensorPlan, WidthPlan
from gpd_cli.widening.rules import RULES, Rule
from gpd_cli.widening.running.randomize import randomize
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.tensors import Storage, expand_tensor, slice_tensor

__all__ = [
    "RULES",
    "IndexMap",
    "Rule",
    "Storage",
    "TensorPlan",
    "WidthPlan",
    "expand_tensor",
    "find_plan",
    "randomize",
    "slice_tensor",
]
