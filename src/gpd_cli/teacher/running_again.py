"""Networks that run parts of them again in the backward pass (gradient checkpointing).

Such a network keeps few activations: torch.utils.checkpoint computes the others again when the
backward pass needs them. In a pair the second run has to find the very weights of the first one.
In any network it has to begin from the same buffers, and must not count its images into running
statistics a second time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.errors import ModelError
from gpd_cli.teacher.buffers import Buffers, copied_buffers


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


class FirstRun:
    """What the first run of a network did to its buffers, for the second runs of its parts.

    A module that runs again begins from the values that its own buffers had before its first run;
    of a module that ran several times in one forward pass, the last run is repeated first, since
    the backward pass goes through a network from its end. After the backward pass all buffers have
    the values of after the first run.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        # In train mode the output of a batch norm does not depend on its buffers.
        self._owners = [
            module
            for module in network.modules()
            if module._buffers and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._before: dict[nn.Module, list[dict[str, Tensor | None]]] = defaultdict(list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the values of buffers while the network runs for the first time."""
        handles = [module.register_forward_pre_hook(self._keep) for module in self._owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def prepare_backward(
        self, outputs: Sequence[Tensor], end: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare the backward pass, after the first run.

        Args:
            outputs: the network's outputs.
            end: called at the end of the backward pass.
        """
        after = Buffers(self._network)
        after.keep()
        handles: list[Any] = []

        def begin_backward() -> None:
            handles.extend(m.register_forward_pre_hook(self._use) for m in self._owners)

        def end_backward() -> None:
            end()
            for handle in handles:
                handle.remove()
            after.put_back()

        around_backward(outputs, begin_backward, end_backward)

    def _keep(self, module: nn.Module, inputs: Any) -> None:
        self._before[module].append(copied_buffers(module))

    def _use(self, module: nn.Module, inputs: Any) -> None:
        if self._before[module]:
            # In place of the buffers themselves, which other modules may read.
            module._buffers.update(self._before[module].pop())


def around_backward(
    outputs: Iterable[Tensor], begin: Callable[[], None], end: Callable[[], None]
) -> None:
    """Call functions at both ends of the backward pass that reaches one of several tensors first.

    Args:
        outputs: the tensors, which the backward pass starts from or goes through.
        begin: called when it reaches the first of them.
        end: called at its end.
    """
    queued = False

    def reached(gradient: Tensor) -> None:
        nonlocal queued
        if not queued:
            queued = True
            begin()
            torch.autograd.Variable._execution_engine.queue_callback(end)

    for output in outputs:
        if output.requires_grad:
            output.register_hook(reached)
