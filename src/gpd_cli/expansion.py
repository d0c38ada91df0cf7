"""Expansion and its rules under their earlier path, from which code of users imports them."""

from gpd_cli.teacher import Pair, expand
from gpd_cli.widening import RULES, Rule, WidthPlan

__all__ = ["RULES", "Pair", "Rule", "WidthPlan", "expand"]
