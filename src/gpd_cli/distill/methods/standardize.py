"""Logit standardization (Sun et al., CVPR 2024), applied before losses with a temperature."""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-4
"""Smallest deviation to divide by, since the logits of a new classifier may all be equal."""


def standardize_logits(logits: Tensor) -> Tensor:
    """Shift and scale logits to mean 0 and standard deviation 1 over the classes.

    The student then has to match the teacher's relations between classes, and not the range of the
    teacher's logits (Sun et al., 2024, arXiv 2403.01427).

    Args:
        logits: the logits, ``[B, C]``.

    Returns:
        ``(logits - mean) / deviation`` for each row, ``[B, C]``; standard deviations below 1e-4 are
        replaced by 1e-4, which bounds the gradient.

    Example:
        >>> import torch
        >>> standardize_logits(torch.tensor([[10.0, 20.0, 30.0]]))
        tensor([[-1.,  0.,  1.]])
    """
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / logits.std(dim=1, keepdim=True).clamp(min=_LEAST)
