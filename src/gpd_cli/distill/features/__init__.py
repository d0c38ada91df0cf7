"""Features of a network: find its stages and classifier, and read them by hooks while it runs.

`find_features` returns a `FeatureInfo` (which modules), and `FeatureHooks` returns the `Outputs` of
a run (which tensors).
"""

from gpd_cli.distill.features.hooks import FeatureHooks, Outputs
from gpd_cli.distill.features.info import FeatureInfo, at_size, find_features
from gpd_cli.distill.features.stage import Stage

__all__ = ["FeatureHooks", "FeatureInfo", "Outputs", "Stage", "at_size", "find_features"]
