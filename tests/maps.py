"""Index maps that several tests need."""

from gpd_cli.expansion import IndexMap
from gpd_cli.expansion.layout import Scale, Segment


def copies(size: int, ratio: float, block: int = 1) -> IndexMap:
    """Copies side by side, in blocks of neighbours."""
    return Segment(size, block=block).map(Scale(ratio))
