"""How each type of layer widens, given the index map of its input.

`plan_layer` is the one entry: it looks at a leaf module and at the index maps of the input that
just reached it, and says how its tensors and attributes change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gpd_cli.expansion.plan import IndexMap, TensorPlan, copies, stack

Axes = Sequence[IndexMap | None]


class UnsupportedLayerError(Exception):
    """Why a layer cannot be widened; the caller adds which layer it is."""


@dataclass
class LayerPlan:
    """How one module widens: plans by local tensor name, wide values by attribute name."""

    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heads:
    """Where a layer's outputs are split among attention heads.

    Args:
        count: number of heads.
        width: channels per head.
    """

    count: int
    width: int


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is planned as a whole: it owns tensors and calls no planned child."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return _owns_tensors(module) and not any(
        _owns_tensors(child) for child in module.modules() if child is not module
    )


def _owns_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or isinstance(module, _BatchNorm)


def is_known(module: nn.Module) -> bool:
    """Whether a leaf is of a kind whose arithmetic is known here."""
    if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.LayerNorm | nn.GroupNorm):
        return True
    return isinstance(module, _ConvNd | _BatchNorm | nn.PReLU | nn.RMSNorm)


def mixes_channels(module: nn.Module) -> bool:
    """Whether a layer's output channels are sums over input channels."""
    if isinstance(module, _ConvNd):
        return module.in_channels // module.groups > 1 or module.groups == 1
    return isinstance(module, nn.Linear | nn.MultiheadAttention)


def plan_layer(
    module: nn.Module, axes: Axes, ratio: float, *, keep_output: bool, heads: Heads | None = None
) -> LayerPlan:
    """Plan one leaf.

    Args:
        module: the narrow leaf.
        axes: per axis of its input, the index map, or None where the axis has not grown.
        ratio: the expansion ratio.
        keep_output: whether its output has to keep its width (the classifier).
        heads: how its outputs are split among attention heads, if they are.

    Returns:
        What changes; an empty plan when nothing does.

    Raises:
        UnsupportedLayerError: when the layer cannot be widened exactly.
    """
    if isinstance(module, _ConvNd):
        return _plan_conv(module, axes, ratio, keep_output)
    if isinstance(module, nn.Linear):
        return _plan_linear(module, axes, ratio, keep_output, heads)
    if isinstance(module, nn.MultiheadAttention):
        return _plan_attention(module, axes, ratio, keep_output)
    return _plan_vectors(module, axes)


def _plan_linear(
    module: nn.Linear, axes: Axes, ratio: float, keep_output: bool, heads: Heads | None
) -> LayerPlan:
    inputs = axes[-1]
    if inputs is None and any(axes):
        return LayerPlan()  # it mixes along another axis (tokens), whose copies it carries along
    out = None if keep_output else _outputs(module.out_features, ratio, heads)
    plan = LayerPlan()
    _linear_like(plan, module, out, inputs)
    _resize(plan, module, "in_features", inputs)
    _resize(plan, module, "out_features", out)
    return plan


def _linear_like(
    plan: LayerPlan, module: nn.Module, out: IndexMap | None, inputs: IndexMap | None
) -> None:
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedLayerError("it has no weight tensor of its own")
    rest: tuple[None, ...] = (None,) * (weight.ndim - 2)
    if out is not None or inputs is not None:
        plan.tensors["weight"] = TensorPlan((out, inputs, *rest), None if inputs is None else 1)
    if out is not None and module.bias is not None:
        plan.tensors["bias"] = TensorPlan((out,))


def _outputs(size: int, ratio: float, heads: Heads | None) -> IndexMap:
    """Copies side by side; where the outputs feed attention heads, whole heads are copied."""
    if heads is None:
        return copies(size, ratio)
    part = heads.count * heads.width
    if size % part == 0:  # [parts, heads, width]: queries, keys, values one after the other
        return stack(copies(part, ratio, block=heads.width), size // part)
    if size % heads.count == 0:  # [heads, whatever]: queries, keys and values of each head
        return copies(size, ratio, block=size // heads.count)
    raise UnsupportedLayerError(
        f"its {size} outputs cannot be split among {heads.count} attention heads"
    )


def _plan_conv(module: _ConvNd, axes: Axes, ratio: float, keep_output: bool) -> LayerPlan:
    spatial = module.weight.ndim - 2
    inputs = axes[-spatial - 1]
    if inputs is None and any(axes):
        return LayerPlan()
    if isinstance(module, _ConvTransposeNd):
        raise UnsupportedLayerError("transposed convolutions are not supported")
    plan = LayerPlan()
    rest: tuple[None, ...] = (None,) * spatial
    groups = module.groups
    out: IndexMap | None
    if groups == 1:
        out = None if keep_output else copies(module.out_channels, ratio)
        _linear_like(plan, module, out, inputs)
    elif inputs is None:
        if keep_output:
            return plan
        raise UnsupportedLayerError("a grouped convolution whose input does not widen")
    else:
        within, width = module.in_channels // groups, module.out_channels // groups
        local = _shared_by_groups(inputs, groups) if within > 1 else None
        if local is not None:
            # As many groups, each wider: copies lie side by side, so groups stay together.
            out = None if keep_output else copies(module.out_channels, ratio)
            if out is not None and _shared_by_groups(out, groups) is None:
                raise UnsupportedLayerError(f"ratio {ratio} does not divide its {groups} groups")
            plan.tensors["weight"] = TensorPlan((out, local, *rest), 1)
        else:
            # More groups, each a copy of a narrow one (depthwise convolutions).
            group = _copied_groups(inputs, within)
            if keep_output or group is None:
                raise UnsupportedLayerError("its groups do not hold the copies of single groups")
            index = tuple(g * width + o for g in group for o in range(width))
            out = IndexMap(module.out_channels, index)
            plan.tensors["weight"] = TensorPlan((out, None, *rest))
            plan.attributes["groups"] = len(group)
        if module.bias is not None and out is not None:
            plan.tensors["bias"] = TensorPlan((out,))
    _resize(plan, module, "in_channels", inputs)
    _resize(plan, module, "out_channels", out)
    return plan


def _shared_by_groups(map_: IndexMap, groups: int) -> IndexMap | None:
    """The map within a group, when all groups have the same one."""
    wide, narrow = len(map_) // groups, map_.narrow // groups
    if len(map_) % groups:
        return None
    local = tuple(c for c in map_.index[:wide])
    if any(not 0 <= c < narrow for c in local):
        return None
    expected = tuple(g * narrow + c for g in range(groups) for c in local)
    return IndexMap(narrow, local) if expected == map_.index else None


def _copied_groups(map_: IndexMap, within: int) -> list[int] | None:
    """Which narrow group each run of ``within`` wide channels copies as a whole."""
    runs = [map_.index[k : k + within] for k in range(0, len(map_), within)]
    for run in runs:
        start = run[0]
        if start % within or run != tuple(range(start, start + within)):
            return None
    return [run[0] // within for run in runs]


def _plan_attention(
    module: nn.MultiheadAttention, axes: Axes, ratio: float, keep_output: bool
) -> LayerPlan:
    inputs = axes[-1]
    if inputs is None:
        return LayerPlan()
    if not module._qkv_same_embed_dim or module.bias_k is not None:
        raise UnsupportedLayerError("keys and values of other widths are not supported")
    heads = copies(module.embed_dim, ratio, block=module.head_dim)
    out = copies(module.embed_dim, ratio)
    if keep_output or len(heads) != len(inputs):
        raise UnsupportedLayerError(
            f"ratio {ratio} does not give a whole number of heads of its {module.num_heads}"
        )
    plan = LayerPlan()
    qkv = stack(heads, 3)
    plan.tensors["in_proj_weight"] = TensorPlan((qkv, inputs), 1)
    plan.tensors["out_proj.weight"] = TensorPlan((out, heads), 1)
    if module.in_proj_bias is not None:
        plan.tensors["in_proj_bias"] = TensorPlan((qkv,))
        plan.tensors["out_proj.bias"] = TensorPlan((out,))
    for name in ("embed_dim", "kdim", "vdim"):
        plan.attributes[name] = len(inputs)
    plan.attributes["num_heads"] = len(inputs) // module.head_dim
    return plan


def _plan_vectors(module: nn.Module, axes: Axes) -> LayerPlan:
    """Norms and other layers without channel mixing: their tensors follow the input's copies."""
    grown = {map_.narrow: map_ for map_ in axes if map_ is not None}
    plan = LayerPlan()
    if not grown:
        return plan
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and any(size in grown for size in shape):
        for size in shape:
            if size in grown and not grown[size].is_uniform:
                raise UnsupportedLayerError(
                    "it normalizes over channels that are not all copied equally often"
                )
        plan.attributes["normalized_shape"] = tuple(
            len(grown[size]) if size in grown else size for size in shape
        )
    if isinstance(module, nn.GroupNorm):
        channels = axes[1] if len(axes) > 1 else None
        groups = None if channels is None else _shared_by_groups(channels, module.num_groups)
        if groups is None or not groups.is_uniform:
            raise UnsupportedLayerError("its groups do not hold equally many copies of each")
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        maps = tuple(grown.get(size) if size > 1 else None for size in tensor.shape)
        if any(maps):
            plan.tensors[name] = TensorPlan(maps)
    for name in ("num_features", "num_channels", "num_parameters"):
        size = getattr(module, name, None)
        if isinstance(size, int) and size in grown:
            plan.attributes[name] = len(grown[size])
    return plan


def _resize(plan: LayerPlan, module: nn.Module, name: str, map_: IndexMap | None) -> None:
    if map_ is not None and hasattr(module, name):
        plan.attributes[name] = len(map_)
