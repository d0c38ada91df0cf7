"""Constants: tensors that do not depend on the images, and the parameters that they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpd_cli.widening.running.tracing import all_tensors_in


class Constants:
    """The tensors that are computed without the images: tokens, tables, masks, position embeddings.

    For each of them, the names of the parameters and buffers that it was computed from are known.
    """

    def __init__(self) -> None:
        # Each tensor is kept, so that no other tensor gets its id.
        self._known: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def add(self, tensor: Tensor, names: Iterable[str]) -> None:
        """Note a constant tensor.

        Args:
            tensor: the tensor.
            names: qualified names of the parameters and buffers that the tensor was computed from.
        """
        self._known[id(tensor)] = (tensor, frozenset(names))

    def names(self, tensor: Tensor) -> frozenset[str] | None:
        """Names of the parameters and buffers that a constant comes from; None for no constant."""
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def derive(self, arguments: Any, result: Any) -> None:
        """Note the result of a function as a constant, if all its tensor arguments are constants.

        Args:
            arguments: the function's arguments, nested in tuples, lists and dictionaries.
            result: the function's result, which may be nested as well.
        """
        names: set[str] = set()
        for tensor in all_tensors_in(arguments):
            known = self.names(tensor)
            if known is None:
                return
            names |= known
        for tensor in all_tensors_in(result):
            self.add(tensor, names)


def source_axes(derived: Tensor, axis: int, source: Tensor) -> dict[int, int]:
    """Find the axes of a parameter that become a given axis of a tensor computed from it.

    Two gradients with respect to the parameter are compared: one weighted by the position along the
    axis of the computed tensor, and one unweighted. If an element of the parameter reaches a single
    position only, the quotient of the two is this position.

    Args:
        derived: a tensor that was computed from the parameter, with its graph.
        axis: number of an axis of this tensor.
        source: the parameter.

    Returns:
        For each such axis of the parameter, the position where it begins on the given axis.

    Example:
        >>> table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
        >>> source_axes(table[[0, 2, 4, 4]].permute(1, 0), 0, table)
        {1: 0}
        >>> key = torch.randn(3, dtype=torch.float64, requires_grad=True)
        >>> source_axes(torch.cat([torch.ones(5), key]), 0, key)
        {0: 5}
    """
    size = derived.shape[axis]
    if not derived.requires_grad or size < 2:
        return {}
    total = derived.movedim(axis, 0).reshape(size, -1).sum(1)
    positions = torch.arange(size, dtype=total.dtype)
    plain, weighted = (
        torch.autograd.grad(total, source, weight, retain_graph=True, allow_unused=True)[0]
        for weight in (torch.ones_like(total), positions)
    )
    if plain is None or weighted is None:
        return {}
    found = (weighted / plain).detach()  # NaN for elements of the parameter that are not used
    return {
        k: offset
        for k in range(source.ndim)
        if (offset := _offset(found.movedim(k, 0).reshape(source.shape[k], -1), size)) is not None
    }


def _offset(positions: Tensor, size: int) -> int | None:
    """The position in row 0, if each row holds the next position after the row before; else None.

    Args:
        positions: the positions, ``[rows, columns]``; those that are not finite are left out.
        size: size of the axis of the positions.
    """
    first = (positions - torch.arange(len(positions), dtype=positions.dtype)[:, None]).flatten()
    first = first[first.isfinite()]
    if len(positions) < 2 or not len(first):
        return None
    offset = round(float(first[0]))
    fits = 0 <= offset <= size - len(positions)
    return offset if fits and bool((first - offset).abs().max() < 1e-6) else None
