"""Tensors that do not depend on the images, and the parameters and buffers they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpd_cli.widening.running.tracing import all_tensors_in


class Constants:
    """Tensors that code computed without the images: tokens, tables, masks, position embeddings."""

    def __init__(self) -> None:
        # Each tensor is kept, so that no other one gets its identity.
        self._known: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def add(self, tensor: Tensor, names: Iterable[str]) -> None:
        """Note a constant tensor.

        Args:
            tensor: the tensor.
            names: qualified names of the parameters and buffers that it was computed from.
        """
        self._known[id(tensor)] = (tensor, frozenset(names))

    def names(self, tensor: Tensor) -> frozenset[str] | None:
        """What a tensor was computed from; None for a tensor that depends on the images."""
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def derive(self, arguments: Any, result: Any) -> None:
        """Note what a function computed from constants alone.

        Args:
            arguments: its arguments, nested in tuples, lists and dictionaries.
            result: what it returned, likewise.
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
    """The axes of a parameter whose positions become the positions of an axis derived from it.

    Two gradients tell: weighted by the position along the derived axis, and not weighted. Their
    quotient is that position where an element of the parameter goes to one position alone.

    Args:
        derived: a tensor that was computed from the parameter, with its graph.
        axis: of the derived tensor.
        source: the parameter.

    Returns:
        Per axis of the parameter, at which position of the derived axis its first one is found.

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
    found = (weighted / plain).detach()  # not a number where an element is not used
    return {
        k: offset
        for k in range(source.ndim)
        if (offset := _offset(found.movedim(k, 0).reshape(source.shape[k], -1), size)) is not None
    }


def _offset(positions: Tensor, size: int) -> int | None:
    """Where consecutive positions begin, if that is what the rows of a matrix say."""
    first = (positions - torch.arange(len(positions), dtype=positions.dtype)[:, None]).flatten()
    first = first[first.isfinite()]
    if len(positions) < 2 or not len(first):
        return None
    offset = round(float(first[0]))
    fits = 0 <= offset <= size - len(positions)
    return offset if fits and bool((first - offset).abs().max() < 1e-6) else None
