"""Splits: how code takes an axis of channels apart, by reshapes, cuts and shuffles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.widening.numbers.arithmetic import Number, text
from gpd_cli.widening.numbers.attribute_names import HEAD_COUNT_NAMES
from gpd_cli.widening.numbers.axes import group_end
from gpd_cli.widening.numbers.calls import CHUNKS, RESHAPES, SPLITS, UNFLATTENS, Call


@dataclass(frozen=True)
class Split:
    """An axis that was taken apart, into factors (by a reshape) or into segments (by a cut).

    Args:
        size: size of the axis.
        factors: sizes of the axes that the axis was reshaped into, outermost first.
        segments: sizes of the pieces that the axis was cut into.
        layer: whether a grouped layer takes the axis apart, instead of code.
        names: for each factor the attribute or expression that the code computes it from, or None.
    """

    size: int
    factors: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    layer: bool = False
    names: tuple[str | None, ...] = ()

    @property
    def heads(self) -> int | None:
        """Position of the factor that is the number of heads, judged by names; None if unknown."""
        for k, name in enumerate(self.names):
            if name in HEAD_COUNT_NAMES:
                return k
        for k, name in enumerate(self.names):
            if k and name is not None and "dim" in name:
                return k - 1  # the number of heads precedes the width of a head
        return None

    def may_count(self, factor: int) -> bool:
        """Whether a factor may be a number of heads, judged by its name.

        Args:
            factor: position of the factor.
        """
        name = self.names[factor] if self.names else None
        return name is None or name in HEAD_COUNT_NAMES


def splits_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[Split]:
    """Find the axes that a call has taken apart, and how.

    Args:
        func: a torch function.
        args: the call's positional arguments, the tensor first.
        kwargs: the call's keyword arguments.
        result: the call's result.
    """
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor):
        return []
    if func in RESHAPES | UNFLATTENS and isinstance(result, Tensor):
        names = [_name(size) for size in Call(func, args, kwargs).asked(result.ndim)]
        return [
            Split(size, factors, names=tuple(names[first : first + len(factors)]))
            for size, factors, first in factorizations(x.shape, result.shape)
        ]
    if func in (Tensor.unbind, torch.unbind) and len(result) > 1:
        return [Split(len(result), segments=(1,) * len(result))]
    if func in SPLITS | CHUNKS and len(result) > 1:
        axes = [k for k in range(x.ndim) if result[0].shape[k] != x.shape[k]]
        return [Split(x.shape[k], segments=tuple(int(r.shape[k]) for r in result)) for k in axes]
    if func is F.channel_shuffle and isinstance(result, Tensor):
        groups = int(args[1] if len(args) > 1 else kwargs["groups"])
        return [Split(x.shape[1], (groups, x.shape[1] // groups))]
    if func is F.pixel_shuffle and isinstance(result, Tensor):
        return [Split(x.shape[-3], (result.shape[-3], x.shape[-3] // result.shape[-3]))]
    return []


def _name(size: Any) -> str | None:
    """The attribute or expression that a size was computed from, as text."""
    return text(size.expression).removeprefix("self.") if isinstance(size, Number) else None


def factorizations(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Find the axes that a reshape takes apart into several axes.

    Args:
        old: the shape before the reshape.
        new: the shape after the reshape, of as many elements.

    Yields:
        For each such axis its size, its factors, and the position of the first factor in ``new``.
    """
    i = j = 0
    while i < len(old) and j < len(new):
        end = group_end(old, new, i, j)
        if end is None:
            return
        sources, targets = old[i : end[0]], new[j : end[1]]
        i, j = end
        if max(sources) == 1 or len(targets) == 1:
            continue
        if len([s for s in sources if s > 1]) == 1:
            yield max(sources), tuple(targets), j - len(targets)
        elif sources[-1] > targets[-1] > 1 and sources[-1] % targets[-1] == 0:
            # The outer factor is merged into the axis before it, as when heads join the batch.
            yield sources[-1], (sources[-1] // targets[-1], targets[-1]), j - 2
