"""Describe a width plan as text, for people to read and compare: what widens in each module, how.

The text is never read back: plans are stored by `WidthPlan.to_dict`. Yet the text is complete: the
words for an axis and the two sizes of the axis determine the index map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from math import gcd, prod
from typing import Any, NamedTuple

import yaml
from torch import nn

from gpd_cli.widening.names import qualified
from gpd_cli.widening.plan import IndexMap, TensorPlan, WidthPlan, spread

_MOST_PIECES = 6  # index maps of more pieces are written out as numbers


def plan_text(plan: WidthPlan, student: nn.Module, heading: Mapping[str, Any]) -> str:
    """Describe a plan as YAML text, which is equal for equal plans of equal networks.

    Args:
        plan: the plan to describe.
        student: the network that the plan was made for; only names, classes and sizes matter.
        heading: further entries at the top of the text (the network's name, a version).
    """
    content = {**heading, **describe_plan(plan, student)}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10**6)
    return text


def describe_plan(plan: WidthPlan, student: nn.Module) -> dict[str, Any]:
    """Describe a plan as nested dictionaries of words, with modules in the network's order.

    Args:
        plan: the plan to describe.
        student: the network that the plan was made for.

    Returns:
        ``ratio``, ``widened`` (totals), ``narrow`` (the reasons for modules that stay narrow
        inside, if there are any) and ``modules``: by module name its class, the tensors that widen,
        and the attributes that change.
    """
    modules: dict[str, Any] = {}
    for name, module in student.named_modules():
        tensors = {
            local: _tensor(tuple(tensor.shape), plan.tensors[full])
            for local, tensor in _own_tensors(module)
            if (full := qualified(name, local)) in plan.tensors
        }
        changes = {
            attribute: f"{_plain(getattr(module, attribute))} -> {_plain(value)}"
            for attribute, value in sorted(plan.attributes.get(name, {}).items())
        }
        if tensors or changes:
            entry: dict[str, Any] = {"class": type(module).__name__}
            entry |= {"tensors": tensors} if tensors else {}
            entry |= {"attributes": changes} if changes else {}
            modules[name or "(the network itself)"] = entry
    kept_narrow = {"narrow": dict(plan.kept_narrow)} if plan.kept_narrow else {}
    return {
        "ratio": float(plan.ratio),
        "widened": _totals(plan, student),
        **kept_narrow,
        "modules": modules,
    }


@lru_cache(maxsize=1024)  # a network has few maps, each on many tensors
def axis_words(map_: IndexMap) -> str:
    """Describe an index map in words, which no other map between axes of these two sizes has.

    Args:
        map_: the index map of a wide axis.

    Example:
        >>> axis_words(spread(4, 8))
        'side by side x2'
        >>> axis_words(spread(3, 6, block=64))
        'blocks of 64 x2'
        >>> axis_words(spread(4, 6))
        'side by side x1.5 (1 or 2 copies each)'
        >>> axis_words(IndexMap(4, (0, 0, 1, 1, 2, 3)))
        'channels 0-1 side by side x2; channels 2-3 kept'
        >>> axis_words(IndexMap(8, (0, 2, 0, 2, 1, 3, 1, 3, 4, 6, 4, 6, 5, 7, 5, 7)))
        'blocks of 4, each in the order 0-2 by 2, 0-2 by 2, 1-3 by 2, 1-3 by 2'
    """
    if map_.is_identity:
        return "kept"
    common = gcd(map_.narrow_size, len(map_))
    for block in (b for b in range(1, common + 1) if common % b == 0):
        if map_ == spread(map_.narrow_size // block, len(map_) // block, block):
            return _phrase(map_.narrow_size // block, len(map_) // block, block)
    units = list(_units(map_.index))
    pieces = _runs(units)
    if len(pieces) > _MOST_PIECES:
        pieces = _stretches(units)
    if len(pieces) > _MOST_PIECES:
        return f"in the order {_order(map_.index)}"
    if len(pieces) == 1:
        return pieces[0][2]
    return "; ".join(
        f"channel {first} {words}" if first == last else f"channels {first}-{last} {words}"
        for first, last, words in pieces
    )


def _phrase(units: int, wide: int, block: int) -> str:
    how = "side by side" if block == 1 else f"blocks of {block}"
    if wide % units == 0:
        return "kept" if wide == units else f"{how} x{wide // units}"
    least = wide // units
    return f"{how} x{wide / units:g} ({least} or {least + 1} copies each)"


class _Unit(NamedTuple):
    """Neighbouring channels whose copies are neighbours, too: one channel, or a block of channels.

    Args:
        size: number of narrow channels.
        pattern: for each wide channel the narrow channel that it copies, counted from the unit's
            first one.
    """

    size: int
    pattern: tuple[int, ...]

    @property
    def copies(self) -> int | None:
        """How often the unit is repeated as a whole; None if its channels are copied otherwise."""
        times, rest = divmod(len(self.pattern), self.size)
        return times if not rest and self.pattern == (*range(self.size),) * times else None


def _units(index: Sequence[int]) -> Iterator[_Unit]:
    """Cut an index map into units, as many as possible.

    A cut is possible where all positions before it copy lower channels than all positions after it.
    """
    lowest_after = [*index]
    for k in range(len(index) - 2, -1, -1):
        lowest_after[k] = min(index[k], lowest_after[k + 1])
    start, first, highest = 0, 0, -1
    for k, source in enumerate(index):
        highest = max(highest, source)
        if k + 1 == len(index) or lowest_after[k + 1] > highest:
            yield _Unit(highest + 1 - first, tuple(i - first for i in index[start : k + 1]))
            start, first = k + 1, highest + 1


_Piece = tuple[int, int, str]  # first and last narrow channel, and how they are copied


def _runs(units: Sequence[_Unit]) -> list[_Piece]:
    """Join neighbouring equal units to pieces, each described in words."""
    pieces, first = [], 0
    for unit, run in groupby(units):
        length = len(list(run))
        last = first + length * unit.size - 1
        if unit.copies is not None:
            words = _phrase(length, length * unit.copies, unit.size)
        elif length > 1:
            words = f"blocks of {unit.size}, each in the order {_order(unit.pattern)}"
        else:
            words = f"in the order {_order([first + i for i in unit.pattern])}"
        pieces.append((first, last, words))
        first = last + 1
    return pieces


def _stretches(units: Sequence[_Unit]) -> list[_Piece]:
    """Join units of single channels to pieces whose copies are spread evenly, as long as possible.

    If some unit has several channels, the result of `_runs` is returned instead.
    """
    pieces: list[_Piece] = []
    start = 0
    counts = [len(unit.pattern) for unit in units]
    if any(unit.size > 1 for unit in units):
        return _runs(units)
    while start < len(units) and len(pieces) <= _MOST_PIECES:
        wide = sum(counts[start:])
        for end in range(len(units), start, -1):
            if _spread_evenly(counts, start, end, wide):
                pieces.append((start, end - 1, _phrase(end - start, wide, 1)))
                start = end
                break
            wide -= counts[end - 1]
    return pieces


def _spread_evenly(counts: Sequence[int], start: int, end: int, wide: int) -> bool:
    """Whether the units from ``start`` to before ``end`` have as many copies as in `spread`.

    Args:
        counts: number of copies of each unit.
        start: the first unit.
        end: the unit after the last one.
        wide: number of copies of all these units together.
    """
    units = end - start
    return all(
        counts[start + c] == -(-(c + 1) * wide // units) + (-c * wide // units)
        for c in range(units)
    )


def _order(index: Sequence[int]) -> str:
    """Write an index map out as ranges of narrow channels, each with how often it is repeated."""
    map_ = IndexMap(max(index) + 1, tuple(index))
    packed = WidthPlan(1, {"": TensorPlan((map_,))}).to_dict()["maps"][0]["index"]
    return ", ".join(_range(*run) for run in packed)


def _range(start: int, step: int, length: int, repeats: int) -> str:
    text = str(start) if length == 1 else f"{start}-{start + step * (length - 1)}"
    text += f" by {step}" if length > 1 and step != 1 else ""
    return f"{text} x{repeats}" if repeats > 1 else text


def _tensor(shape: tuple[int, ...], plan: TensorPlan) -> str | dict[str, str]:
    words = {}
    for axis, map_ in enumerate(plan.axes):
        if map_ is not None:
            words[f"axis {axis}"] = axis_words(map_) + _division(plan, axis)
    is_apart = plan.extra_divisor != 1 and plan.fan_in_map is None
    divisor = f"divided by {plan.extra_divisor:g}" if is_apart else ""
    sizes = f"{_sizes(shape)} -> {_sizes(plan.wide_shape(shape))}"
    if len(shape) == 1:
        return ", ".join(filter(None, (sizes, *words.values(), divisor)))
    return {"shape": sizes, **words} | ({"weight": divisor} if divisor else {})


def _division(plan: TensorPlan, axis: int) -> str:
    if axis != plan.fan_in or plan.fan_in_map is None:
        return ""
    counts = plan.fan_in_map.counts
    if not plan.fan_in_map.is_uniform:
        further = "" if plan.extra_divisor == 1 else f" and by {plan.extra_divisor:g}"
        return f", weight divided by the number of copies{further}"
    by = int(counts[0]) * plan.extra_divisor
    return "" if by == 1 else f", weight divided by {by:g}"


def _totals(plan: WidthPlan, student: nn.Module) -> dict[str, str]:
    """How many tensors widen, and how many parameters there are before and after."""
    tensors = sum(1 for module in student.modules() for _ in _own_tensors(module))
    narrow = wide = 0
    for name, parameter in student.named_parameters():  # tied parameters count once
        narrow += parameter.numel()
        shape = tuple(parameter.shape)
        wide += prod(plan.tensors[name].wide_shape(shape) if name in plan.tensors else shape)
    return {
        "tensors": f"{len(plan.tensors)} of {tensors}",
        "parameters": f"{narrow} -> {wide}",
    }


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _plain(value: Any) -> str:
    """The text of a value; a `torch.Size` is written as a tuple."""
    return str(tuple(value)) if isinstance(value, tuple) else str(value)
