"""Find out which module was running when an exception was raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gpd_cli.widening.names import title


@contextmanager
def located(network: nn.Module) -> Iterator[Any]:
    """Keep track, within this context, of the innermost module that is running.

    Args:
        network: the network that is about to run.

    Yields:
        A function that returns the name and class of the module that is running, or that
        was running when an exception was raised.
    """
    stack: list[str] = []
    deepest: list[str] = [""]

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append(name)
            deepest[0] = name

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if stack:
            stack.pop()
        deepest[0] = stack[-1] if stack else ""

    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    modules = dict(network.named_modules())

    def where() -> str:
        return title(deepest[0], modules[deepest[0]])

    try:
        yield where
    finally:
        for handle in handles:
            handle.remove()
