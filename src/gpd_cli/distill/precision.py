"""Compute losses in full precision, whatever the precision of the networks."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(values: Tensor) -> Tensor:
    """Convert a tensor to float32, unless its dtype has at least as many bits.

    Args:
        values: a tensor of any floating-point dtype.
    """
    return values.float() if values.element_size() < 4 else values


def full_precision(like: Tensor) -> torch.autocast:
    """Make a context without autocast, in which matrix products keep the dtype of their factors.

    Autocast would compute products in half precision, but losses compare small differences.

    Args:
        like: a tensor on the device of the products.
    """
    return torch.autocast(like.device.type, enabled=False)
