"""Subnormal numbers taken for zero on the CPU: arithmetic with them can be ten times as slow.

They arise in training, in gradients and momentum above all, so that from some step on every step
may take several times as long as those before. The setting belongs to a thread, and threads start
with that of the thread that starts them. It is the program's, not the library's: a program of
one's own calls `torch.set_flush_denormal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback


@contextmanager
def flushed_subnormals(active: bool = True) -> Iterator[None]:
    """Take subnormal numbers for zero, where the processor can; afterwards as before.

    To be entered before torch computes, so that the threads of its pool start with the setting.

    Args:
        active: whether to do so at all.
    """
    before = are_subnormals_flushed()
    if active:
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def are_subnormals_flushed() -> bool:
    """Whether this thread takes subnormal numbers for zero."""
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return float(smallest / 2) == 0.0


class FlushedSubnormals(Callback):
    """Carries the setting into processes that Python starts for training (strategy ddp_spawn).

    Such a process is handed the trainer with its callbacks, and computes only then.
    """

    def __reduce__(self) -> tuple[Callable[[], FlushedSubnormals], tuple[()]]:
        return _in_new_process, ()


def _in_new_process() -> FlushedSubnormals:
    torch.set_flush_denormal(True)
    return FlushedSubnormals()
