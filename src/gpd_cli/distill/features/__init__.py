"""What a network computes on the way to its logits: where to look, and the hooks that look."""

from gpd_cli.distill.features.places import Places, find_places
from gpd_cli.distill.features.stage import Stage
from gpd_cli.distill.features.taps import Outputs, Taps

__all__ = ["Outputs", "Places", "Stage", "Taps", "find_places"]
