"""Gradient checkpointing: networks that run parts of themselves again in the backward pass.

Such a network keeps few activations: torch.utils.checkpoint computes the others again when the
backward pass needs them. In any network, the second run of a part has to begin from the same
buffers as the first, and must not update running statistics with the same images a second time. In
a pair, the second run also needs the same sliced weights as the first.
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


def switch_on_grad_checkpointing(network: nn.Module, name: str) -> None:
    """Switch on the gradient checkpointing of a timm network.

    Args:
        network: the network.
        name: the network's name, for error messages.

    Raises:
        ModelError: when the network has no ``set_grad_checkpointing``, or does not support it.
    """
    switch = getattr(network, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise NotImplementedError
        switch(True)
    except (AssertionError, NotImplementedError) as error:  # some timm networks use assertions
        raise ModelError(
            f"{name} cannot run its blocks again in the backward pass (it has no timm "
            "set_grad_checkpointing); leave out --model.grad_checkpointing, and to save memory set "
            "--model.recompute_student true or lower --data.batch_size (with "
            "--trainer.accumulate_grad_batches)."
        ) from error


class FirstRunBuffers:
    """Buffers before and after a network's first run, for the second runs of its parts.

    A module that runs again begins from the values that its own buffers had before its first run.
    If a module ran several times in one forward pass, its last run is repeated first, since the
    backward pass goes through a network from its end. After the backward pass all buffers have the
    values that they had after the first run.

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
        """Within this context, copy each module's buffers before the module runs."""
        handles = [module.register_forward_pre_hook(self._keep) for module in self._owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def prepare_backward(
        self, outputs: Sequence[Tensor], end: Callable[[], None] = lambda: None
    ) -> None:
        """Prepare the buffers for the backward pass; to be called after the first run.

        Args:
            outputs: the network's outputs.
            end: function that is called at the end of the backward pass.
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
            # The entries are replaced, not the values: other modules may read the same buffers.
            module._buffers.update(self._before[module].pop())


def around_backward(
    outputs: Iterable[Tensor], begin: Callable[[], None], end: Callable[[], None]
) -> None:
    """Call one function when a backward pass reaches some tensors, and another at its end.

    This happens once, in the first backward pass that reaches any of the tensors.

    Args:
        outputs: the tensors, which the backward pass starts from or goes through.
        begin: function that is called when the backward pass reaches the first of the tensors.
        end: function that is called at the end of the backward pass.
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
