"""Check a width plan that was read from a file, before anything is built from the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpd_cli.forms import FormError, check_form, maybe, plain, within

_MOST = 2**31  # limit of any size, index or number of copies
_FREE = 2**26  # most elements of a tensor that the file does not hold, such as position tables
_LONGEST = 2**20  # most positions of an index map of such a tensor
_LARGEST_RATIO = 4096

_MAP = {"narrow": within(1, _MOST), "index": [[int]]}
_TENSOR = {"axes": [maybe(within(0, _MOST))], "fan_in": maybe(within(0, 16))}
_PLAN = {
    "ratio": float,
    "tensors": {str: _TENSOR},
    "attributes": {str: {str: plain}},
    "maps": [_MAP],
}


def check_plan_values(plan: Any, stored: Mapping[str, Sequence[int]]) -> None:
    """Check all indices, ratios and sizes of a plan that is given as plain values.

    Args:
        plan: the plan as it was read, in the form of `WidthPlan.to_dict`.
        stored: shapes of the dynamic teacher's tensors in the same file, by the names of the
            student's tensors. The plan may not lead to other shapes.

    Raises:
        FormError: when the plan cannot be one of a network with these tensors.
    """
    check_form(plan, _PLAN, "the width plan")
    if not 1 <= plan["ratio"] <= _LARGEST_RATIO:
        raise FormError(f"the width plan has the ratio {plan['ratio']:g}")
    largest = max((size for shape in stored.values() for size in shape), default=0)
    wide = [
        _length(entry, max(largest, _FREE), number) for number, entry in enumerate(plan["maps"])
    ]
    for name, entry in plan["tensors"].items():
        _check_tensor(name, entry, wide, stored.get(name))


def _length(entry: Mapping[str, Any], most: int, number: int) -> int:
    """Check an index map, and return the size of its wide axis.

    Args:
        entry: the index map, whose positions are written as runs (see `WidthPlan.to_dict`).
        most: the largest size of the wide axis that is possible.
        number: number of the index map in the plan, for error messages.
    """
    place, narrow, length = f"the width plan, maps, {number}", entry["narrow"], 0
    for run in entry["index"]:
        if len(run) != 4:
            raise FormError(f"{place} has a run of {len(run)} numbers and not of 4")
        start, step, count, repeats = run
        last = start + step * (count - 1)
        if count < 1 or repeats < 1 or not (0 <= start < narrow and 0 <= last < narrow):
            raise FormError(f"{place} has an index that the {narrow} narrow channels do not have")
        length += count * repeats
    if not narrow <= length <= most:
        raise FormError(f"{place} copies {narrow} channels to {length}")
    return length


def _check_tensor(
    name: str, entry: Mapping[str, Any], wide: Sequence[int], shape: Sequence[int] | None
) -> None:
    axes, fan_in, place = entry["axes"], entry["fan_in"], f"the width plan of {name}"
    if any(axis is not None and axis >= len(wide) for axis in axes):
        raise FormError(f"{place} names an index map that it does not have")
    if fan_in is not None and fan_in >= len(axes):
        raise FormError(f"{place} has a fan-in axis {fan_in} of {len(axes)}")
    check_form(share := entry.get("share", 1), float, f"{place}, share")
    if not 1 / _MOST <= share <= _MOST:
        raise FormError(f"{place} divides by {share:g}")
    sizes = [None if axis is None else wide[axis] for axis in axes]
    if shape is None:
        if math.prod(size or 1 for size in sizes) > _FREE:
            raise FormError(f"{place} makes a tensor of {sizes}, which the file does not have")
    elif len(shape) != len(sizes) or any(
        size not in (None, found) for size, found in zip(sizes, shape, strict=True)
    ):
        raise FormError(f"{place} makes {sizes} of it, and the file has {list(shape)}")
