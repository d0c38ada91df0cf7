"""How each type of layer widens, given the index map of its input.

`plan_layer` is the one entry: it looks at a leaf module and at the index maps of the input that
just reached it, and says how its tensors and attributes change.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from gpd_cli.widening.layers.attention import plan_attention
from gpd_cli.widening.layers.base import Axes, LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layers.convolution import mixes_channels, plan_convolution
from gpd_cli.widening.layers.embedding import Table, plan_embedding
from gpd_cli.widening.layers.linear import linear_tensors, plan_linear
from gpd_cli.widening.layers.norm import plan_norm
from gpd_cli.widening.layout import Layout, Scale

__all__ = [
    "Axes",
    "LayerPlan",
    "UnsupportedLayerError",
    "input_size",
    "is_leaf",
    "linear_tensors",
    "mixes_channels",
    "output_size",
    "plan_layer",
]

_LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, Table)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is planned as a whole: its arithmetic is known and it calls no other."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not isinstance(module, _LAYERS):
        return False
    return not any(True for child in module.children() for _ in child.parameters())


def output_size(module: nn.Module) -> int | None:
    """The number of output channels of a layer that chooses it, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    if isinstance(module, Table):
        return module.embedding_dim
    if not mixes_channels(module):
        return None
    size = getattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels")
    return int(size)


def input_size(module: nn.Module) -> int:
    """The number of input channels of a layer that mixes them, 0 of another."""
    for name in ("in_features", "in_channels", "embed_dim"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return 0


def plan_layer(
    module: nn.Module, axes: Axes, scale: Scale, *, keep_output: bool, layout: Layout | None = None
) -> LayerPlan:
    """Plan one leaf.

    Args:
        module: the narrow leaf.
        axes: per axis of its input, the index map, or None where the axis has not grown; none at
            all where the input is numbers of rows.
        scale: how much wider.
        keep_output: whether its output has to keep its width (the classifier).
        layout: how its outputs widen; by default copies side by side.

    Returns:
        What changes; an empty plan when nothing does.

    Raises:
        UnsupportedLayerError: when the layer cannot be widened exactly.
    """
    if isinstance(module, _ConvNd):
        return plan_convolution(module, axes, scale, keep_output, layout)
    if isinstance(module, nn.Linear):
        return plan_linear(module, axes, scale, keep_output, layout)
    if isinstance(module, nn.MultiheadAttention):
        return plan_attention(module, axes, scale, keep_output)
    if isinstance(module, Table):
        return plan_embedding(module, axes, scale, keep_output, layout)
    return plan_norm(module, axes)
