"""Detect gradient checkpointing: a backward pass that runs parts of the network again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from gpd_cli.errors import ExpansionError
from gpd_cli.widening.running.tracing import tensors_in


class _RunsAgain(Exception):  # noqa: N818 - a finding, not an error
    """A module of the network began to run.

    Args:
        name: the module's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def refuse_checkpointing(network: nn.Module, output: Any) -> None:
    """Check that a backward pass would not run a part of the network again.

    The student of a pair has its weights only while its forward runs. No gradients are computed:
    reading the tensors that autograd saved is what makes `torch.utils.checkpoint` run a part again.

    Args:
        network: the network.
        output: the output of the network's latest forward, with gradients enabled.

    Raises:
        ExpansionError: when a part of the network would run again.
    """
    name = _part_that_runs_again(network, output)
    if name is not None:
        title = f"{name or 'the student'} ({type(network.get_submodule(name)).__name__})"
        raise ExpansionError(
            f"{title} is run a second time during the backward pass (gradient checkpointing), when "
            "the student's weights are gone; switch that off (in timm's models by "
            "set_grad_checkpointing(False)), and where memory is short, set "
            "--model.recompute_student true or take smaller batches "
            "(--trainer.accumulate_grad_batches)."
        )


def _part_that_runs_again(network: nn.Module, output: Any) -> str | None:
    """The first module found to run again: its name, "" for the network itself, None for none."""
    handles = []
    for name, module in network.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            raise _RunsAgain(name)

        handles.append(module.register_forward_pre_hook(enter))
    saved: dict[type, list[str]] = {}
    try:
        for node in _nodes(tensor.grad_fn for tensor in tensors_in(output)):
            kind = type(node)
            if kind.__name__ == "CheckpointFunctionBackward":  # use_reentrant=True
                return ""
            if kind not in saved:
                saved[kind] = [name for name in dir(node) if name.startswith("_saved_")]
            for name in saved[kind]:
                try:
                    getattr(node, name)
                except RuntimeError:
                    continue  # the saved tensor changed in place: no gradient, and nothing runs
    except _RunsAgain as found:
        return found.name
    finally:
        for handle in handles:
            handle.remove()
    return None


def _nodes(starts: Iterator[Any]) -> Iterator[Any]:
    """All nodes of an autograd graph."""
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)
