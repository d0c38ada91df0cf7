"""Copies along axes that are reshaped or cut: pure functions of shapes and index maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from math import prod

import torch

from gpd_cli.widening.numbers.arithmetic import Attribute, Number
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES
from gpd_cli.widening.plan import Axes, IndexMap


def reshaped(
    old: Sequence[int],
    new: Sequence[int],
    wide: Sequence[int],
    maps: Callable[[], Axes],
    given: Sequence[int] | None = None,
) -> list[int] | None:
    """The wide sizes of a reshaped tensor.

    Args:
        old: the narrow shape before.
        new: the narrow shape after.
        wide: the wide shape before.
        maps: returns per axis before the reshape the index map, or None where the axis keeps its
            size; called only where an axis that has grown is taken apart.
        given: the sizes that the code asks for, -1 for a size left open. They decide which of
            several axes grows: the first choice is an axis of size 1 that is left open, then a
            count of heads, then an axis whose size is left open or comes from another attribute,
            and last an axis whose size is a literal. Among equals the outermost axis grows.

    Returns:
        One size for each axis of the new shape, or None where the copies do not lie along axes
        of the new shape.

    Example:
        >>> from gpd_cli.widening.plan import spread
        >>> reshaped((5, 6), (5, 2, 3), (5, 12), lambda: (None, spread(2, 4, block=3)))
        [5, 4, 3]
    """
    if prod(old) == 0 or prod(old) != prod(new):
        return None
    result: list[int] = []
    counts = {k for k, asked in enumerate(given or ()) if _is_count(asked)}
    for before, after in _groups(old, new, counts):
        sizes = [new[k] for k in after]
        if all(wide[k] == old[k] for k in before):
            result += sizes
        elif len(after) == 1:
            result.append(prod(wide[k] for k in before))
        else:
            axes = maps()
            merged = _merge([axes[k] for k in before], [old[k] for k in before])
            asked = [-1 if given is None else given[k] for k in after]
            parts = _take_apart(merged, sizes, asked)
            if parts is None:
                return None
            result += parts
    return result


def cut(map_: IndexMap, sizes: Sequence[int]) -> list[IndexMap] | None:
    """The index maps of the pieces of an axis that is cut into pieces.

    Args:
        map_: the index map of the axis.
        sizes: narrow sizes of the pieces, from the axis's first position on.

    Returns:
        One map for each piece, or None where the wide axis is not a sequence of the pieces' copies
        in the order of the pieces.

    Example:
        >>> from gpd_cli.widening.plan import spread
        >>> [piece.index for piece in cut(spread(4, 8), [2, 2])]
        [(0, 0, 1, 1), (0, 0, 1, 1)]
    """
    pieces, start, first = [], 0, 0
    for size in sizes:
        stop = start
        while stop < len(map_) and first <= map_.index[stop] < first + size:
            stop += 1
        piece = IndexMap(size, tuple(i - first for i in map_.index[start:stop]))
        if not piece.is_onto():
            return None
        pieces.append(piece)
        start, first = stop, first + size
    return pieces if start == len(map_) else None


def _groups(
    old: Sequence[int], new: Sequence[int], counts: Collection[int] = ()
) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest groups of axes before and after a reshape that hold the same elements.

    Args:
        old: the shape before.
        new: the shape after.
        counts: the axes of the new shape that count heads.
    """
    i = j = 0
    while i < len(old) or j < len(new):
        end = group_end(old, new, i, j)
        if end is None:
            raise ValueError(f"{list(old)} and {list(new)} hold different numbers of elements")
        before, after = [*range(i, end[0])], [*range(j, end[1])]
        i, j = end
        # New axes of one element belong to the axis before them, but a single head to the axis
        # after it, where there is one; so do old axes of one element.
        while (
            j < len(new)
            and new[j] == 1
            and (i == len(old) or (old[i] != 1 and (j not in counts or j + 1 == len(new))))
        ):
            after, j = [*after, j], j + 1
        while j == len(new) and i < len(old) and old[i] == 1:
            before, i = [*before, i], i + 1
        yield before, after


def group_end(old: Sequence[int], new: Sequence[int], i: int, j: int) -> tuple[int, int] | None:
    """Where the next group of axes ends that hold the same elements before and after a reshape.

    Args:
        old: the shape before.
        new: the shape after.
        i: the group's first axis of the shape before.
        j: the group's first axis of the shape after.

    Returns:
        The ends of the smallest such group, or None where there is no further one.

    Example:
        >>> group_end((4, 6), (4, 2, 3), 1, 1)
        (2, 3)
    """
    first_old, first_new = i, j
    i, j = min(i + 1, len(old)), min(j + 1, len(new))
    while (a := prod(old[first_old:i])) != (b := prod(new[first_new:j])):
        if a < b:
            i += 1
        else:
            j += 1
        if i > len(old) or j > len(new):
            return None
    return i, j


def _merge(maps: Axes, sizes: Sequence[int]) -> IndexMap:
    """The index map of several axes that are flattened into one."""
    flat = torch.zeros(1, dtype=torch.int64)
    for map_, size in zip(maps, sizes, strict=True):
        index = torch.arange(size) if map_ is None else map_.tensor
        flat = (flat[:, None] * size + index).flatten()
    return IndexMap(prod(sizes), tuple(flat.tolist()))


def _take_apart(
    merged: IndexMap, sizes: Sequence[int], asked: Sequence[int]
) -> tuple[int, ...] | None:
    """The wide sizes of the axes into which an axis is unflattened.

    Copies lie along one or two of these axes. Parts that were laid end to end may each have an
    order of their own: then one axis grows, by index maps that vary along the other axes.
    """
    candidates = sorted(
        _wide_sizes(sizes, len(merged)),
        key=lambda wide: max(
            (_rank(n, a) for n, w, a in zip(sizes, wide, asked, strict=True) if w != n), default=0
        ),
    )
    for wide in candidates:
        if _is_separable(merged, sizes, wide):
            return wide
    for wide in candidates:
        grown = [k for k, size in enumerate(sizes) if wide[k] != size]
        if len(grown) == 1 and _is_apart(merged, sizes, wide, grown[0]):
            return wide
    return None


def _is_count(asked: int) -> bool:
    """Whether code takes a size from an attribute with one of the usual names of head counts."""
    expression = asked.expression if isinstance(asked, Number) else None
    return isinstance(expression, Attribute) and expression.name in HEAD_COUNT_NAMES


def _rank(size: int, asked: int) -> int:
    """How unlikely it is that an axis grows, judged by the size that the code asks for."""
    if isinstance(asked, Number):
        return 1 if _is_count(asked) else 2
    if asked == -1:
        return 0 if size == 1 else 2  # an open size of 1 makes room for copies
    return 3  # a literal in the code, or the size of another tensor


def _is_apart(merged: IndexMap, sizes: Sequence[int], wide: Sequence[int], grown: int) -> bool:
    """Whether copies lie along axis `grown` only, by maps that may differ along the other axes."""
    digits = torch.stack(torch.unravel_index(merged.tensor.reshape(*wide), tuple(sizes)))
    for k, size in enumerate(sizes):
        own = torch.arange(size).reshape([-1 if axis == k else 1 for axis in range(len(sizes))])
        if k != grown and not bool((digits[k] == own).all()):
            return False
    ordered = digits[grown].movedim(grown, 0).flatten(1).sort(0).values
    steps = ordered.diff(dim=0)
    return bool(
        (ordered[0] == 0).all() and (ordered[-1] == sizes[grown] - 1).all() and (steps <= 1).all()
    )


def _wide_sizes(sizes: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Candidates for wide sizes of axes: their product is ``total``, and one or two axes grow."""
    narrow = prod(sizes)
    if total == narrow:
        yield tuple(sizes)
    for k, size in enumerate(sizes):
        if total != narrow and (size * total) % narrow == 0:
            yield (*sizes[:k], size * total // narrow, *sizes[k + 1 :])
    if total % narrow:
        return
    factor = total // narrow
    for j, k in itertools.combinations(range(len(sizes)), 2):
        for first in (f for f in range(2, factor) if factor % f == 0):
            wide = list(sizes)
            wide[j], wide[k] = wide[j] * first, wide[k] * (factor // first)
            yield tuple(wide)


def _is_separable(merged: IndexMap, sizes: Sequence[int], wide: Sequence[int]) -> bool:
    """Whether each axis has one index map, which holds at all positions along the other axes."""
    digits = torch.stack(torch.unravel_index(merged.tensor.reshape(*wide), tuple(sizes)))
    for k, size in enumerate(sizes):
        digit = digits[k].movedim(k, 0).flatten(1)
        if not bool((digit == digit[:, :1]).all()):
            return False
        if not IndexMap(size, tuple(digit[:, 0].tolist())).is_onto():
            return False
    return True
