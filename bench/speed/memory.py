"""The peak memory of a process since a chosen moment, if the system counts it (Linux, CUDA)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from gpd_cli.training.telemetry import peak_memory

_MARKS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Reset the peak to the memory that is in use now.

    On the CPU of systems other than Linux this is not possible, and the peak stays that of the
    whole process.

    Args:
        device: device whose memory is meant; for the CPU, the memory of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _MARKS.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)  # return free memory that the allocator keeps to the system
        _MARKS.write_text("5")


def peak(device: torch.device) -> int:
    """The peak memory since `forget_peak`, in bytes.

    Args:
        device: device whose memory is meant; for the CPU, the memory of the process.
    """
    if device.type == "cuda" or not _STATUS.exists():
        return int(peak_memory(device))
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])
