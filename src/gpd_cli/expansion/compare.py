"""How far two tensors are apart."""

from __future__ import annotations

from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value expected."""
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    return difference / scale if scale > 0 else difference
