"""Walk the autograd graph of a recorded run back to the layers that a tensor comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def last_layers(
    starts: Iterable[Any], layers: Mapping[Any, str], mixes: Callable[[str], bool]
) -> set[str]:
    """Walk back from tensors, through everything up to layers that mix channels.

    Args:
        starts: their ``grad_fn``.
        layers: which layer's output a node of the graph is.
        mixes: whether a layer mixes channels.

    Returns:
        The names of the layers that were met, those that mix channels last.
    """
    found: set[str] = set()
    seen: set[Any] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = layers.get(node)
        if name is not None:
            found.add(name)
            if mixes(name):
                continue
        stack.extend(parent for parent, _ in node.next_functions)
    return found
