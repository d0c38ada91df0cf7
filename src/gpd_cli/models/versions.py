"""Versions of modules, which torch keeps beside the tensors of a state dict.

By the version in a file, a module recognizes the names and layouts of older files. Versions are
lost wherever only the tensors are copied: in safetensors files, in Lightning's average of the
weights, when a prefix is removed. Most modules then treat the file as one of their first version,
but torchvision's MNASNet refuses it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision.models import MNASNet


def with_versions(state: Mapping[str, Tensor], network: nn.Module) -> OrderedDict[str, Tensor]:
    """Add the versions of a network's modules to a state dict that has none.

    Args:
        state: tensors by name, which a network of the same versions has written.
        network: the network that is to load the tensors.
    """
    versioned = OrderedDict(state)
    own: Any = network.state_dict()
    versioned._metadata = getattr(state, "_metadata", own._metadata)  # type: ignore[attr-defined]
    return versioned


def needed_versions(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Versions, by module name, of those modules that refuse to load a state without a version.

    Args:
        network: any network.
    """
    return {
        name: {"version": module._version}
        for name, module in network.named_modules()
        if isinstance(module, MNASNet)
    }
