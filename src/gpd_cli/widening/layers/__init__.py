"""How each type of layer widens, given the index maps of its input.

`plan_layer` is the entry: from a leaf module and the index maps of the module's input it derives
how the module's tensors and attributes change.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from gpd_cli.widening.layers.attention import plan_attention
from gpd_cli.widening.layers.base import LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layers.convolution import mixes_channels, plan_convolution
from gpd_cli.widening.layers.embedding import Table, plan_embedding
from gpd_cli.widening.layers.linear import linear_tensors, plan_linear, rescaled
from gpd_cli.widening.layers.norm import plan_norm
from gpd_cli.widening.layout import Layout, Scale
from gpd_cli.widening.plan import Axes

__all__ = [
    "LayerPlan",
    "UnsupportedLayerError",
    "channel_axis",
    "is_dense",
    "is_leaf",
    "layer_in_channels",
    "layer_out_channels",
    "linear_tensors",
    "mixes_channels",
    "plan_layer",
    "rescaled",
]

_LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, Table)


# Layers whose code can be followed; that of a batch norm changes its own statistics.
_FOLLOWED = (_ConvNd, nn.Linear, nn.LayerNorm, nn.RMSNorm)
_KNOWN = ("weight", "bias", "gain")  # tensors of these layers, and of those that standardize


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a leaf, which is planned as a whole.

    The arithmetic of a leaf is known, and a leaf has no layers inside.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not isinstance(module, _LAYERS):
        return False
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    return not (isinstance(module, _FOLLOWED) and _has_channels_of_its_own(module))


def _has_channels_of_its_own(module: nn.Module) -> bool:
    """Whether a layer's class has added tensors by channel, such as a scale of its outputs.

    What such a class computes with these tensors is not known, so its code has to be followed. If
    the weight of a layer is no parameter, the answer is False: the weight is computed, perhaps from
    these tensors.
    """
    if "weight" not in module._parameters:
        return False
    tensors = {**module._parameters, **module._buffers}
    known = [tensors.pop(name, None) for name in _KNOWN]
    channels = {n for tensor in known if tensor is not None for n in tensor.shape[:2]} - {1}
    added = [tensor for tensor in tensors.values() if tensor is not None]
    return any(not channels.isdisjoint(tensor.shape) for tensor in added)


_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a dense layer: a linear layer or convolution that runs torch's own code.

    It sums over all input channels (there is one group only) and owns its weight. So its wide
    output is known from its index maps and the narrow output, whatever its weights.
    """
    kind = type(module)
    plain = any(
        kind.forward is cls.forward
        and getattr(kind, "_conv_forward", None) is getattr(cls, "_conv_forward", None)
        for cls in _DENSE
    )
    changed = {"forward", "_conv_forward"} & vars(module).keys()
    owned = module._parameters.get("weight") is not None
    return plain and owned and not changed and getattr(module, "groups", 1) == 1


def channel_axis(layer: nn.Module) -> int:
    """The number of the channel axis of a layer's output, counted from the end.

    Args:
        layer: a convolution, a linear layer or a table.
    """
    return 1 - layer.weight.ndim if isinstance(layer, _ConvNd) else -1


def layer_out_channels(module: nn.Module) -> int | None:
    """Number of output channels of a layer whose layout may be chosen; None for other layers."""
    if isinstance(module, nn.MultiheadAttention):
        channels: int = module.embed_dim
        return channels
    if isinstance(module, Table):
        return module.embedding_dim
    if not mixes_channels(module):
        return None
    size = getattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels")
    return int(size)


def layer_in_channels(module: nn.Module) -> int:
    """Number of input channels of a layer (in_channels, in_features, embed_dim); 0 without any."""
    for name in ("in_features", "in_channels", "embed_dim"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return 0


def plan_layer(
    module: nn.Module, axes: Axes, scale: Scale, *, keep_output: bool, layout: Layout | None = None
) -> LayerPlan:
    """Plan how one leaf widens.

    Args:
        module: the narrow leaf.
        axes: for each axis of the leaf's input its index map, or None where the axis has not grown;
            empty for a table, whose input is row numbers.
        scale: how much wider the network gets.
        keep_output: whether the number of outputs has to stay (as for the classifier).
        layout: the order of the wide outputs; by default copies are side by side.

    Returns:
        The leaf's plan, which is empty if nothing changes.

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
