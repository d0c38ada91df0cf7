"""The processes that compute together."""

from __future__ import annotations

import torch.distributed as dist


def world_size() -> int:
    """Their number; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
