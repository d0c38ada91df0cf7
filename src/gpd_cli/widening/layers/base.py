"""The plan of one layer, and the exception for layers that cannot be widened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gpd_cli.widening.plan import IndexMap, TensorPlan


class UnsupportedLayerError(Exception):
    """A layer cannot be widened; the message is the reason, to which the caller adds the name."""


@dataclass
class LayerPlan:
    """How one module widens.

    Args:
        tensors: plans of the module's own tensors, by local name.
        attributes: wide values of the module's attributes, by name.
    """

    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def resize(self, module: nn.Module, name: str, map_: IndexMap | None) -> None:
        """Set an attribute to the size of a wide axis.

        Args:
            module: the narrow layer.
            name: name of the attribute; for layers without this attribute nothing is done.
            map_: index map of the axis, or None if the axis has not grown.
        """
        if map_ is not None and hasattr(module, name):
            self.attributes[name] = len(map_)
