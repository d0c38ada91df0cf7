"""The plan of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gpd_cli.widening.plan import IndexMap, TensorPlan


class UnsupportedLayerError(Exception):
    """Why a layer cannot be widened; the caller adds the layer's name."""


@dataclass
class LayerPlan:
    """How one module widens: plans by local tensor name, wide values by attribute name."""

    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def resize(self, module: nn.Module, name: str, map_: IndexMap | None) -> None:
        """Let an attribute follow the size of a wide axis.

        Args:
            module: the narrow layer.
            name: the attribute; layers without this attribute are left alone.
            map_: index map of the axis, or None where the axis has not grown.
        """
        if map_ is not None and hasattr(module, name):
            self.attributes[name] = len(map_)
