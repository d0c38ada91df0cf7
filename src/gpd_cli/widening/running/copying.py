"""Make deep copies of networks, including those whose modules keep activations as attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from gpd_cli.widening.running.tracing import all_tensors_in

Network = TypeVar("Network", bound=nn.Module)


def copy_network(network: Network, shared: Iterable[Tensor] = ()) -> Network:
    """Make a deep copy of a network.

    Activations that modules keep as attributes, alone or in lists, tuples and dictionaries, are
    detached from their graph in the copy, since torch refuses to copy a tensor that has a graph.

    Args:
        network: the network to copy.
        shared: tensors that are not copied, but shared by the copy and the network.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in network.modules():
        for value in all_tensors_in(list(vars(module).values())):
            if not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(network, memo)
