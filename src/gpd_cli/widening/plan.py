"""The width plan: a value that says, for each tensor, which wide channel copies which narrow one.

A plan does not depend on the weights. Expansion (student to dynamic teacher) and slicing (dynamic
teacher to student) are pure functions of a plan and a tensor. Checkpoints contain the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

Index = slice | Tensor
"""An index of positions along an axis: a slice for evenly spaced positions, else a tensor."""


@dataclass(frozen=True)
class IndexMap:
    """A map from each position of a wide axis to the position of the narrow axis that it copies.

    Args:
        narrow_size: size of the narrow axis.
        index: for each wide position, the narrow position that it copies.

    Example:
        >>> channels = IndexMap(2, (0, 1, 0))
        >>> channels.counts, channels.firsts
        (tensor([2, 1]), tensor([0, 1]))
    """

    narrow_size: int
    index: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def tensor(self) -> Tensor:
        """The map as an int64 tensor of shape ``[wide]``."""
        return torch.tensor(self.index, dtype=torch.int64)

    @cached_property
    def counts(self) -> Tensor:
        """n(c), the number of copies of each narrow position: int64 of shape ``[narrow_size]``."""
        return torch.bincount(self.tensor, minlength=self.narrow_size)

    @cached_property
    def firsts(self) -> Tensor:
        """a(c), the first wide position that copies c: int64 of shape ``[narrow_size]``."""
        positions = torch.arange(len(self.index))
        firsts = torch.full((self.narrow_size,), len(self.index))
        return firsts.scatter_reduce_(0, self.tensor, positions, "amin")

    @cached_property
    def first_copies(self) -> Index:
        """Index of the first copies; if they are evenly spaced, a slice, which copies no data."""
        return evenly(self.firsts)

    @property
    def is_identity(self) -> bool:
        """Whether the axis keeps its size and its order."""
        return self.index == tuple(range(self.narrow_size))

    @property
    def is_uniform(self) -> bool:
        """Whether every narrow position has the same number of copies."""
        return bool((self.counts == self.counts[0]).all())

    def is_onto(self) -> bool:
        """Whether every narrow position has at least one copy, as slicing requires."""
        return bool((self.counts > 0).all())


def evenly(positions: Tensor) -> Index:
    """Make a slice of positions that are evenly spaced; return other positions unchanged."""
    if len(positions) == 1:
        return slice(int(positions[0]), int(positions[0]) + 1)
    steps = positions.diff()
    step = int(steps[0])
    if step > 0 and bool((steps == step).all()):
        return slice(int(positions[0]), int(positions[-1]) + 1, step)
    return positions


def identity(size: int) -> IndexMap:
    """Make the index map of an axis that keeps its size."""
    return IndexMap(size, tuple(range(size)))


@lru_cache(maxsize=256)
def spread(units: int, wide: int, block: int = 1) -> IndexMap:
    """Make an index map with the copies of each unit side by side: ``c0 c0 c1 c1 ...``.

    A unit is a channel, or a block of neighbouring channels that are copied together.

    Args:
        units: number of narrow units.
        wide: number of wide units; where this is no multiple of ``units``, some units have one copy
            more than others.
        block: number of channels of a unit (the head width where heads are copied).

    Example:
        >>> spread(2, 4).index
        (0, 0, 1, 1)
        >>> spread(2, 4, block=3).index  # two heads of three channels
        (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)
        >>> spread(2, 3).index
        (0, 0, 1)
    """
    return IndexMap(
        units * block,
        tuple(j * units // wide * block + b for j in range(wide) for b in range(block)),
    )


@lru_cache(maxsize=256)
def stack(map_: IndexMap, times: int) -> IndexMap:
    """Repeat an index map for ``times`` parts laid end to end (such as queries, keys and values).

    Example:
        >>> stack(spread(1, 2), 3).index
        (0, 0, 1, 1, 2, 2)
    """
    index = tuple(part * map_.narrow_size + i for part in range(times) for i in map_.index)
    return IndexMap(map_.narrow_size * times, index)


Axes = Sequence[IndexMap | None]
"""For each axis of a tensor its index map, or None where the axis keeps its size."""


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor widens.

    Args:
        axes: for each axis its index map, or None where the axis keeps its size.
        fan_in: number of the fan-in axis, which the layer sums over: each of n copies of an input
            gets 1/n of the weight. None for tensors that are only copied (biases, norms, tokens).
        extra_divisor: further divisor of the whole tensor, which is needed in two cases. The
            standardization of a kernel would remove the factor 1/n, so the gain that follows is
            divided instead. And the weight of a layer whose input is a multiple of copies is
            divided by the factor of this multiple.
    """

    axes: tuple[IndexMap | None, ...]
    fan_in: int | None = None
    extra_divisor: float = 1

    @property
    def fan_in_map(self) -> IndexMap | None:
        """The index map of the fan-in axis; None where there is no such axis, or it stays."""
        return None if self.fan_in is None else self.axes[self.fan_in]

    def wide_shape(self, narrow: Sequence[int]) -> tuple[int, ...]:
        """Compute the shape of the wide tensor.

        Args:
            narrow: the shape of the narrow tensor.
        """
        pairs = zip(narrow, self.axes, strict=True)
        return tuple(size if axis is None else len(axis) for size, axis in pairs)

    @cached_property
    def first_copies(self) -> tuple[Index, ...]:
        """Index of the first copies, ``[a(o), a(i)]``, one entry per axis: the student's tensor."""
        index = [slice(None) if axis is None else axis.first_copies for axis in self.axes]
        tensors = [k for k, part in enumerate(index) if isinstance(part, Tensor)]
        if len(tensors) < 2:
            return tuple(index)
        # Several index tensors select a grid only when they broadcast against each other, and the
        # axes keep their places only when every axis between them has an index tensor as well.
        span = range(tensors[0], tensors[-1] + 1)
        for position, k in enumerate(span):
            axis = self.axes[k]
            if axis is None:
                raise ValueError("widened axes of one tensor must be neighbours")
            shape = [1] * len(span)
            shape[position] = -1
            index[k] = axis.firsts.reshape(shape)
        return tuple(index)

    def divisor(self, like: Tensor) -> Tensor | None:
        """The divisor, n(i) times `extra_divisor`, shaped to broadcast against the *narrow* tensor.

        Args:
            like: a tensor with the device and dtype of the result.

        Returns:
            The divisor, or None where nothing is divided.
        """
        if self.fan_in_map is None:
            shape = [1] * len(self.axes)
            return None if self.extra_divisor == 1 else like.new_full(shape, self.extra_divisor)
        return self._along_fan_in(self.fan_in_map.counts).to(like) * self.extra_divisor

    def wide_divisor(self, like: Tensor) -> Tensor | None:
        """The divisor, shaped to broadcast against the *wide* tensor; otherwise as `divisor`."""
        if self.fan_in_map is None:
            return self.divisor(like)
        counts = self.fan_in_map.counts[self.fan_in_map.tensor]
        return self._along_fan_in(counts).to(like) * self.extra_divisor

    def _along_fan_in(self, values: Tensor) -> Tensor:
        shape = [1] * len(self.axes)
        shape[self.fan_in or 0] = -1
        return values.reshape(shape)


@dataclass
class WidthPlan:
    """The whole plan of a network.

    Args:
        ratio: the expansion ratio.
        tensors: the plans of the parameters and buffers that widen, by qualified name.
        attributes: the wide values of the attributes that change (``out_channels``, ``num_heads``,
            ...), by qualified module name and attribute name.
        kept_narrow: the reasons for which modules stay narrow inside, by module name.
        trials: number of runs of parts of the network that failed while the plan was searched.
        runs_again: whether the backward pass runs parts of the network again (gradient
            checkpointing).
    """

    ratio: float
    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept_narrow: dict[str, str] = field(default_factory=dict)
    trials: int = field(default=0, compare=False)
    runs_again: bool = field(default=False, compare=False)

    def __iter__(self) -> Iterator[tuple[str, TensorPlan]]:
        return iter(self.tensors.items())

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to plain values (JSON), in which equal index maps are stored once."""
        maps: dict[IndexMap, int] = {}

        def number(axis: IndexMap | None) -> int | None:
            return None if axis is None else maps.setdefault(axis, len(maps))

        tensors = {
            name: {
                "axes": [number(axis) for axis in plan.axes],
                "fan_in": plan.fan_in,
                "share": plan.extra_divisor,
            }
            for name, plan in self
        }
        return {
            "ratio": self.ratio,
            "tensors": tensors,
            "attributes": self.attributes,
            "narrow": dict(self.kept_narrow),
            "runs_again": self.runs_again,
            "maps": [{"narrow": m.narrow_size, "index": _pack(m.index)} for m in maps],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WidthPlan:
        """Rebuild a plan from the output of `to_dict`."""
        maps = [IndexMap(m["narrow"], _unpack(m["index"])) for m in data["maps"]]
        tensors = {
            name: TensorPlan(
                tuple(None if number is None else maps[number] for number in entry["axes"]),
                entry["fan_in"],
                entry.get("share", 1),
            )
            for name, entry in data["tensors"].items()
        }
        attributes = {
            module: {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in values.items()
            }
            for module, values in data["attributes"].items()
        }
        kept_narrow = data.get("narrow", {})
        if not isinstance(kept_narrow, Mapping):  # plans of earlier versions have no reasons
            kept_narrow = dict.fromkeys(kept_narrow, "")
        runs_again = bool(data.get("runs_again"))
        return cls(data["ratio"], tensors, attributes, dict(kept_narrow), runs_again=runs_again)


def _pack(index: Sequence[int]) -> list[list[int]]:
    """Compress an index map into runs ``[start, step, length, repeats]``.

    A run stands for ``length`` values with the distance ``step``, each of them repeated ``repeats``
    times. Index maps are long but regular, so few runs suffice.
    """
    runs: list[list[int]] = []
    for value in index:  # first count equal neighbours ...
        if runs and runs[-1][0] == value:
            runs[-1][3] += 1
        else:
            runs.append([value, 0, 1, 1])
    packed: list[list[int]] = []
    for value, _, _, repeats in runs:  # ... then join evenly spaced values
        if packed and packed[-1][3] == repeats:
            start, step, length, _ = packed[-1]
            if length == 1 or value == start + step * length:
                packed[-1] = [start, value - start if length == 1 else step, length + 1, repeats]
                continue
        packed.append([value, 0, 1, repeats])
    return packed


def _unpack(runs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(
        start + step * k
        for start, step, length, repeats in runs
        for k in range(length)
        for _ in range(repeats)
    )
