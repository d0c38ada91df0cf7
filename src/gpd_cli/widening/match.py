"""Find, by value, which wide channel copies which narrow one.

`match_axes` and `match_multiple` compare two tensors; `Matches` does so for the inputs and outputs
of modules.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpd_cli.widening.mismatch import Mismatch, UnfitMultiple, times
from gpd_cli.widening.plan import IndexMap, spread

_TIE = 1e-10  # channels closer than this, relative to the largest, are told apart by position
_EXACT = 1e-6  # tolerance between wide and narrow activations, relative to the largest value:
# attention that divides by small sums rounds that much; the certificate is stricter
_MOST_COPIES = 16  # of a channel, where activations are multiples of copies
_SIMPLE = 1e-9  # relative tolerance of a square of a multiple
_REMEMBERED = 16  # pairs of tensors

Match = tuple[tuple[IndexMap | None, ...], float]
"""Index maps by axis, and the multiple of a replication that an activation is."""


def match_axes(narrow: Tensor, wide: Tensor) -> tuple[IndexMap | None, ...] | None:
    """Index maps that make ``wide`` a replication of ``narrow``.

    Args:
        narrow: an activation of the student, float64.
        wide: the same activation of the dynamic teacher, with as many axes.

    Returns:
        Per axis the index map, or None where the axis keeps its size; None altogether when
        ``wide`` is no replication of ``narrow``.
    """
    if narrow.ndim != wide.ndim or (wide.numel() == 0) != (narrow.numel() == 0):
        return None
    if narrow.numel() == 0:
        return (None,) * narrow.ndim if narrow.shape == wide.shape else None
    grown = [k for k in range(narrow.ndim) if narrow.shape[k] != wide.shape[k]]
    maps: list[IndexMap | None] = [None] * narrow.ndim
    for axis in grown:
        # The mean over the other grown axes does not change when every position is copied alike.
        others = [k for k in grown if k != axis]
        map_ = _match_axis(_mean(narrow, others), _mean(wide, others), axis)
        if map_ is None:
            return None
        maps[axis] = map_
    if len(grown) == 1:
        return tuple(maps)  # each position was compared with the one that it copies
    replica, wide = _projected(narrow, grown), _projected(wide, grown)
    for axis, map_ in enumerate(maps):
        replica = replica if map_ is None else replica.index_select(axis, map_.tensor)
    tolerance = _EXACT * float(replica.abs().max().clamp(min=torch.finfo(narrow.dtype).tiny))
    if not float((replica - wide).abs_().max()) <= tolerance:  # NaN is no replication either
        return None
    return tuple(maps)


def match_multiple(narrow: Tensor, wide: Tensor) -> Match | None:
    """Index maps that make ``wide`` a multiple of a replication of ``narrow``.

    Code that divides by the norm of copied channels makes copies smaller, and code that adds
    copied channels up makes its result larger, by one factor everywhere.

    Args:
        narrow: an activation of the student, float64.
        wide: the same activation of the dynamic teacher, with as many axes.

    Returns:
        The index maps, as from `match_axes`, and the multiple, 1 for a replication; None when
        there are none.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
        >>> maps, multiple = match_multiple(x, x[:, [0, 0, 1, 1]] / 2**0.5)
        >>> maps[1].index, round(multiple, 4)
        ((0, 0, 1, 1), 0.7071)
    """
    axes = match_axes(narrow, wide)
    if axes is not None:
        return axes, 1.0
    multiple = _multiple(narrow, wide) if narrow.ndim == wide.ndim else None
    axes = None if multiple is None else match_axes(narrow, wide / multiple)
    return None if axes is None or multiple is None else (axes, multiple)


def _multiple(narrow: Tensor, wide: Tensor) -> float | None:
    """The quotient of two root mean squares, where it is the root of a fraction of small numbers.

    Copies that are all equally many do not change a root mean square.
    """
    squares = [float(x.square().mean()) if x.numel() else 0.0 for x in (narrow, wide)]
    if not all(0 < square < math.inf for square in squares):
        return None
    found = squares[1] / squares[0]
    simple = float(Fraction(found).limit_denominator(_MOST_COPIES**2))
    return math.sqrt(simple) if abs(simple / found - 1) < _SIMPLE else None


def _projected(activation: Tensor, grown: list[int]) -> Tensor:
    """The activation with the axes that have not grown replaced by one random projection."""
    if len(grown) in (0, activation.ndim):
        return activation
    moved = activation.movedim(grown, list(range(len(grown)))).flatten(len(grown))
    projected = moved @ _direction(moved.shape[-1]).to(moved.dtype)
    shape = [activation.shape[k] if k in grown else 1 for k in range(activation.ndim)]
    return projected.reshape(shape)


@lru_cache(maxsize=64)
def _direction(size: int) -> Tensor:
    """A random direction, the same for equal sizes."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _along(activation: Tensor, axis: int) -> Tensor:
    """A random projection of all axes but one, ``[size of the axis]``, without moving any axis."""
    before, size = math.prod(activation.shape[:axis]), activation.shape[axis]
    x = activation.reshape(before, size, -1)
    direction = _direction(before * x.shape[2]).to(x.dtype).reshape(before, x.shape[2])
    if x.shape[2] == 1:
        return direction[:, 0] @ x[..., 0]
    # Products with a vector one by one: torch's batched product takes several times as long.
    return torch.stack([rows @ d for rows, d in zip(x, direction, strict=True)]).sum(0)


def _mean(activation: Tensor, axes: list[int]) -> Tensor:
    return activation.mean(axes, keepdim=True) if axes else activation


def _match_axis(narrow: Tensor, wide: Tensor, axis: int) -> IndexMap | None:
    """Match one axis by a random projection of all other axes."""
    a, b = _along(narrow, axis), _along(wide, axis)
    tie = _TIE * float(a.abs().max())
    order = a.argsort(stable=True)
    ranked = a[order]
    group = torch.cat([order.new_zeros(1), (ranked.diff() > tie).cumsum(0)])
    # Nearest ranked value of each wide channel.
    right = torch.searchsorted(ranked, b).clamp(max=len(ranked) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.where((ranked[left] - b).abs() < (ranked[right] - b).abs(), left, right)
    if not float((ranked[nearest] - b).abs().max()) <= _EXACT * float(a.abs().max()):
        return None  # NaN is no replication either
    found = group[nearest]
    if int(group[-1]) + 1 == len(ranked):  # no equal channels: the common case
        return IndexMap(len(ranked), tuple(order[nearest].tolist()))
    regular = _regular(group[order.argsort()], found)
    if regular is not None:
        return regular
    index = torch.empty(len(b), dtype=torch.int64)
    for g in found.unique().tolist():
        # Equal channels keep their order, and all have equally many copies.
        sources = order[group == g].sort().values
        targets = (found == g).nonzero().flatten()
        position = torch.arange(len(targets)) * len(sources) // len(targets)
        index[targets] = sources[position]
    return IndexMap(len(ranked), tuple(index.tolist()))


def _regular(narrow: Tensor, wide: Tensor) -> IndexMap | None:
    """The map that copies the largest possible blocks, for channels of which some are equal.

    Which channels are equal can depend on the input (maxima of overlapping windows); a block that
    is copied as a whole (a channel's pixels, flattened) does not.

    Args:
        narrow: per narrow channel, the number of its group of equal channels.
        wide: per wide channel, the number of its group of equal channels.
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
    """Index maps of activations; recent ones are kept, since modules hand tensors on unchanged.

    Args:
        multiples: whether multiples of replications match as well.
    """

    def __init__(self, multiples: bool = False) -> None:
        self._multiples = multiples
        self._last: OrderedDict[Any, tuple[Any, ...]] = OrderedDict()

    def find(self, narrow: Tensor, wide: Tensor) -> Match | None:
        """The result of `match_multiple`; None for a multiple where these do not match."""
        found = self._find(narrow, wide)
        return found if found is None or found[1] == 1 or self._multiples else None

    def matches_as_multiple_only(self, narrow: Tensor, wide: Tensor) -> bool:
        """Whether two tensors would match if multiples of replications did."""
        return self.find(narrow, wide) is None and self._find(narrow, wide) is not None

    def _find(self, narrow: Tensor, wide: Tensor) -> Match | None:
        """The result of `match_multiple`, also where the same tensors were matched before."""
        key = (id(narrow), id(wide), wide._version)
        if key not in self._last:
            # The tensors are kept as well, so that their ids are not used again.
            self._last[key] = (match_multiple(narrow, wide), narrow, wide)
            if len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
        found: Match | None = self._last[key][0]
        return found

    def axes(self, name: str, recorded: Tensor, x: Tensor) -> tuple[IndexMap | None, ...]:
        """The index map of each axis of a tensor that a module uses.

        Args:
            name: the module.
            recorded: the student's tensor.
            x: the same tensor in the wide network.

        Raises:
            Mismatch: when the wide tensor is no multiple of a replication of the student's.
        """
        return self.input(name, recorded, x)[0]

    def input(self, name: str, recorded: Tensor, x: Tensor) -> Match:
        """The index map of each axis of a module's input, and the multiple of copies that it is.

        Args:
            name: the module.
            recorded: the student's input.
            x: the same input in the wide network.

        Raises:
            Mismatch: when the wide input is no multiple of a replication of the student's.
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
        """Check that each output of a module is a replication; the logits may not widen.

        Args:
            name: the module; empty for the network itself.
            recorded: the student's outputs.
            outputs: the same outputs of the wide network.
            allows_multiples: whether outputs may be multiples of replications as well.

        Raises:
            Mismatch: when an output is no replication.
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
        multiples = [match[1] for match in found if match is not None and match[1] != 1]
        if multiples and not allows_multiples:
            reason = f"its output is the student's output {times(multiples[0])}"
            raise UnfitMultiple(name, reason)
