"""How far two tensors are apart."""

from __future__ import annotations

import math

from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value expected.

    Tensors of different shapes are infinitely far apart.
    """
    actual, expected = actual.detach(), expected.detach()
    if actual.shape != expected.shape:
        return math.inf
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    return difference / scale if scale > 0 else difference
