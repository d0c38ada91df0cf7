"""Extra branches of a layer, which are merged into the layer's kernel before the layer runs.

`names` has the names of all branches, `functional` the algebra of each, `initial` their initial
values, and `merge` their sum with the main kernel. `BranchBank` is the module that holds the
branches of one layer, and `branched_layers` chooses the layers that get any.
"""

from gpd_cli.branches.bank import BranchBank
from gpd_cli.branches.channels import identity_channels
from gpd_cli.branches.functional import (
    centred,
    depthwise_separable,
    expandnet,
    frequency_filters,
    frequency_prior,
    from_identity,
    identity_kernel,
    linear_factors,
    pointwise_average,
    pointwise_kxk,
)
from gpd_cli.branches.initial import initial_gate, initial_parameters
from gpd_cli.branches.layers import ALL_LAYERS, LAYER_SETS, branched_layers, layers_in_vain
from gpd_cli.branches.merge import branch_kernel, merge, spatial_filters
from gpd_cli.branches.names import (
    AUTHORS_BRANCHES,
    BRANCH_SETS,
    EXTRA_BRANCHES,
    MAIN_GATE,
    PAPER_BRANCHES,
    BranchInit,
    accepted_branches,
    branch_names,
    count_branches,
)

__all__ = [
    "ALL_LAYERS",
    "AUTHORS_BRANCHES",
    "BRANCH_SETS",
    "EXTRA_BRANCHES",
    "LAYER_SETS",
    "MAIN_GATE",
    "PAPER_BRANCHES",
    "BranchBank",
    "BranchInit",
    "accepted_branches",
    "branch_kernel",
    "branch_names",
    "branched_layers",
    "centred",
    "count_branches",
    "depthwise_separable",
    "expandnet",
    "frequency_filters",
    "frequency_prior",
    "from_identity",
    "identity_channels",
    "identity_kernel",
    "initial_gate",
    "initial_parameters",
    "layers_in_vain",
    "linear_factors",
    "merge",
    "pointwise_average",
    "pointwise_kxk",
    "spatial_filters",
]
