"""Find, by value, which wide channel copies which narrow one."""

from __future__ import annotations

import torch
from torch import Tensor

from gpd_cli.expansion.plan import IndexMap, spread

_TIE = 1e-10  # channels closer than this, relative to the largest, are told apart by position
_EXACT = 1e-8  # a wide activation must equal its narrow one to this, relative to the largest


def match_axes(narrow: Tensor, wide: Tensor) -> tuple[IndexMap | None, ...] | None:
    """Index maps that make ``wide`` a replication of ``narrow``.

    Args:
        narrow: an activation of the student, float64.
        wide: the same activation of the teacher, with as many axes.

    Returns:
        Per axis its index map, or None where the axis keeps its size; None altogether when
        ``wide`` is no replication of ``narrow``.
    """
    if narrow.ndim != wide.ndim:
        return None
    grown = [k for k in range(narrow.ndim) if narrow.shape[k] != wide.shape[k]]
    maps: list[IndexMap | None] = [None] * narrow.ndim
    replica = narrow
    for axis in grown:
        # The mean over the other grown axes does not change when every position is copied alike.
        others = [k for k in grown if k != axis]
        map_ = _match_axis(_mean(narrow, others), _mean(wide, others), axis)
        if map_ is None:
            return None
        maps[axis] = map_
        replica = replica.index_select(axis, map_.tensor)
    tolerance = _EXACT * float(narrow.abs().max().clamp(min=torch.finfo(narrow.dtype).tiny))
    if not float((replica - wide).abs().max()) <= tolerance:  # NaN is no replication either
        return None
    return tuple(maps)


def _mean(activation: Tensor, axes: list[int]) -> Tensor:
    return activation.mean(axes, keepdim=True) if axes else activation


def _match_axis(narrow: Tensor, wide: Tensor, axis: int) -> IndexMap | None:
    """Match one axis by a random projection of all others."""
    a = narrow.movedim(axis, 0).flatten(1)
    b = wide.movedim(axis, 0).flatten(1)
    generator = torch.Generator().manual_seed(a.shape[1])
    direction = torch.randn(a.shape[1], generator=generator, dtype=a.dtype)
    a, b = a @ direction, b @ direction
    tie = _TIE * float(a.abs().max())
    order = a.argsort(stable=True)
    ranked = a[order]
    group = torch.cat([order.new_zeros(1), (ranked.diff() > tie).cumsum(0)])
    # Nearest ranked value of each wide channel.
    right = torch.searchsorted(ranked, b).clamp(max=len(ranked) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.where((ranked[left] - b).abs() < (ranked[right] - b).abs(), left, right)
    if float((ranked[nearest] - b).abs().max()) > 100 * tie:
        return None
    found = group[nearest]
    if int(group[-1]) + 1 == len(ranked):  # no ties: the common case
        return IndexMap(len(ranked), tuple(order[nearest].tolist()))
    regular = _regular(group[order.argsort()], found)
    if regular is not None:
        return regular
    index = torch.empty(len(b), dtype=torch.int64)
    for g in found.unique().tolist():
        # Equal channels keep their order, each with as many copies as the next.
        sources = order[group == g].sort().values
        targets = (found == g).nonzero().flatten()
        share = torch.arange(len(targets)) * len(sources) // len(targets)
        index[targets] = sources[share]
    return IndexMap(len(ranked), tuple(index.tolist()))


def _regular(narrow: Tensor, wide: Tensor) -> IndexMap | None:
    """The map by whole blocks, as large as they can be, that fits channels of which some are equal.

    Which channels are equal can depend on the input (maxima of overlapping windows); a block that
    is copied as a whole (a channel's pixels, flattened) does not.

    Args:
        narrow: per narrow channel, the number of its group of equal channels.
        wide: likewise per wide channel.
    """
    size = len(narrow)
    for count in range(1, size + 1):
        if size % count or len(wide) % (size // count):
            continue
        block = size // count
        map_ = spread(count, len(wide) // block, block)
        if torch.equal(narrow[map_.tensor], wide):
            return map_
    return None
