"""Logit standardization (Sun et al., CVPR 2024), in front of losses with a temperature."""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-4
"""Smallest deviation that is divided by: logits of a fresh head may all be equal."""


def standardize_logits(logits: Tensor) -> Tensor:
    """Logits with mean 0 and deviation 1 over the classes (Sun et al., 2024, arXiv 2403.01427).

    The student then has to match the teacher's relations among the classes and not their range.

    Args:
        logits: ``[B, C]``.

    Returns:
        ``(logits - mean) / deviation`` for each row, ``[B, C]``; deviations below 1e-4 count as
        that, which bounds the gradient.
    """
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / logits.std(dim=1, keepdim=True).clamp(min=_LEAST)
