"""Deep copies of networks, also where modules keep activations as attributes."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def copy_network(network: Network, memo: dict[int, Any] | None = None) -> Network:
    """A deep copy in which activations kept as attributes are detached from their graph.

    Args:
        network: the network to copy; torch itself refuses to copy a tensor that has a graph.
        memo: tensors that are shared and not copied, as for `copy.deepcopy`.
    """
    memo = dict(memo or {})
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(network, memo)
