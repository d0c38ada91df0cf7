"""What `gpd extract` writes, a file per format, each with what is needed to use the network."""

from gpd_cli.commands.exports.about import About, Which
from gpd_cli.commands.exports.write import Options, check_output, is_folder, write_network

__all__ = ["About", "Options", "Which", "check_output", "is_folder", "write_network"]
