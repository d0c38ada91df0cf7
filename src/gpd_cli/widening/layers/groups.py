"""How channels that are cut into groups have been copied."""

from __future__ import annotations

from gpd_cli.widening.plan import IndexMap


def shared_by_groups(map_: IndexMap, groups: int) -> IndexMap | None:
    """The map within a group, when all groups have the same one."""
    wide, narrow = len(map_) // groups, map_.narrow // groups
    if len(map_) % groups:
        return None
    local = map_.index[:wide]
    if any(not 0 <= c < narrow for c in local):
        return None
    expected = tuple(g * narrow + c for g in range(groups) for c in local)
    return IndexMap(narrow, local) if expected == map_.index else None


def copied_groups(map_: IndexMap, within: int) -> list[int] | None:
    """Which narrow group each run of ``within`` wide channels copies as a whole."""
    runs = [map_.index[k : k + within] for k in range(0, len(map_), within)]
    for run in runs:
        start = run[0]
        if start % within or run != tuple(range(start, start + within)):
            return None
    return [run[0] // within for run in runs]
