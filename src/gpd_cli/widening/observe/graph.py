"""Walk the autograd graph of a recorded run back to the layers behind a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def last_layers(
    starts: Iterable[Any], layers: Mapping[Any, str], mixes: Callable[[str], bool]
) -> set[str]:
    """The last layers behind some tensors: walk back until layers that mix channels.

    Args:
        starts: the tensors' ``grad_fn``.
        layers: the layer name of each graph node that is a layer's output.
        mixes: whether a layer mixes channels.

    Returns:
        The names of all layers on the way, those that mix channels included.
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
