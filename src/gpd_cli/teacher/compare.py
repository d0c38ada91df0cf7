"""The relative difference of two tensors."""

from __future__ import annotations

import math

from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value expected.

    Args:
        actual: a tensor.
        expected: the tensor to compare it with; where all its values are zero, the absolute
            difference is returned.

    Returns:
        The relative difference; infinity for tensors of different shapes.
    """
    actual, expected = actual.detach(), expected.detach()
    if actual.shape != expected.shape:
        return math.inf
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    return difference / scale if scale > 0 else difference
