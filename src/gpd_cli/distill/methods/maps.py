"""Helpers of methods on feature maps: pooling to a common size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.methods.precision import full_precision


def pool_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average maps over a grid of cells, as `torch.nn.functional.adaptive_avg_pool2d` does.

    Args:
        maps: ``[B, C, H, W]``, in float32 or better.
        size: height and width of the result.

    Returns:
        ``[B, C, *size]``.
    """
    if maps.shape[-2:] == size:
        return maps
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(maps, size)
    # The same averages by products, whose gradient is deterministic on every device.
    rows, columns = (
        _averages(maps, maps.shape[-2], size[0]),
        _averages(maps, maps.shape[-1], size[1]),
    )
    with full_precision(maps):
        return rows @ maps @ columns.T


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the larger of two batches of maps to the smaller size, height and width separately.

    Args:
        one: ``[B, C, H, W]``, in float32 or better.
        other: ``[B, C', H', W']``, in float32 or better.
    """
    height, width = (min(one.shape[k], other.shape[k]) for k in (-2, -1))
    return pool_to(one, (height, width)), pool_to(other, (height, width))


def _averages(like: Tensor, length: int, cells: int) -> Tensor:
    """A matrix that averages over cells of a side, which may overlap: ``[cells, length]``."""
    rows = torch.zeros(cells, length, dtype=like.dtype)
    for cell in range(cells):
        start, end = cell * length // cells, -(-(cell + 1) * length // cells)
        rows[cell, start:end] = 1 / (end - start)
    return rows.to(like.device)
