"""How a network widens: index maps, plans, and the search that finds them."""

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
