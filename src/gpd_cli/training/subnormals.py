"""Flushing of subnormal numbers to zero on the CPU, where they can slow arithmetic down tenfold.

Subnormal numbers arise in training, mostly in gradients and momentum, so that from some step on
every step may take several times as long as before. The setting belongs to a thread; a new thread
inherits the setting of the thread that starts it. Only the command line makes this setting, and the
library does not: programs that use the library may call `torch.set_flush_denormal` themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed_subnormals(active: bool = True) -> Iterator[None]:
    """Flush subnormal numbers to zero within this context, if the processor supports it.

    The context has to be entered before torch's first computation, so that the threads of torch's
    pool inherit the setting.

    Args:
        active: whether to flush; with False, the context changes nothing.
    """
    before = are_subnormals_flushed()
    if active:
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def are_subnormals_flushed() -> bool:
    """Whether this thread flushes subnormal numbers to zero."""
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return float(smallest / 2) == 0.0
