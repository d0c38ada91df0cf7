"""The peak of a process's memory from some moment on, where the system counts it (Linux, CUDA)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from gpd_cli.training.telemetry import peak_memory

_MARKS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Let the peak begin with the memory that is in use now.

    Without Linux's mark of the most memory so far, the peak stays that of the whole process.

    Args:
        device: whose memory it is.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _MARKS.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # memory that is free, and that the allocator keeps
        _MARKS.write_text("5")


def peak(device: torch.device) -> int:
    """The most memory in use since `forget_peak`, in bytes.

    Args:
        device: whose memory it is.
    """
    if device.type == "cuda" or not _STATUS.exists():
        return int(peak_memory(device))
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
