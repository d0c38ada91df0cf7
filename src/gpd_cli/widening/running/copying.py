"""Copies of networks, also of those that keep what they computed."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copy_network(network: Network, memo: dict[int, Any] | None = None) -> Network:
    """A deep copy, in which activations that modules keep as attributes have lost their graph.

    Args:
        network: what to copy; torch itself refuses to copy a tensor that has a graph.
        memo: tensors that are shared and not copied, as for `copy.deepcopy`.
    """
    memo = dict(memo or {})
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(network, memo)
