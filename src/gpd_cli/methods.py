"""The methods under the paths in configurations and checkpoints: ``gpd_cli.methods.DKD``."""

from gpd_cli.distill.methods import *  # noqa: F403
from gpd_cli.distill.methods import __all__ as __all__
