"""The methods under the path that configurations and checkpoints name: ``gpd_cli.methods.DKD``."""

from gpd_cli.distill.methods import *  # noqa: F403
from gpd_cli.distill.methods import __all__ as __all__
