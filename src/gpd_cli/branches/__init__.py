"""Extra branches of a convolution, merged into its kernel before it is run."""

from gpd_cli.branches.bank import BranchBank, accepts_branches
from gpd_cli.branches.functional import (
    branch_kernel,
    centred,
    depthwise_separable,
    frequency_filters,
    frequency_prior,
    merge,
    pointwise_average,
    pointwise_kxk,
    spatial_filters,
)
from gpd_cli.branches.names import EXTRA_BRANCHES, PAPER_BRANCHES, branch_names

__all__ = [
    "EXTRA_BRANCHES",
    "PAPER_BRANCHES",
    "BranchBank",
    "accepts_branches",
    "branch_kernel",
    "branch_names",
    "centred",
    "depthwise_separable",
    "frequency_filters",
    "frequency_prior",
    "merge",
    "pointwise_average",
    "pointwise_kxk",
    "spatial_filters",
]
