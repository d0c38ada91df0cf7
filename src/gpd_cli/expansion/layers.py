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
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gpd_cli.expansion.layout import Layout, Scale, Segment, layout_map
from gpd_cli.expansion.plan import IndexMap, TensorPlan, spread, stack

Axes = Sequence[IndexMap | None]

_MIXING = (_ConvNd, nn.Linear, nn.MultiheadAttention)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_SIZES = ("num_features", "num_channels", "num_parameters")


class UnsupportedLayerError(Exception):
    """Why a layer cannot be widened; the caller adds which layer it is."""


@dataclass
class LayerPlan:
    """How one module widens: plans by local tensor name, wide values by attribute name."""

    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is planned as a whole: its arithmetic is known and it calls no other."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not isinstance(module, (*_MIXING, *_NORMS, nn.PReLU)):
        return False
    return not any(True for child in module.children() for _ in child.parameters())


def mixes_channels(module: nn.Module) -> bool:
    """Whether a layer's output channels are sums over input channels."""
    if isinstance(module, _ConvNd):
        return module.in_channels // module.groups > 1 or module.groups == 1
    return isinstance(module, nn.Linear | nn.MultiheadAttention)


def output_size(module: nn.Module) -> int | None:
    """The number of output channels of a layer that chooses it, else None."""
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
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
        axes: per axis of its input, the index map, or None where the axis has not grown.
        scale: how much wider.
        keep_output: whether its output has to keep its width (the classifier).
        layout: how its outputs widen; by default copies side by side.

    Returns:
        What changes; an empty plan when nothing does.

    Raises:
        UnsupportedLayerError: when the layer cannot be widened exactly.
    """
    if isinstance(module, _ConvNd):
        return _plan_conv(module, axes, scale, keep_output, layout)
    if isinstance(module, nn.Linear):
        inputs = axes[-1]
        if inputs is None and any(axes):
            return LayerPlan()  # it mixes another axis (tokens), whose copies it carries along
        out = None if keep_output else _outputs(module.out_features, scale, layout)
        plan = LayerPlan(linear_tensors(module.weight.ndim, module.bias is not None, out, inputs))
        _resize(plan, module, "in_features", inputs)
        _resize(plan, module, "out_features", out)
        return plan
    if isinstance(module, nn.MultiheadAttention):
        return _plan_attention(module, axes, scale, keep_output)
    return _plan_vectors(module, axes)


def linear_tensors(
    ndim: int,
    has_bias: bool,
    out: IndexMap | None,
    inputs: IndexMap | None,
    transposed: bool = False,
) -> dict[str, TensorPlan]:
    """Plans of a weight ``[O, I, ...]`` and its bias.

    Args:
        ndim: axes of the weight.
        has_bias: whether there is a bias.
        out: index map of the outputs, or None.
        inputs: index map of the inputs, or None.
        transposed: whether the weight is ``[I, O, ...]``.
    """
    tensors = {}
    if out is not None or inputs is not None:
        first = (inputs, out) if transposed else (out, inputs)
        fan_in = None if inputs is None else int(not transposed)
        tensors["weight"] = TensorPlan((*first, *(None,) * (ndim - 2)), fan_in)
    if out is not None and has_bias:
        tensors["bias"] = TensorPlan((out,))
    return tensors


def _outputs(size: int, scale: Scale, layout: Layout | None) -> IndexMap | None:
    return layout_map(layout or (Segment(size),), scale)


def _plan_conv(
    module: _ConvNd, axes: Axes, scale: Scale, keep_output: bool, layout: Layout | None
) -> LayerPlan:
    spatial = module.weight.ndim - 2
    inputs = axes[-spatial - 1]
    if inputs is None and any(axes):
        return _along_channels(module, axes[-spatial:])
    out = None if keep_output else _outputs(module.out_channels, scale, layout)
    if inputs is None and not mixes_channels(module):
        return LayerPlan()  # depthwise: it follows its input
    if module.groups > 1:
        plan, out = _plan_groups(module, inputs, out, keep_output)
    else:
        transposed = isinstance(module, _ConvTransposeNd)
        has_bias = module.bias is not None
        plan = LayerPlan(
            linear_tensors(module.weight.ndim, has_bias, out, inputs, transposed=transposed)
        )
    _resize(plan, module, "in_channels", inputs)
    _resize(plan, module, "out_channels", out)
    return _standardized(module, plan, out)


def _plan_groups(
    module: _ConvNd, inputs: IndexMap | None, out: IndexMap | None, keep_output: bool
) -> tuple[LayerPlan, IndexMap | None]:
    """A grouped convolution: its plan and the index map of its outputs."""
    groups, plan = module.groups, LayerPlan()
    within, width = module.in_channels // groups, module.out_channels // groups
    rest: tuple[None, ...] = (None,) * (module.weight.ndim - 2)
    transposed = isinstance(module, _ConvTransposeNd)
    # Depthwise layers stay so, unless they have several outputs per channel: those of one wide
    # channel lie together, so that copying channels would not lay copies side by side.
    depthwise = within == width == 1
    local = None if inputs is None or depthwise else shared_by_groups(inputs, groups)
    if (inputs is None or local is not None) and not transposed:
        # As many groups, each wider: copies lie side by side, so groups stay together.
        if out is not None and shared_by_groups(out, groups) is None:
            out = stack(spread(width, len(out) // groups), groups)
        if out is None and local is None:
            return plan, None
        plan.tensors["weight"] = TensorPlan((out, local, *rest), None if local is None else 1)
    else:
        # More groups, each a copy of a narrow one (depthwise convolutions).
        group = None if inputs is None else _copied_groups(inputs, within)
        if group is None or inputs is None:
            raise UnsupportedLayerError("its groups do not hold copies of whole groups")
        if keep_output:
            raise UnsupportedLayerError(
                "its output cannot keep its width, because every group of its input is copied"
            )
        index = tuple(g * width + o for g in group for o in range(width))
        out = IndexMap(module.out_channels, index)
        plan.tensors["weight"] = TensorPlan(((inputs if transposed else out), None, *rest))
        plan.attributes["groups"] = len(group)
    if module.bias is not None and out is not None:
        plan.tensors["bias"] = TensorPlan((out,))
    return plan, out


def shared_by_groups(map_: IndexMap, groups: int) -> IndexMap | None:
    """The map within a group, when all groups have the same one."""
    wide, narrow = len(map_) // groups, map_.narrow // groups
    if len(map_) % groups:
        return None
    local = map_.index[:wide]
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


def _along_channels(module: _ConvNd, spatial: Axes) -> LayerPlan:
    """A convolution that slides along channels (ECA): it steps over the copies of each."""
    plan = LayerPlan()
    for k, map_ in enumerate(spatial):
        if map_ is None or module.kernel_size[k] == 1:
            continue
        times = len(map_) // map_.narrow
        regular = map_.index == spread(map_.narrow, len(map_)).index and map_.is_uniform
        if not regular or module.stride[k] != 1 or isinstance(module.padding, str):
            raise UnsupportedLayerError(
                "it slides along channels that are not all copied equally often, side by side"
            )
        for name in ("dilation", "padding"):
            value = list(plan.attributes.get(name, getattr(module, name)))
            value[k] *= times
            plan.attributes[name] = tuple(value)
    return plan


def _standardized(module: _ConvNd, plan: LayerPlan, out: IndexMap | None) -> LayerPlan:
    """Kernels that are standardized before use keep their mean and deviation: they are copied.

    The 1/n that their copies would lose again goes to the gain that follows.
    """
    if type(module).__name__ not in _WEIGHT_STANDARDIZED:
        return plan
    weight = plan.tensors.get("weight")
    if weight is None:
        return plan
    inputs = weight.divided
    if inputs is not None and not inputs.is_uniform:
        raise UnsupportedLayerError(
            "it standardizes its kernel over channels that are not all copied equally often"
        )
    times = 1 if inputs is None else len(inputs) // inputs.narrow
    gain = getattr(module, "gain", None)
    if gain is None and times > 1:
        raise UnsupportedLayerError(
            "it standardizes its kernel, so that the copies of its inputs cannot share a weight"
        )
    plan.tensors["weight"] = TensorPlan(weight.axes)
    if gain is not None:
        axes = (out, *(None,) * (gain.ndim - 1))
        plan.tensors["gain"] = TensorPlan(axes, share=times)
    return plan


_WEIGHT_STANDARDIZED = {
    "StdConv2d",
    "StdConv2dSame",
    "ScaledStdConv2d",
    "ScaledStdConv2dSame",
}


def _plan_attention(
    module: nn.MultiheadAttention, axes: Axes, scale: Scale, keep_output: bool
) -> LayerPlan:
    inputs = axes[-1]
    if inputs is None:
        return LayerPlan()
    if not module._qkv_same_embed_dim or module.bias_k is not None:
        raise UnsupportedLayerError("keys and values of other widths are not supported")
    if keep_output:
        raise UnsupportedLayerError("its output cannot keep its width when its input widens")
    size, width = module.embed_dim, module.head_dim
    heads = Segment(size, block=width).map(scale)
    out = Segment(size).map(scale)
    if not len(heads) == len(out) == len(inputs):
        raise UnsupportedLayerError(
            f"ratio {scale.ratio:g} does not give a whole number of heads of its {module.num_heads}"
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
    plan.attributes["num_heads"] = len(inputs) // width
    return plan


def _plan_vectors(module: nn.Module, axes: Axes) -> LayerPlan:
    """Norms and other layers without channel mixing: their tensors follow the input's copies."""
    plan = LayerPlan()
    if not any(axes):
        return plan
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple):
        # LayerNorm2d and its like normalize the channels of [B, C, H, W] by the same rule.
        last = axes[-len(shape) :]
        fits = all(map_ is None or map_.narrow == n for map_, n in zip(last, shape, strict=True))
        if len(shape) == 1 and not (fits and last[0] is not None) and len(axes) > 1:
            channels = axes[1]
            if last[0] is None and channels is not None and channels.narrow == shape[0]:
                last = (channels,)
        if any(map_ is not None and not map_.is_uniform for map_ in last):
            raise UnsupportedLayerError(
                "it normalizes over channels that are not all copied equally often"
            )
        plan.attributes["normalized_shape"] = tuple(
            n if map_ is None else len(map_) for map_, n in zip(last, shape, strict=True)
        )
        maps = tuple(last)
    else:
        channels = axes[1] if len(axes) > 1 else axes[0]
        others = [map_ for k, map_ in enumerate(axes) if k != 1 and map_ is not None]
        if isinstance(module, _NormBase | nn.GroupNorm) and not all(m.is_uniform for m in others):
            raise UnsupportedLayerError(
                "it takes statistics over positions that are not all copied equally often"
            )
        if isinstance(module, nn.GroupNorm) and channels is not None:
            _plan_group_norm(plan, channels, module.num_groups)
        maps = (channels,)
    if not any(maps):
        plan.attributes.clear()
        return plan
    own: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    own.update(module.named_buffers(recurse=False))
    for name, tensor in own.items():
        _follow(plan, name, tensor, maps)
    for name in _SIZES:
        size = getattr(module, name, None)
        if maps[0] is not None and size == maps[0].narrow:
            plan.attributes[name] = len(maps[0])
    return plan


def _plan_group_norm(plan: LayerPlan, channels: IndexMap, count: int) -> None:
    local = shared_by_groups(channels, count)
    if local is not None and local.is_uniform:
        return  # as many groups, each wider
    groups = _copied_groups(channels, channels.narrow // count)
    if groups is None:
        raise UnsupportedLayerError("its groups do not hold equally many copies of each")
    plan.attributes["num_groups"] = len(groups)


def _follow(plan: LayerPlan, name: str, tensor: torch.Tensor, maps: Axes) -> None:
    if tensor.ndim != len(maps):
        return
    pairs = list(zip(maps, tensor.shape, strict=True))
    if all(map_ is None or map_.narrow == size for map_, size in pairs):
        plan.tensors[name] = TensorPlan(tuple(maps))


def _resize(plan: LayerPlan, module: nn.Module, name: str, map_: IndexMap | None) -> None:
    if map_ is not None and hasattr(module, name):
        plan.attributes[name] = len(map_)
