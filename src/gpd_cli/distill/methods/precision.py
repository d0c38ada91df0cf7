"""Losses in full precision, whatever the networks ran in."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(values: Tensor) -> Tensor:
    """Values in float32, or as they are if their type is no narrower.

    Args:
        values: of any floating-point type.
    """
    return values.float() if values.element_size() < 4 else values


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which matrix products keep the precision of their factors.

    Under autocast they would be rounded to half precision, and what is compared here are small
    differences.

    Args:
        like: a tensor on the device.
    """
    return torch.autocast(like.device.type, enabled=False)
