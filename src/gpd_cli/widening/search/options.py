"""The options of variables: the ways in which an attribute, a tensor or a layout may widen.

Options follow from the sizes that are known to widen, from the splits of layers' outputs, and from
the rule of the container's class. A variable's first option is the likeliest one, judged by these
sizes and by names that usually stand for numbers of heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

from gpd_cli.widening.layout import Layout, Scale, Segment, layout_map
from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES, NO_WIDTH_NAMES
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.plan import IndexMap, TensorPlan
from gpd_cli.widening.rules import Rule
from gpd_cli.widening.search.variables import (
    DIVIDED,
    SIDE_BY_SIDE,
    STAYS_NARROW,
    LayoutVariable,
    NumberVariable,
    TensorVariable,
)

Maps = Mapping[int, Sequence[IndexMap]]
"""For each narrow size, the index maps that axes of this size are known to widen by."""

IN_USE = "in use"
"""Label of the option that integers widen as axes of their size do, and others stay."""

ALL_SIZES = "all sizes"
"""Label of the option that integers widen as axes of their size do, and others by the ratio."""

COUNT = "count"
"""Label of the option that an integer widens as a number of heads or groups."""

ALL_SEGMENTS = "segments"
"""Label of the layout in which every segment widens."""

BY_RULE = "rule"
"""Label of the layout that a rule asks for."""

_MOST_SIZES = 8  # longer lists of integers are taken to hold no widths
_MOST_SEGMENTS = 4  # up to so many segments, all combinations of growing ones are tried, else none

_AttributeOrTensor = TypeVar("_AttributeOrTensor", NumberVariable, TensorVariable)


def number_variable(name: str, value: Any, known: Maps, scale: Scale, rule: Rule) -> NumberVariable:
    """Make the variable of an attribute that holds one or several integers.

    Args:
        name: qualified name of the attribute.
        value: the narrow value.
        known: index maps in use, by narrow size.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
    """
    _, attribute = split_name(name)
    options: dict[str, Any] = {STAYS_NARROW: None}

    def as_in_use(size: int) -> int:
        return len(known[size][0]) if size in known else size

    def always_wider(size: int) -> int:
        return scale.count(size) if size > 1 and size not in known else as_in_use(size)

    values = [value] if isinstance(value, int) else list(value)
    if len(values) > _MOST_SIZES:
        return NumberVariable((name,), options, STAYS_NARROW)  # the value may be a permutation
    for label, wide in ((IN_USE, as_in_use), (ALL_SIZES, always_wider)):
        changed = [wide(v) for v in values]
        if changed != values:
            packed = changed[0] if isinstance(value, int) else type(value)(changed)
            if packed not in options.values():
                options[label] = packed
    if isinstance(value, int) and scale.count(value) not in options.values():
        options[COUNT] = scale.count(value)
    if not isinstance(value, int) and len(values) > 1:
        for k, v in enumerate(values):  # only one of several sizes widens, as of unflattened axes
            changed = [*values[:k], always_wider(v), *values[k + 1 :]]
            if type(value)(changed) not in options.values():
                options[f"only size {k}"] = type(value)(changed)
    growing = [label for label in options if label != STAYS_NARROW]
    is_width = IN_USE in options and attribute not in (*NO_WIDTH_NAMES, *HEAD_COUNT_NAMES)
    counts = {}
    if isinstance(value, int):
        counts = {n: {value} for n in growing if options[n] == scale.count(value)}
    variable = NumberVariable((name,), options, IN_USE if is_width else STAYS_NARROW, counts)
    return _ruled(variable, rule, growing if attribute in rule.grow else [])


def factor_variable(name: str, value: float, scale: Scale, rule: Rule) -> NumberVariable:
    """Make the variable of an attribute that holds a factor of products, such as attention's scale.

    If heads become wider instead of more, products of queries and keys are sums over copies, and
    the factor has to be divided by the ratio.

    Args:
        name: qualified name of the attribute.
        value: the narrow value.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
    """
    variable = NumberVariable((name,), {STAYS_NARROW: None}, STAYS_NARROW)
    if float(scale.ratio).is_integer() and split_name(name)[1] not in rule.keep:
        variable.options[DIVIDED] = value / scale.ratio
    return variable


def tensor_variable(
    name: str,
    shape: Sequence[int],
    known: Maps,
    blocks: Mapping[int, set[int]],
    scale: Scale,
    rule: Rule,
) -> TensorVariable:
    """Make the variable of a tensor that code uses directly (token, position embedding, table).

    Args:
        name: qualified name of the parameter or buffer.
        shape: the narrow shape.
        known: index maps in use, by narrow size.
        blocks: sizes of the blocks that layers of the container may widen in, with the possible
            numbers of such blocks, from `blocks_in`.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
    """
    options: dict[str, TensorPlan | None] = {STAYS_NARROW: None}
    counts: dict[str, set[int]] = {}
    first = STAYS_NARROW
    _, local = split_name(name)

    def add(label: str, axis: int, map_: IndexMap, sizes: set[int]) -> str:
        """Add an option, unless there is the same one already, and return its label."""
        axes = (*(None,) * axis, map_, *(None,) * (len(shape) - axis - 1))
        plan = TensorPlan(axes)
        label = next((n for n, other in options.items() if other == plan), label)
        options[label] = plan
        counts.setdefault(label, set()).update(sizes)
        return label

    for axis in reversed(range(len(shape))):
        size, along = shape[axis], _along(axis)
        if size == 1 and local not in rule.axes:
            continue
        for number, map_ in enumerate(known.get(size, ())):
            label = add(along + f" by map {number}" * (number > 0), axis, map_, set())
            first = label if first == STAYS_NARROW else first
        spread_out = Segment(size).map(Scale(scale.ratio))
        label = along if along not in options else f"{along} {SIDE_BY_SIDE}"
        add(label, axis, spread_out, {size})
        for number, (block, sizes) in enumerate(blocks.items()):
            if 1 < block < size and size % block == 0:
                map_ = Segment(size, block=block).map(scale)
                add(f"{along} in blocks {number}", axis, map_, sizes)
    variable = TensorVariable((name,), options, first, counts)
    grown = [_along(rule.axes[local] % len(shape))] if local in rule.axes else []
    return _ruled(variable, rule, grown)


def layout_variable(
    names: tuple[str, ...], size: int, splits: Sequence[Split], scale: Scale, rule: Rule, local: str
) -> LayoutVariable:
    """Make the variable of a layout: the order of the wide outputs of one or several layers.

    Args:
        names: names of the layers.
        size: the narrow number of output channels of each of these layers.
        splits: the splits of the layers' outputs.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
        local: the first layer's name inside the container.
    """
    options: dict[str, Layout] = {SIDE_BY_SIDE: (Segment(size),)}
    counts: dict[str, set[int]] = {}
    first, named = SIDE_BY_SIDE, False
    for number, split in enumerate(splits):
        for follows, layout, sizes in _layouts(size, split):
            label = f"{follows} of split {number}"
            if label in options:
                label = f"{label}, unfolded"
            label = next((n for n, other in options.items() if _same(other, layout, scale)), label)
            options.setdefault(label, layout)
            counts.setdefault(label, set()).update(sizes)
            if follows == ALL_SEGMENTS and 1 in split.segments:
                first = label
            if not named and split.heads is not None and follows == _factor(split.heads):
                first, named = label, True
    if not all(split.layer for split in splits):
        options[STAYS_NARROW] = (Segment(size, grows=False),)
    one_by_one = any(split.segments == (1,) * size for split in splits)
    if (size == 1 or one_by_one) and STAYS_NARROW in options:
        first = STAYS_NARROW
    if local in rule.blocks:
        block = rule.blocks[local]
        options = {BY_RULE: (Segment(size, block=block) if block else Segment(size, grows=False),)}
        first = BY_RULE
    return LayoutVariable(names, options, first, counts, named)


def blocks_in(layouts: Sequence[LayoutVariable]) -> dict[int, set[int]]:
    """Sizes of the blocks that layers' outputs may widen in, each with possible numbers of blocks.

    Args:
        layouts: the variables of the layers' layouts.
    """
    blocks: dict[int, set[int]] = {}
    for variable in layouts:
        for label, layout in variable.options.items():
            if len(layout) == 1:
                blocks.setdefault(layout[0].block, set()).update(variable.counts.get(label, ()))
    return blocks


def _along(axis: int) -> str:
    """Label of the option that a tensor widens along an axis."""
    return f"axis {axis}"


def _factor(number: int) -> str:
    """Beginning of the label of a layout in which the factor of this number in a split widens."""
    return f"factor {number}"


def _ruled(variable: _AttributeOrTensor, rule: Rule, grown: Sequence[str]) -> _AttributeOrTensor:
    """Reduce the options of a variable to those that a rule allows.

    Args:
        variable: the variable of an attribute or tensor, with all its options.
        rule: the rule of the container's class.
        grown: labels of the options that are left if the rule says that the variable widens; empty
            if it does not say so.
    """
    _, local = split_name(variable.names[0])
    if local in rule.keep:
        left: Sequence[str] = [STAYS_NARROW]
    elif grown:
        left = grown
    else:
        return variable
    options = {label: variable.options[label] for label in left}
    counts = {label: sizes for label, sizes in variable.counts.items() if label in options}
    return replace(variable, options=options, first=left[0], counts=counts)


def _layouts(size: int, split: Split) -> Iterator[tuple[str, Layout, set[int]]]:
    """Generate the layouts that suit a split of layers' outputs.

    Args:
        size: the narrow number of output channels of the layers.
        split: a split of the layers' outputs.

    Yields:
        For each layout the beginning of its label (which part of the split widens), the layout, and
        the sizes that widen and may be numbers of heads.
    """
    if split.segments:
        if sum(split.segments) == size:
            yield from _segmented(split.segments)
        return
    for k, factor in enumerate(split.factors):
        parts, block = prod(split.factors[:k]), prod(split.factors[k + 1 :])
        counts = {factor} if split.may_count(k) else set()
        if size < split.size and split.size % size == 0:
            # The outputs were joined with other channels before the split, or unfolded.
            if size % (parts * block) == 0:
                yield _factor(k), (Segment(size, parts, block),), counts
            block, rest = divmod(block, split.size // size)
            if rest:
                continue
        elif size % split.size == 0:
            parts *= size // split.size  # the outputs were cut into parts before the split
        else:
            continue
        if size % (parts * block) == 0:
            yield _factor(k), (Segment(size, parts, block),), counts


def _segmented(sizes: Sequence[int]) -> Iterator[tuple[str, Layout, set[int]]]:
    """Generate the layouts of outputs that are cut into segments, by which segments widen."""
    able = [k for k, size in enumerate(sizes) if size > 1]
    for count in range(len(able), 0, -1):
        for growing in itertools.combinations(able, count if len(able) <= _MOST_SEGMENTS else 0):
            label = ALL_SEGMENTS if count == len(able) else f"{ALL_SEGMENTS} {growing}"
            layout = tuple(Segment(s, grows=k in growing) for k, s in enumerate(sizes))
            if growing:
                yield label, layout, set()


def _same(a: Layout, b: Layout, scale: Scale) -> bool:
    return layout_map(a, scale) == layout_map(b, scale)
