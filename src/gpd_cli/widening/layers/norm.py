"""Plan norms and other layers that do not mix channels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from gpd_cli.widening.layers.base import LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layers.groups import copied_groups, shared_by_groups
from gpd_cli.widening.plan import Axes, IndexMap, TensorPlan

_SIZES = ("num_features", "num_channels", "num_parameters")


def plan_norm(module: nn.Module, axes: Axes) -> LayerPlan:
    """Plan a layer that does not mix channels: its tensors widen as its input does.

    Args:
        module: the narrow layer.
        axes: index maps of the input.

    Raises:
        UnsupportedLayerError: when the layer's statistics would weight channels or positions
            unequally, since they have different numbers of copies.
    """
    plan = LayerPlan()
    if not any(axes):
        return plan
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple):
        maps = _plan_trailing_axes(plan, shape, axes)
    else:
        maps = _plan_channels(plan, module, axes)
    if not any(maps):
        return LayerPlan()
    own: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    own.update(module.named_buffers(recurse=False))
    for name, tensor in own.items():
        _follow(plan, name, tensor, maps)
    for name in _SIZES:
        size = getattr(module, name, None)
        if maps[0] is not None and size == maps[0].narrow_size:
            plan.attributes[name] = len(maps[0])
    return plan


def _plan_trailing_axes(plan: LayerPlan, shape: tuple[int, ...], axes: Axes) -> Axes:
    """Plan a norm over the last axes of its input.

    Args:
        plan: the norm's plan, which gets the wide ``normalized_shape``.
        shape: the narrow ``normalized_shape``.
        axes: index maps of the input.

    Returns:
        The index maps of the axes that the norm normalizes over.
    """
    last = axes[-len(shape) :]
    # Layers such as LayerNorm2d have a normalized_shape, too, but normalize axis 1 of [B, C, H, W].
    fits = all(map_ is None or map_.narrow_size == n for map_, n in zip(last, shape, strict=True))
    if len(shape) == 1 and not (fits and last[0] is not None) and len(axes) > 1:
        channels = axes[1]
        if last[0] is None and channels is not None and channels.narrow_size == shape[0]:
            last = (channels,)
    if any(map_ is not None and not map_.is_uniform for map_ in last):
        raise UnsupportedLayerError(
            "it normalizes over channels that are not all copied equally often"
        )
    plan.attributes["normalized_shape"] = TensorPlan(tuple(last)).wide_shape(shape)
    return last


def _plan_channels(plan: LayerPlan, module: nn.Module, axes: Axes) -> Axes:
    """Plan a layer with a weight for each channel of its input, ``[B, C, ...]``.

    Args:
        plan: the layer's plan, which gets the wide number of groups of a group norm.
        module: the narrow layer.
        axes: index maps of the input.

    Returns:
        The index map of the channels, as the only entry.
    """
    channels = axes[1] if len(axes) > 1 else axes[0]
    others = [map_ for k, map_ in enumerate(axes) if k != 1 and map_ is not None]
    if isinstance(module, _NormBase | nn.GroupNorm) and not all(m.is_uniform for m in others):
        raise UnsupportedLayerError(
            "it takes statistics over positions that are not all copied equally often"
        )
    if isinstance(module, nn.GroupNorm) and channels is not None:
        _plan_group_norm(plan, channels, module.num_groups)
    return (channels,)


def _plan_group_norm(plan: LayerPlan, channels: IndexMap, count: int) -> None:
    local = shared_by_groups(channels, count)
    if local is not None and local.is_uniform:
        return  # the number of groups stays, and each group is wider
    groups = copied_groups(channels, channels.narrow_size // count)
    if groups is None:
        raise UnsupportedLayerError("its groups do not hold equally many copies of each")
    plan.attributes["num_groups"] = len(groups)


def _follow(plan: LayerPlan, name: str, tensor: torch.Tensor, maps: Axes) -> None:
    if tensor.ndim != len(maps):
        return
    pairs = list(zip(maps, tensor.shape, strict=True))
    if all(map_ is None or map_.narrow_size == size for map_, size in pairs):
        plan.tensors[name] = TensorPlan(tuple(maps))
