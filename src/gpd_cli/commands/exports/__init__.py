"""The output formats of `gpd extract`.

Every output holds, beside the weights, what is needed to use the network: architecture, classes and
preprocessing.
"""

from gpd_cli.commands.exports.about import About, Which
from gpd_cli.commands.exports.write import Options, check_output, is_folder, write_network

__all__ = ["About", "Options", "Which", "check_output", "is_folder", "write_network"]
