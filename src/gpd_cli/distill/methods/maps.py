"""Helpers of methods that compare feature maps: pooling to a common size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.precision import full_precision


def pool_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average maps over a grid of cells, as `torch.nn.functional.adaptive_avg_pool2d` does.

    Args:
        maps: feature maps, ``[B, C, H, W]``, in float32 or better.
        size: height and width of the result.

    Returns:
        The averages, ``[B, C, *size]``.
    """
    if maps.shape[-2:] == size:
        return maps
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(maps, size)
    # The same averages as matrix products, whose gradient is deterministic on every device.
    rows, columns = (
        _averages(maps, maps.shape[-2], size[0]),
        _averages(maps, maps.shape[-1], size[1]),
    )
    with full_precision(maps):
        return rows @ maps @ columns.T


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pool two batches of maps to the smaller of their heights and the smaller of their widths.

    Args:
        one: feature maps, ``[B, C, H, W]``, in float32 or better.
        other: feature maps, ``[B, C', H', W']``, in float32 or better.

    Returns:
        Both batches, with the same height and width.
    """
    height, width = (min(one.shape[k], other.shape[k]) for k in (-2, -1))
    return pool_to(one, (height, width)), pool_to(other, (height, width))


def _averages(like: Tensor, length: int, cells: int) -> Tensor:
    """Make a matrix, ``[cells, length]``, that averages a side of a map over cells.

    The cells are chosen as in adaptive average pooling, and may overlap.
    """
    rows = torch.zeros(cells, length, dtype=like.dtype)
    for cell in range(cells):
        start, end = cell * length // cells, -(-(cell + 1) * length // cells)
        rows[cell, start:end] = 1 / (end - start)
    return rows.to(like.device)
