"""Features of a network: the stages and classifier of the network, and hooks on both."""

from gpd_cli.distill.features.hooks import FeatureHooks, Outputs
from gpd_cli.distill.features.info import FeatureInfo, at_size, find_features
from gpd_cli.distill.features.stage import Stage

__all__ = ["FeatureHooks", "FeatureInfo", "Outputs", "Stage", "at_size", "find_features"]
