"""Index maps that several tests need."""

from gpd_cli.widening.layout import Scale, Segment
from gpd_cli.widening.plan import IndexMap


def copies(size: int, ratio: float, block: int = 1) -> IndexMap:
    """Copies side by side, in blocks of neighbours."""
    return Segment(size, block=block).map(Scale(ratio))
