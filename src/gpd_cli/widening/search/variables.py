"""What may widen in a container besides its layers, and in which order to try it.

A container (a module with a forward of its own) reads attributes, tokens and tables, and takes
the outputs of its layers apart. Each of these is a variable with a few options. As a rule only the
outputs and the factors of products are left to be decided, for numbers and tensors are solved; all
are tried where that does not do. The first guess goes by the sizes that are known to widen, and by
the names of head counts; what does not work out is tried in another way, few changes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpd_cli.widening.layout import Layout, Scale, Segment, layout_map
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.plan import IndexMap, TensorPlan
from gpd_cli.widening.rules import COUNTS, PLACES, Rule

Maps = Mapping[int, Sequence[IndexMap]]
"""Per narrow size, the index maps that axes of this size are known to widen by."""

_MOST_SIZES = 8  # in a list that may hold widths
_MOST_SEGMENTS = 4  # whose growing is tried one by one


@dataclass
class Variable:
    """One thing that may widen.

    Args:
        kind: ``number`` (an attribute), ``tensor`` or ``layout`` (of layers' outputs).
        names: its qualified name; those of all layers that are alike and widen alike.
        options: by label, what becomes of it; None for staying as it is.
        counts: by label, the sizes that widen there, where they may count something (heads).
        first: label of the option to try first.
        named: whether that is the one that the code itself names, as its number of heads.
    """

    kind: str
    names: tuple[str, ...]
    options: dict[str, Any]
    counts: dict[str, set[int]]
    first: str
    named: bool = False

    @property
    def is_count(self) -> bool:
        """Whether it is an attribute under one of the usual names of head counts."""
        return self.kind == "number" and self.names[0].rpartition(".")[2] in COUNTS

    def preferred(self, count: int | None, inner: bool) -> str:
        """The option to try first when a count of this size is taken to widen.

        Args:
            count: the size.
            inner: whether, where it occurs more than once, the inner one widens.
        """
        if self.named:
            return self.first
        labels = [label for label, counts in self.counts.items() if count in counts]
        return labels[-1 if inner else 0] if labels else self.first


def number_variable(name: str, value: Any, known: Maps, scale: Scale, rule: Rule) -> Variable:
    """An attribute that holds one or several integers.

    Args:
        name: its qualified name.
        value: the narrow value.
        known: sizes that widen.
        scale: how much wider.
        rule: what is known by hand.
    """
    attribute = name.rpartition(".")[2]
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
    first = "keep"
    if "known" in options and attribute not in (*PLACES, *COUNTS):
        first = "known"
    if attribute in rule.grow and growing:
        options.pop("keep")
        first = growing[0]
    if attribute in rule.keep:
        options, first, growing = {"keep": None}, "keep", []
    counts = {}
    if isinstance(value, int):
        counts = {n: {value} for n in growing if options[n] == scale.count(value)}
    return Variable("number", (name,), options, counts, first)


def factor_variable(name: str, value: float, scale: Scale, rule: Rule) -> Variable:
    """An attribute that holds a factor, such as what products of queries and keys are scaled by.

    Where the heads themselves become wider, not more, these products are sums of more copies.

    Args:
        name: its qualified name.
        value: the narrow value.
        scale: how much wider.
        rule: what is known by hand.
    """
    options: dict[str, Any] = {"keep": None}
    if float(scale.ratio).is_integer() and name.rpartition(".")[2] not in rule.keep:
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
    """A parameter or buffer that code uses directly: tokens, position embeddings, bias tables.

    Args:
        name: its qualified name.
        shape: its narrow shape.
        known: sizes that widen.
        blocks: in what blocks layers nearby may widen, with the counts of these blocks.
        scale: how much wider.
        rule: what is known by hand.
    """
    options: dict[str, Any] = {"keep": None}
    counts: dict[str, set[int]] = {}
    first, local = "keep", name.rpartition(".")[2]

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
    if local in rule.axes:
        first = f"axis {rule.axes[local] % len(shape)}"
        options = {first: options[first]}
    if local in rule.keep:
        options, first = {"keep": None}, "keep"
    return Variable("tensor", (name,), options, counts, first)


def layout_variable(
    names: tuple[str, ...], size: int, splits: Sequence[Split], scale: Scale, rule: Rule, local: str
) -> Variable:
    """The order in which a layer's wide outputs lie.

    Args:
        names: the layers.
        size: their narrow number of outputs.
        splits: how code took their outputs apart.
        scale: how much wider.
        rule: what is known by hand.
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
    """In what blocks the outputs of some layers may widen, with the counts of these blocks."""
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
        parts, block = 1, 1
        for f in split.factors[:k]:
            parts *= f
        for f in split.factors[k + 1 :]:
            block *= f
        counts = {factor} if split.may_count(k) else set()
        if size < split.size and split.size % size == 0:
            # It was joined with others before, or unfolded.
            if size % (parts * block) == 0:
                yield f"factor {k}", (Segment(size, parts, block),), counts
            block, rest = divmod(block, split.size // size)
            if rest:
                continue
        elif size % split.size == 0:
            parts *= size // split.size  # it was cut into parts before
        else:
            continue
        if size % (parts * block) == 0:
            yield f"factor {k}", (Segment(size, parts, block),), counts


def _segmented(sizes: Sequence[int]) -> Iterator[tuple[str, Layout, set[int]]]:
    """Outputs that are cut into segments, of which some widen and others do not."""
    able = [k for k, size in enumerate(sizes) if size > 1]
    for count in range(len(able), 0, -1):
        for growing in itertools.combinations(able, count if len(able) <= _MOST_SEGMENTS else 0):
            label = "segments" if count == len(able) else f"segments {growing}"
            layout = tuple(Segment(s, grows=k in growing) for k, s in enumerate(sizes))
            if growing:
                yield label, layout, set()


def _same(a: Layout, b: Layout, scale: Scale) -> bool:
    return layout_map(a, scale) == layout_map(b, scale)
