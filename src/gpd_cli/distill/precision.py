"""Compute losses in full precision, whatever the precision of the networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def in_float32(values: Tensor) -> Tensor:
    """Convert a tensor to float32, unless its dtype has at least as many bits.

    Args:
        values: a tensor of any floating-point dtype.
    """
    return values.float() if values.element_size() < 4 else values


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of logits with labels, in float32 or better.

    Args:
        logits: a network's logits, ``[B, C]``.
        labels: class numbers, ``[B]``, or probabilities, ``[B, C]``.
        label_smoothing: weight of the uniform distribution in the labels, between 0 and 1.
    """
    if labels.is_floating_point():
        labels = in_float32(labels)
    return F.cross_entropy(in_float32(logits), labels, label_smoothing=label_smoothing)


def full_precision(like: Tensor) -> torch.autocast:
    """Make a context without autocast, in which matrix products keep the dtype of their factors.

    Autocast would compute products in half precision, but losses compare small differences.

    Args:
        like: a tensor on the device of the products.
    """
    return torch.autocast(like.device.type, enabled=False)
