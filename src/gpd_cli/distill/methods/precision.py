"""Full precision for losses, whatever the precision of the networks."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(values: Tensor) -> Tensor:
    """Values in float32, or unchanged if their type has at least as many bits.

    Args:
        values: values of any floating-point type.
    """
    return values.float() if values.element_size() < 4 else values


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which matrix products keep the precision of their factors.

    Autocast would round the products to half precision, but losses compare small differences.

    Args:
        like: a tensor on the device.
    """
    return torch.autocast(like.device.type, enabled=False)
