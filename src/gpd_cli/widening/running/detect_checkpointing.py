"""Detect gradient checkpointing: whether the backward pass runs parts of a network again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from gpd_cli.errors import ExpansionError
from gpd_cli.widening.running.tracing import tensors_in

_REENTRANT = (
    "{} runs a part of itself a second time in a backward pass of its own (reentrant gradient "
    "checkpointing), which cannot work on weights that two networks share; pass "
    "use_reentrant=False to torch.utils.checkpoint, or leave out gradient checkpointing."
)


class _RunsAgain(Exception):  # noqa: N818 - a finding, not an error
    """Raised by a hook when a module of the network begins to run."""


def runs_again(network: nn.Module, output: Any) -> bool:
    """Whether the backward pass would run a part of the network again.

    No gradients are computed for this: `torch.utils.checkpoint` runs a part again as soon as the
    tensors that autograd has saved are read.

    Args:
        network: the network.
        output: the output of the network's latest forward pass, with its graph.

    Raises:
        ExpansionError: when a part would run again in a backward pass of its own (reentrant).
    """
    handles = []
    for module in network.modules():

        def enter(module: nn.Module, args: Any) -> None:
            raise _RunsAgain

        handles.append(module.register_forward_pre_hook(enter))
    saved: dict[type, list[str]] = {}
    try:
        for node in _nodes(tensor.grad_fn for tensor in tensors_in(output)):
            kind = type(node)
            if kind.__name__ == "CheckpointFunctionBackward":
                raise ExpansionError(_REENTRANT.format(type(network).__name__))
            if kind not in saved:
                saved[kind] = [name for name in dir(node) if name.startswith("_saved_")]
            for name in saved[kind]:
                try:
                    getattr(node, name)
                except RuntimeError:
                    continue  # the saved tensor has changed in place, so nothing runs again
    except _RunsAgain:
        return True
    finally:
        for handle in handles:
            handle.remove()
    return False


def _nodes(starts: Iterator[Any]) -> Iterator[Any]:
    """All nodes of an autograd graph that can be reached from some nodes."""
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)
