"""The rates at which a machine computes and moves bytes, and the time of operations on it.

An operation takes as long as its arithmetic or the moving of its bytes, whichever is longer (the
roofline model of Williams, Waterman and Patterson, 2009). Operations run one after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.speed.operations import Operation

_TIMES = 7  # number of timed repetitions


@dataclass(frozen=True)
class Machine:
    """Rates of a machine.

    Args:
        flops: floating-point operations per second in float32.
        low_flops: floating-point operations per second in bfloat16.
        bandwidth: bytes read or written per second.
    """

    flops: float
    low_flops: float
    bandwidth: float

    def seconds(self, operations: Iterable[Operation]) -> float:
        """The time of operations on this machine, in seconds.

        Args:
            operations: the operations, as counted by `bench.speed.operations`.
        """
        return sum(max(o.flops / self._rate(o.dtype), o.bytes / self.bandwidth) for o in operations)

    def _rate(self, dtype: torch.dtype) -> float:
        return self.low_flops if dtype.itemsize == 2 else self.flops


def attained(device: str) -> Machine:
    """Measure the rates that this machine attains in plain operations.

    The rate of floating-point operations is that of the forward and backward pass of a 3 x 3
    convolution with 128 channels (on a GPU in channels-last memory format). But for float32 on a
    GPU it is that of a matrix product, as in merging. The bandwidth is that of adding two kernels
    with 1024 channels, which are far larger than any cache, into new memory as in a training step.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    first, second = (torch.rand(9 * 2**20, device=device) for _ in range(2))
    moved = 3 * first.numel() * first.element_size()
    bandwidth = moved / _seconds(lambda: first + second, device)
    low = _convolution_rate(device, torch.bfloat16)
    whole = _product_rate() if device == "cuda" else _convolution_rate(device, torch.float32)
    return Machine(whole, low, bandwidth)


def _product_rate() -> float:
    size = 4096
    matrix = torch.randn(size, size, device="cuda")
    return 2 * size**3 / _seconds(lambda: matrix @ matrix, "cuda")


def _convolution_rate(device: str, dtype: torch.dtype) -> float:
    channels, side, batch = 128, 28, 8 if device == "cpu" else 256
    images = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    if device == "cuda":
        images, kernel = (t.to(memory_format=torch.channels_last) for t in (images, kernel))
    images.requires_grad_()
    kernel.requires_grad_()

    def both_ways() -> None:
        result = F.conv2d(images, kernel, padding=1)
        torch.autograd.grad(result, (images, kernel), result)

    products = 3 * 2 * 9 * channels**2 * batch * side**2
    return products / _seconds(both_ways, device)


def _seconds(step: Callable[[], object], device: str) -> float:
    """The median time of a step in seconds, after a first repetition that does not count."""
    clock = clock_of(device)
    times = []
    for _ in range(_TIMES + 1):
        start = clock()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])


def clock_of(device: str) -> Callable[[], float]:
    """The clock with which steps are timed; it returns seconds.

    With a single thread on the CPU, this is the CPU time of the process, so that other work of the
    machine does not count. Otherwise it is wall-clock time.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter
