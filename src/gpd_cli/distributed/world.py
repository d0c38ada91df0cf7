"""The processes that compute together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that compute together; 1 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def everywhere(flag: Tensor) -> bool:
    """Whether a flag, a scalar, is set in all processes; all processes have to call this."""
    if world_size() == 1:
        return bool(flag)
    common = flag.to(torch.int32)
    dist.all_reduce(common, op=dist.ReduceOp.MIN)
    return bool(common)
