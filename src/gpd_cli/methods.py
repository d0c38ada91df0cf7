"""The methods under their earlier path, which configurations and checkpoints of users have."""

from gpd_cli.distill.methods import *  # noqa: F403
from gpd_cli.distill.methods import __all__ as __all__
