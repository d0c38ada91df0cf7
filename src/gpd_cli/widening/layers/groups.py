"""Recognize index maps of grouped channels: the same map in every group, or whole groups copied."""

from __future__ import annotations

from gpd_cli.widening.plan import IndexMap


def shared_by_groups(map_: IndexMap, groups: int) -> IndexMap | None:
    """The index map within each group, if all groups have the same map; else None.

    Args:
        map_: index map of all channels.
        groups: number of groups, in both networks.
    """
    wide, narrow = len(map_) // groups, map_.narrow_size // groups
    if len(map_) % groups:
        return None
    local = map_.index[:wide]
    if any(not 0 <= c < narrow for c in local):
        return None
    expected = tuple(g * narrow + c for g in range(groups) for c in local)
    return IndexMap(narrow, local) if expected == map_.index else None


def copied_groups(map_: IndexMap, within: int) -> list[int] | None:
    """The narrow group that each wide group copies, if whole groups are copied; else None.

    Args:
        map_: index map of all channels.
        within: number of channels of a group, in both networks.
    """
    runs = [map_.index[k : k + within] for k in range(0, len(map_), within)]
    for run in runs:
        start = run[0]
        if start % within or run != tuple(range(start, start + within)):
            return None
    return [run[0] // within for run in runs]
