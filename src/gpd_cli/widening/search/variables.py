"""Variables: attributes, tensors and layouts that may widen in a container, with their options.

A container (a module with a forward of its own) reads attributes, tokens and tables, and takes
the outputs of its layers apart. Each of these is a variable with a few options. As a rule only
layouts and the factors of products are left to decide, since numbers and tensors are found by
arithmetic; where arithmetic fails, all variables are tried. The first guess follows the sizes that
are known to widen and the names of head counts; further guesses change few variables first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from gpd_cli.widening.layout import Layout, Scale, Segment, layout_map
from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES, NO_WIDTH_NAMES
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.plan import IndexMap, TensorPlan
from gpd_cli.widening.rules import Rule

Maps = Mapping[int, Sequence[IndexMap]]
"""Per narrow size, the index maps that axes of this size are known to widen by."""

_MOST_SIZES = 8  # longer lists of integers hold no widths
_MOST_SEGMENTS = 4  # up to so many segments, every combination of growing segments is tried


@dataclass
class Variable:
    """An attribute, tensor or layout that may widen.

    Args:
        kind: ``number`` (an attribute), ``tensor`` or ``layout`` (of layers' outputs).
        names: qualified name of the attribute or tensor, or names of all layers of one layout.
        options: by label the wide value, plan or layout; None for staying narrow.
        counts: by label the sizes that widen under this option and may count something (heads).
        first: label of the option to try first.
        named: whether names in the code say that the first option widens the number of heads.
    """

    kind: str
    names: tuple[str, ...]
    options: dict[str, Any]
    counts: dict[str, set[int]]
    first: str
    named: bool = False

    @property
    def is_count(self) -> bool:
        """Whether the variable is an attribute with one of the usual names of head counts."""
        return self.kind == "number" and split_name(self.names[0])[1] in HEAD_COUNT_NAMES

    def preferred(self, count: int | None, inner: bool) -> str:
        """The option to try first under the assumption that a count of some size widens.

        Args:
            count: the size of the count.
            inner: whether the innermost axis of this size widens, where there are several.
        """
        if self.named:
            return self.first
        labels = [label for label, counts in self.counts.items() if count in counts]
        return labels[-1 if inner else 0] if labels else self.first


def number_variable(name: str, value: Any, known: Maps, scale: Scale, rule: Rule) -> Variable:
    """The variable of an attribute that holds one or several integers.

    Args:
        name: qualified name of the attribute.
        value: the narrow value.
        known: index maps in use, by narrow size.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
    """
    _, attribute = split_name(name)
    options: dict[str, Any] = {"keep": None}

    def wide(size: int, partly: bool) -> int:
        if size in known:
            return len(known[size][0])
        return size if partly or size <= 1 else scale.count(size)

    values = [value] if isinstance(value, int) else list(value)
    if len(values) > _MOST_SIZES:
        return Variable("number", (name,), options, {}, "keep")  # a permutation, say
    for label, partly in (("known", True), ("all", False)):
        changed = [wide(v, partly) for v in values]
        if changed != values:
            packed = changed[0] if isinstance(value, int) else type(value)(changed)
            if packed not in options.values():
                options[label] = packed
    if isinstance(value, int) and scale.count(value) not in options.values():
        options["count"] = scale.count(value)
    if not isinstance(value, int) and len(values) > 1:
        for k, v in enumerate(values):  # one of several sizes (of an unflattened axis, say)
            changed = [*values[:k], wide(v, False), *values[k + 1 :]]
            if type(value)(changed) not in options.values():
                options[f"only {k}"] = type(value)(changed)
    growing = [label for label in options if label != "keep"]
    is_width = "known" in options and attribute not in (*NO_WIDTH_NAMES, *HEAD_COUNT_NAMES)
    counts = {}
    if isinstance(value, int):
        counts = {n: {value} for n in growing if options[n] == scale.count(value)}
    variable = Variable("number", (name,), options, counts, "known" if is_width else "keep")
    return _ruled(variable, rule, growing if attribute in rule.grow else [])


def scale_variable(name: str, value: float, scale: Scale, rule: Rule) -> Variable:
    """The variable of an attribute that holds a factor, such as the scale of attention's products.

    Where heads become wider instead of more, products of queries and keys are sums over copies.

    Args:
        name: qualified name of the attribute.
        value: the narrow value.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
    """
    options: dict[str, Any] = {"keep": None}
    if float(scale.ratio).is_integer() and split_name(name)[1] not in rule.keep:
        options["shared"] = value / scale.ratio
    return Variable("number", (name,), options, {}, "keep")


def tensor_variable(
    name: str,
    shape: Sequence[int],
    known: Maps,
    blocks: Mapping[int, set[int]],
    scale: Scale,
    rule: Rule,
) -> Variable:
    """The variable of a tensor that code uses directly: tokens, position embeddings, bias tables.

    Args:
        name: qualified name of the parameter or buffer.
        shape: the narrow shape.
        known: index maps in use, by narrow size.
        blocks: sizes of the blocks that layers of the container may widen in, with their counts.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
    """
    options: dict[str, Any] = {"keep": None}
    counts: dict[str, set[int]] = {}
    first = "keep"
    _, local = split_name(name)

    def add(label: str, axis: int, map_: IndexMap, sizes: set[int]) -> str:
        axes = (*(None,) * axis, map_, *(None,) * (len(shape) - axis - 1))
        plan = TensorPlan(axes)
        label = next((n for n, other in options.items() if other == plan), label)
        options[label] = plan
        counts.setdefault(label, set()).update(sizes)
        return label

    for axis in reversed(range(len(shape))):
        size = shape[axis]
        if size == 1 and local not in rule.axes:
            continue
        for number, map_ in enumerate(known.get(size, ())):
            label = add(f"axis {axis}" + f" like {number}" * (number > 0), axis, map_, set())
            first = label if first == "keep" else first
        plain = Segment(size).map(Scale(scale.ratio))
        add(
            f"axis {axis}" if f"axis {axis}" not in options else f"axis {axis} copied",
            axis,
            plain,
            {size},
        )
        for number, (block, sizes) in enumerate(blocks.items()):
            if 1 < block < size and size % block == 0:
                map_ = Segment(size, block=block).map(scale)
                add(f"axis {axis} in blocks {number}", axis, map_, sizes)
    variable = Variable("tensor", (name,), options, counts, first)
    grown = [f"axis {rule.axes[local] % len(shape)}"] if local in rule.axes else []
    return _ruled(variable, rule, grown)


def _ruled(variable: Variable, rule: Rule, grown: Sequence[str]) -> Variable:
    """The variable with the options that a rule leaves.

    Args:
        variable: the variable of an attribute or tensor, with all its options.
        rule: the rule of the container's class.
        grown: labels of the options that are left where the rule says that it widens.
    """
    _, local = split_name(variable.names[0])
    if local in rule.keep:
        left: Sequence[str] = ["keep"]
    elif grown:
        left = grown
    else:
        return variable
    options = {label: variable.options[label] for label in left}
    counts = {label: sizes for label, sizes in variable.counts.items() if label in options}
    return replace(variable, options=options, counts=counts, first=left[0])


def layout_variable(
    names: tuple[str, ...], size: int, splits: Sequence[Split], scale: Scale, rule: Rule, local: str
) -> Variable:
    """The variable of a layout: the order of the wide outputs of one or several layers.

    Args:
        names: names of the layers.
        size: the layers' narrow out_channels.
        splits: the splits of the layers' outputs.
        scale: how much wider the network gets.
        rule: the rule of the container's class.
        local: the first layer's name inside the container.
    """
    options: dict[str, Any] = {"plain": (Segment(size),)}
    counts: dict[str, set[int]] = {}
    first, named = "plain", False
    for number, split in enumerate(splits):
        for label, layout, sizes in _layouts(size, split):
            same = [n for n, other in options.items() if _same(other, layout, scale)]
            full = f"{label} of split {number}"
            name_here = same[0] if same else full if full not in options else f"{full}, unfolded"
            options.setdefault(name_here, layout)
            counts.setdefault(name_here, set()).update(sizes)
            if label == "segments" and 1 in split.segments:
                first = name_here
            if not named and label == f"factor {split.heads}":
                first, named = name_here, True
    if not all(split.layer for split in splits):
        options["keep"] = (Segment(size, grows=False),)
    single = any(split.segments == (1,) * size for split in splits)
    if (size == 1 or single) and "keep" in options:
        first = "keep"
    if local in rule.blocks:
        block = rule.blocks[local]
        options = {"rule": (Segment(size, block=block) if block else Segment(size, grows=False),)}
        first = "rule"
    return Variable("layout", names, options, counts, first, named and first in options)


def blocks_in(variables: Sequence[Variable]) -> dict[int, set[int]]:
    """Sizes of the blocks that layers' outputs may widen in, with the counts of these blocks."""
    blocks: dict[int, set[int]] = {}
    for variable in variables:
        for label, layout in variable.options.items():
            if variable.kind == "layout" and len(layout) == 1:
                blocks.setdefault(layout[0].block, set()).update(variable.counts.get(label, ()))
    return blocks


def _layouts(size: int, split: Split) -> Iterator[tuple[str, Layout, set[int]]]:
    if split.segments:
        if sum(split.segments) == size:
            yield from _segmented(split.segments)
        return
    for k, factor in enumerate(split.factors):
        parts, block = prod(split.factors[:k]), prod(split.factors[k + 1 :])
        counts = {factor} if split.may_count(k) else set()
        if size < split.size and split.size % size == 0:
            # The outputs were joined with others before the split, or unfolded.
            if size % (parts * block) == 0:
                yield f"factor {k}", (Segment(size, parts, block),), counts
            block, rest = divmod(block, split.size // size)
            if rest:
                continue
        elif size % split.size == 0:
            parts *= size // split.size  # the outputs were cut into parts before the split
        else:
            continue
        if size % (parts * block) == 0:
            yield f"factor {k}", (Segment(size, parts, block),), counts


def _segmented(sizes: Sequence[int]) -> Iterator[tuple[str, Layout, set[int]]]:
    """Layouts of outputs that are cut into segments, for each choice of segments that widen."""
    able = [k for k, size in enumerate(sizes) if size > 1]
    for count in range(len(able), 0, -1):
        for growing in itertools.combinations(able, count if len(able) <= _MOST_SEGMENTS else 0):
            label = "segments" if count == len(able) else f"segments {growing}"
            layout = tuple(Segment(s, grows=k in growing) for k, s in enumerate(sizes))
            if growing:
                yield label, layout, set()


def _same(a: Layout, b: Layout, scale: Scale) -> bool:
    return layout_map(a, scale) == layout_map(b, scale)
