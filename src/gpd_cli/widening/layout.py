"""The layout of a layer's wide outputs: which outputs are copied, in which blocks, how often."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpd_cli.widening.plan import IndexMap, identity, spread, stack


@dataclass(frozen=True)
class Scale:
    """How much wider a network gets.

    Args:
        ratio: the expansion ratio, 1 or more.
        rounded_to: wide numbers of channels are rounded up to a multiple of this number. Counts (of
            attention heads, of groups) are not rounded, since they are no sizes of matrices.

    Example:
        >>> Scale(1.5).width(10), Scale(1.5, rounded_to=8).width(10)
        (15, 16)
    """

    ratio: float
    rounded_to: int = 1

    def count(self, size: int) -> int:
        """The wide number of heads or groups, for a narrow number ``size``."""
        return max(size, math.floor(size * self.ratio + 0.5))

    def width(self, size: int) -> int:
        """The wide number of channels, for a narrow number ``size``."""
        wide = self.count(size)
        if wide == size:
            return size
        return math.ceil(wide / self.rounded_to) * self.rounded_to


@dataclass(frozen=True)
class Segment:
    """Neighbouring outputs of a layer that all widen in the same way.

    Args:
        size: number of narrow outputs.
        parts: number of equal parts that widen one by one (queries, keys, values).
        block: number of neighbours that are copied together (the width of an attention head).
        grows: whether the segment widens at all.
        wide: number of wide outputs; by default it follows from the scale.

    Example:
        >>> Segment(4, parts=2).map(Scale(2)).index
        (0, 0, 1, 1, 2, 2, 3, 3)
        >>> Segment(4, block=2).map(Scale(2)).index
        (0, 1, 0, 1, 2, 3, 2, 3)
        >>> Segment(4, wide=7).map(Scale(2)).index
        (0, 0, 1, 1, 2, 2, 3)

    Raises:
        ValueError: when ``wide`` is given for a segment of several parts, with blocks, or that
            does not grow.
    """

    size: int
    parts: int = 1
    block: int = 1
    grows: bool = True
    wide: int | None = None

    def __post_init__(self) -> None:
        if self.wide is not None and (self.parts, self.block, self.grows) != (1, 1, True):
            raise ValueError(f"A segment of {self.wide} wide outputs has one part, block 1, grows.")

    def map(self, scale: Scale) -> IndexMap:
        """Make the segment's index map, with copies side by side: ``c0 c0 c1 c1 ...``.

        Each c stands for a block, and each part is widened in this way by itself.
        """
        if not self.grows:
            return identity(self.size)
        if self.wide is not None:
            return spread(self.size, self.wide)
        units = self.size // (self.parts * self.block)
        plain = self.parts == self.block == 1
        wide = scale.width(units) if plain else scale.count(units)
        return stack(spread(units, wide, self.block), self.parts)


Layout = tuple[Segment, ...]
"""The segments of a layer's outputs, in their order."""


def layout_map(layout: Layout, scale: Scale) -> IndexMap | None:
    """Make the index map of a layer's outputs, or return None where no output widens.

    Args:
        layout: the segments of the layer's outputs.
        scale: how much wider the network gets.

    Example:
        >>> layout_map((Segment(2), Segment(1, grows=False)), Scale(2)).index
        (0, 0, 1, 1, 2)
    """
    index: list[int] = []
    start = 0
    for segment in layout:
        index += [start + i for i in segment.map(scale).index]
        start += segment.size
    map_ = IndexMap(start, tuple(index))
    return None if map_.is_identity else map_
