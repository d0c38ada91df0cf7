"""Find index maps by comparing values: which wide channel copies which narrow one.

`match_axes` and `match_multiple` compare an activation of the wide network with the student's;
`Matches` does this for the inputs and outputs of modules.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpd_cli.widening.mismatch import Mismatch, UnfitMultiple, times
from gpd_cli.widening.plan import IndexMap, spread

# Channels whose values are closer than this, relative to the largest, are told apart by position.
_TIE = 1e-10
# Tolerance between wide and narrow activations, relative to the largest value. Attention that
# divides by small sums has rounding errors of this size. The certificate is stricter.
_EXACT = 1e-6
_MOST_COPIES = 16  # most copies of a channel, where activations are multiples of copies
_SIMPLE = 1e-9  # relative tolerance of the square of a factor
_REMEMBERED = 16  # number of pairs of tensors whose match is kept


class Match(NamedTuple):
    """How an activation of the wide network follows from the student's.

    Args:
        axes: the index map of each axis; None for an axis that keeps its size.
        factor: the number that the copies are multiplied by; 1 for plain copies.
    """

    axes: tuple[IndexMap | None, ...]
    factor: float


def match_axes(narrow: Tensor, wide: Tensor) -> tuple[IndexMap | None, ...] | None:
    """Find index maps by which ``wide`` is a replication of ``narrow``.

    Args:
        narrow: an activation of the student, in float64.
        wide: the same activation in the dynamic teacher, with as many axes.

    Returns:
        For each axis its index map, or None where the axis keeps its size. A single None if
        ``wide`` is no replication of ``narrow``.
    """
    if narrow.ndim != wide.ndim or (wide.numel() == 0) != (narrow.numel() == 0):
        return None
    if narrow.numel() == 0:
        return (None,) * narrow.ndim if narrow.shape == wide.shape else None
    grown = [k for k in range(narrow.ndim) if narrow.shape[k] != wide.shape[k]]
    maps: list[IndexMap | None] = [None] * narrow.ndim
    for axis in grown:
        # Means over the other axes that have grown are equal, if their positions have equally many
        # copies.
        others = [k for k in grown if k != axis]
        map_ = _match_axis(_mean(narrow, others), _mean(wide, others), axis)
        if map_ is None:
            return None
        maps[axis] = map_
    if len(grown) == 1:
        return tuple(maps)  # the search has already compared each position with its original
    replica, wide = _projected(narrow, grown), _projected(wide, grown)
    for axis, map_ in enumerate(maps):
        replica = replica if map_ is None else replica.index_select(axis, map_.tensor)
    tolerance = _EXACT * float(replica.abs().max().clamp(min=torch.finfo(narrow.dtype).tiny))
    if not float((replica - wide).abs_().max()) <= tolerance:  # NaN is no replication either
        return None
    return tuple(maps)


def match_multiple(narrow: Tensor, wide: Tensor) -> Match | None:
    """Find index maps by which ``wide`` is a replication of ``narrow`` times a number.

    Code that divides by the norm of copied channels makes all copies smaller by the same factor;
    code that sums over copied channels makes its result larger by the same factor everywhere.

    Args:
        narrow: an activation of the student, in float64.
        wide: the same activation in the dynamic teacher, with as many axes.

    Returns:
        The index maps, as from `match_axes`, and the number, which is 1 for a replication; None if
        there are no such maps.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
        >>> maps, factor = match_multiple(x, x[:, [0, 0, 1, 1]] / 2**0.5)
        >>> maps[1].index, round(factor, 4)
        ((0, 0, 1, 1), 0.7071)
    """
    axes = match_axes(narrow, wide)
    if axes is not None:
        return Match(axes, 1.0)
    factor = _factor_between(narrow, wide) if narrow.ndim == wide.ndim else None
    axes = None if factor is None else match_axes(narrow, wide / factor)
    return None if axes is None or factor is None else Match(axes, factor)


def _factor_between(narrow: Tensor, wide: Tensor) -> float | None:
    """Find the factor between two activations by their root mean squares, or None.

    If all channels have equally many copies, the copies do not change the root mean square. Only
    factors whose square is a fraction of small numbers are accepted.
    """
    squares = [float(x.square().mean()) if x.numel() else 0.0 for x in (narrow, wide)]
    if not all(0 < square < math.inf for square in squares):
        return None
    found = squares[1] / squares[0]
    simple = float(Fraction(found).limit_denominator(_MOST_COPIES**2))
    return math.sqrt(simple) if abs(simple / found - 1) < _SIMPLE else None


def _projected(activation: Tensor, grown: list[int]) -> Tensor:
    """Replace all axes that have not grown by one random projection.

    Args:
        activation: the activation.
        grown: numbers of the axes that have grown.
    """
    if len(grown) in (0, activation.ndim):
        return activation
    moved = activation.movedim(grown, list(range(len(grown)))).flatten(len(grown))
    projected = moved @ _direction(moved.shape[-1]).to(moved.dtype)
    shape = [activation.shape[k] if k in grown else 1 for k in range(activation.ndim)]
    return projected.reshape(shape)


@lru_cache(maxsize=64)
def _direction(size: int) -> Tensor:
    """A random vector, ``[size]``, which is the same for equal sizes."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _along(activation: Tensor, axis: int) -> Tensor:
    """Project all axes but one onto a random direction, without moving any axis in memory.

    Args:
        activation: the activation.
        axis: number of the axis that stays.

    Returns:
        One number for each position of the axis, ``[size]``.
    """
    before, size = math.prod(activation.shape[:axis]), activation.shape[axis]
    x = activation.reshape(before, size, -1)
    direction = _direction(before * x.shape[2]).to(x.dtype).reshape(before, x.shape[2])
    if x.shape[2] == 1:
        return direction[:, 0] @ x[..., 0]
    # Separate products with vectors, since torch's batched product takes several times as long.
    return torch.stack([rows @ d for rows, d in zip(x, direction, strict=True)]).sum(0)


def _mean(activation: Tensor, axes: list[int]) -> Tensor:
    return activation.mean(axes, keepdim=True) if axes else activation


def _match_axis(narrow: Tensor, wide: Tensor, axis: int) -> IndexMap | None:
    """Find the index map of one axis by a random projection of all other axes, or None."""
    a, b = _along(narrow, axis), _along(wide, axis)
    tie = _TIE * float(a.abs().max())
    order = a.argsort(stable=True)
    ranked = a[order]
    group = torch.cat([order.new_zeros(1), (ranked.diff() > tie).cumsum(0)])
    # For each wide channel, the nearest of the sorted narrow values.
    right = torch.searchsorted(ranked, b).clamp(max=len(ranked) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.where((ranked[left] - b).abs() < (ranked[right] - b).abs(), left, right)
    if not float((ranked[nearest] - b).abs().max()) <= _EXACT * float(a.abs().max()):
        return None  # NaN is no replication either
    found = group[nearest]
    if int(group[-1]) + 1 == len(ranked):  # no equal channels: the common case
        return IndexMap(len(ranked), tuple(order[nearest].tolist()))
    if int(group[-1]) == 0 and len(b) % len(ranked) == 0:
        # All channels are equal, as in a state that starts at zero: the usual layout is as good as
        # any other, and the one that the next call of the same layer has.
        return spread(len(ranked), len(b))
    regular = _regular(group[order.argsort()], found)
    if regular is not None:
        return regular
    index = torch.empty(len(b), dtype=torch.int64)
    for g in found.unique().tolist():
        # Equal narrow channels cannot be told apart: their copies are assigned in order, and as
        # equally as possible.
        sources = order[group == g].sort().values
        targets = (found == g).nonzero().flatten()
        position = torch.arange(len(targets)) * len(sources) // len(targets)
        index[targets] = sources[position]
    return IndexMap(len(ranked), tuple(index.tolist()))


def _regular(narrow: Tensor, wide: Tensor) -> IndexMap | None:
    """Find the map that copies the largest possible blocks, if some channels are equal, or None.

    Which channels are equal can depend on the input (maxima of overlapping windows). Blocks that
    are copied as a whole (the flattened pixels of a channel) do not depend on the input.

    Args:
        narrow: for each narrow channel, the number of its group of equal channels.
        wide: for each wide channel, the number of the group that it has copied from.
    """
    size = len(narrow)
    for count in range(1, size + 1):
        if size % count or len(wide) % (size // count):
            continue
        block = size // count
        map_ = spread(count, len(wide) // block, block)
        if torch.equal(narrow[map_.tensor], wide):
            return map_
    return None


class Matches:
    """Finds the index maps of modules' inputs and outputs.

    Recent results are kept, since modules often pass on the same tensors.

    Args:
        allows_multiples: whether multiples of replications match as well.
    """

    def __init__(self, allows_multiples: bool = False) -> None:
        self._allows_multiples = allows_multiples
        self._last: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()

    def find(self, narrow: Tensor, wide: Tensor) -> Match | None:
        """Match two tensors; None if they do not match, or only as a multiple that is not allowed.

        Args:
            narrow: an activation of the student.
            wide: the same activation in the wide network.
        """
        found = self._find(narrow, wide)
        return found if found is None or found.factor == 1 or self._allows_multiples else None

    def matches_as_multiple_only(self, narrow: Tensor, wide: Tensor) -> bool:
        """Whether two tensors do not match, but would if multiples of replications were allowed."""
        return self.find(narrow, wide) is None and self._find(narrow, wide) is not None

    def _find(self, narrow: Tensor, wide: Tensor) -> Match | None:
        """The result of `match_multiple`, computed or kept from before."""
        key = (id(narrow), id(wide), wide._version)
        if key not in self._last:
            # The tensors are kept as well, so that no other tensors get their ids.
            self._last[key] = (match_multiple(narrow, wide), narrow, wide)
            if len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
        found: Match | None = self._last[key][0]
        return found

    def axes(self, name: str, recorded: Tensor, x: Tensor) -> tuple[IndexMap | None, ...]:
        """Find the index map of each axis of a tensor that a module uses.

        Args:
            name: name of the module, for the error message.
            recorded: the student's tensor.
            x: the same tensor in the wide network.

        Raises:
            Mismatch: when the two tensors do not match.
        """
        return self.input(name, recorded, x).axes

    def input(self, name: str, recorded: Tensor, x: Tensor) -> Match:
        """Match a module's input: find its index maps, and the number its copies are multiplied by.

        Args:
            name: name of the module, for the error message.
            recorded: the student's input.
            x: the same input in the wide network.

        Raises:
            Mismatch: when the two inputs do not match.
        """
        found = self.find(recorded, x)
        if found is None:
            raise Mismatch(
                name,
                "its input is not a replication of the student's input, because something before "
                "it mixes channels by position",
                tensors=(recorded, x),
            )
        return found

    def check_output(
        self,
        name: str,
        recorded: Sequence[Tensor],
        outputs: Iterable[Tensor],
        allows_multiples: bool = False,
    ) -> None:
        """Check that each output of a module is a replication of the student's output.

        The outputs of the network itself, its logits, may not widen.

        Args:
            name: name of the module; empty for the network itself.
            recorded: the student's outputs.
            outputs: the same outputs in the wide network.
            allows_multiples: whether outputs may be multiples of replications as well.

        Raises:
            Mismatch: when an output does not match.
            UnfitMultiple: when an output is a multiple that is not allowed here.
        """
        tensors = list(outputs)
        pairs = list(zip(recorded, tensors, strict=False))
        found = [self.find(*pair) for pair in pairs]
        exact = len(tensors) == len(recorded) and None not in found
        exact = exact and (bool(name) or all(n.shape == w.shape for n, w in pairs))
        if not exact:
            raise Mismatch(
                name,
                "its output does not follow the copies in its input: it mixes or cuts channels by "
                "their position, or counts them",
                tensors=next((p for p, f in zip(pairs, found, strict=True) if f is None), None),
            )
        factors = [match.factor for match in found if match is not None and match.factor != 1]
        if factors and not allows_multiples:
            reason = f"its output is the student's output {times(factors[0])}"
            raise UnfitMultiple(name, reason)
