"""Find sizes and index maps of wide axes that are reshaped or cut.

These are pure functions of shapes and index maps.
"""

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
    """Find the wide sizes of a reshaped tensor.

    Args:
        old: the narrow shape before the reshape.
        new: the narrow shape after the reshape.
        wide: the wide shape before the reshape.
        maps: function that returns the index map of each axis before the reshape, or None for axes
            that keep their size; it is called only if an axis that has grown is taken apart.
        given: the sizes that the code asks for, with -1 for sizes left open. They decide which of
            several possible axes grows: the first choice is an axis of size 1 that is left open,
            then a number of heads, then an axis whose size is left open or comes from another
            attribute, and last an axis whose size is a literal. Among equals, the outermost grows.

    Returns:
        One size for each axis of the new shape, or None if the copies do not lie along axes of the
        new shape.

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
    """Find the index maps of the pieces into which an axis is cut.

    Args:
        map_: the index map of the axis.
        sizes: narrow sizes of the pieces, in order from the start of the axis.

    Returns:
        One map for each piece, or None if the wide axis does not consist of the copies of the first
        piece, then the copies of the second piece, and so on.

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
    """Group the axes before and after a reshape into the smallest groups of the same elements.

    Args:
        old: the shape before the reshape.
        new: the shape after the reshape.
        counts: numbers of the axes of the new shape whose size is a number of heads.

    Yields:
        For each group, the numbers of the axes before the reshape, and of those after it.
    """
    i = j = 0
    while i < len(old) or j < len(new):
        end = group_end(old, new, i, j)
        if end is None:
            raise ValueError(f"{list(old)} and {list(new)} hold different numbers of elements")
        before, after = [*range(i, end[0])], [*range(j, end[1])]
        i, j = end
        # A new axis of size 1 belongs to the axis before it, as does an old one at the end. But a
        # single head belongs to the axis after it, if there is one.
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
    """Find the end of the next smallest group of axes with the same elements before and after.

    Args:
        old: the shape before a reshape.
        new: the shape after the reshape.
        i: number of the group's first axis before the reshape.
        j: number of the group's first axis after the reshape.

    Returns:
        For both shapes the number of the axis after the group's last one, or None if there is no
        further group.

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
    """Make the index map of several axes that are flattened into one.

    Args:
        maps: the index map of each axis, or None for axes that keep their size.
        sizes: narrow sizes of the axes.
    """
    flat = torch.zeros(1, dtype=torch.int64)
    for map_, size in zip(maps, sizes, strict=True):
        index = torch.arange(size) if map_ is None else map_.tensor
        flat = (flat[:, None] * size + index).flatten()
    return IndexMap(prod(sizes), tuple(flat.tolist()))


def _take_apart(
    merged: IndexMap, sizes: Sequence[int], asked: Sequence[int]
) -> tuple[int, ...] | None:
    """Find the wide sizes of the axes into which an axis is unflattened, or None.

    Copies lie along one or two of these axes. If parts that were laid end to end have different
    orders of their copies, one axis grows, by index maps that vary along the other axes.

    Args:
        merged: index map of the axis that is unflattened.
        sizes: narrow sizes of the new axes.
        asked: the sizes that the code asks for, with -1 for sizes left open.
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
    """How unlikely it is that an axis grows, judged by the size that the code asks for.

    Args:
        size: narrow size of the axis.
        asked: the size that the code asks for; -1 for a size left open.

    Returns:
        A rank from 0 (likeliest) to 3.
    """
    if isinstance(asked, Number):
        return 1 if _is_count(asked) else 2
    if asked == -1:
        return 0 if size == 1 else 2  # an axis of size 1 that is left open has room for copies
    return 3  # the size is a literal in the code, or the size of another tensor


def _is_apart(merged: IndexMap, sizes: Sequence[int], wide: Sequence[int], grown: int) -> bool:
    """Whether copies lie along one axis only, by index maps that may vary along the other axes.

    Args:
        merged: index map of the axis that is unflattened.
        sizes: narrow sizes of the new axes.
        wide: wide sizes of the new axes.
        grown: number of the axis along which the copies lie.
    """
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
    """Generate candidates for wide sizes of axes, of which one or two grow.

    Args:
        sizes: narrow sizes of the axes.
        total: product of the wide sizes.
    """
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
    """Whether each axis has one index map, which is the same at all positions of the other axes.

    Args:
        merged: index map of the axis that is unflattened.
        sizes: narrow sizes of the new axes.
        wide: wide sizes of the new axes.
    """
    digits = torch.stack(torch.unravel_index(merged.tensor.reshape(*wide), tuple(sizes)))
    for k, size in enumerate(sizes):
        digit = digits[k].movedim(k, 0).flatten(1)
        if not bool((digit == digit[:, :1]).all()):
            return False
        if not IndexMap(size, tuple(digit[:, 0].tolist())).is_onto():
            return False
    return True
