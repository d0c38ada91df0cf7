"""Networks that run parts of them again in the backward pass (gradient checkpointing).

Such a network keeps few activations: torch.utils.checkpoint computes the others again when the
backward pass needs them. In a pair the second run has to find the very weights of the first one,
and must not count its images into running statistics a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gpd_cli.errors import ModelError


def switch_on(network: nn.Module, name: str) -> None:
    """Let a network of timm run its blocks again in the backward pass.

    Args:
        network: the network.
        name: its name, for errors.

    Raises:
        ModelError: when the network has no such switch.
    """
    switch = getattr(network, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise NotImplementedError
        switch(True)
    except (AssertionError, NotImplementedError) as error:  # some of timm's say so by assertions
        raise ModelError(
            f"{name} cannot run its blocks again in the backward pass (it has no timm "
            "set_grad_checkpointing); leave out --model.grad_checkpointing, and where memory is "
            "short set --model.recompute_student true or take smaller batches "
            "(--trainer.accumulate_grad_batches)."
        ) from error


def at_end_of_backward(outputs: Iterable[Tensor], call: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that reaches one of several tensors first.

    Args:
        outputs: the tensors, which the backward pass starts from or goes through.
        call: the function.
    """
    queued = False

    def begin(gradient: Tensor) -> None:
        nonlocal queued
        if not queued:
            queued = True
            torch.autograd.Variable._execution_engine.queue_callback(call)

    for output in outputs:
        if output.requires_grad:
            output.register_hook(begin)


class Statistics:
    """The values that a network's buffers have after the first run.

    Args:
        buffers: all buffers; torch's norms change theirs without a new version.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._values = [(buffer, buffer.clone()) for buffer in buffers]

    def put_back(self) -> None:
        """Give the buffers these values again."""
        with torch.no_grad():
            for buffer, value in self._values:
                buffer.copy_(value)
