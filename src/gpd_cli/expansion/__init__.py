"""Expansion of a student into a dynamic teacher, and back."""

from gpd_cli.expansion.certificate import Certificate, certify
from gpd_cli.expansion.expand import DEFAULT_NOISE, expand
from gpd_cli.expansion.pair import Pair
from gpd_cli.expansion.plan import IndexMap, TensorPlan, WidthPlan
from gpd_cli.expansion.probing.probe import find_plan
from gpd_cli.expansion.probing.randomize import randomize
from gpd_cli.expansion.probing.rules import RULES, Rule
from gpd_cli.expansion.teacher import merged_teacher
from gpd_cli.expansion.tensors import Storage, expand_tensor, slice_tensor
from gpd_cli.expansion.unshared import Unshared

__all__ = [
    "DEFAULT_NOISE",
    "RULES",
    "Certificate",
    "IndexMap",
    "Pair",
    "Rule",
    "Storage",
    "TensorPlan",
    "Unshared",
    "WidthPlan",
    "certify",
    "expand",
    "expand_tensor",
    "find_plan",
    "merged_teacher",
    "randomize",
    "slice_tensor",
]
