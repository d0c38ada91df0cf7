"""Versions of modules, which torch keeps beside the tensors of a state dict.

By its version a module tells the names and layouts of older files. What copies the tensors alone
loses the versions: safetensors, Lightning's average of the weights, a prefix taken off. Most
modules then take the file for one of their first version, and torchvision's MNASNet refuses it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import MNASNet


def with_versions(state: Mapping[str, Tensor], network: nn.Module) -> OrderedDict[str, Tensor]:
    """A state dict of a network with the versions of its modules, where it has none.

    Args:
        state: tensors by name, written from such a network as it is built here.
        network: the network that is to load them.
    """
    versioned = OrderedDict(state)
    own: Any = network.state_dict()
    versioned._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
    return versioned


def needed_versions(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Versions, by module name, without which a module of the network loads no state at all.

    Args:
        network: any network.
    """
    return {
        name: {"version": module._version}
        for name, module in network.named_modules()
        if isinstance(module, MNASNet)
    }
