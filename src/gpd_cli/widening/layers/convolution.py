"""Convolutions: plain, grouped, depthwise, transposed, standardized, along channels."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gpd_cli.widening.layers.base import LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layers.embedding import Table
from gpd_cli.widening.layers.groups import copied_groups, shared_by_groups
from gpd_cli.widening.layers.linear import linear_tensors, outputs
from gpd_cli.widening.layout import Layout, Scale
from gpd_cli.widening.plan import Axes, IndexMap, TensorPlan, spread, stack

_WEIGHT_STANDARDIZED = {
    "StdConv2d",
    "StdConv2dSame",
    "ScaledStdConv2d",
    "ScaledStdConv2dSame",
}


def mixes_channels(module: nn.Module) -> bool:
    """Whether a layer makes new channels: by sums over input channels, or from a table."""
    if isinstance(module, _ConvNd):
        return module.in_channels // module.groups > 1 or module.groups == 1
    return isinstance(module, nn.Linear | nn.MultiheadAttention | Table)


def plan_convolution(
    module: _ConvNd, axes: Axes, scale: Scale, keep_output: bool, layout: Layout | None
) -> LayerPlan:
    """Plan a convolution of any kind: plain, grouped, depthwise, transposed, standardized.

    Args:
        module: the narrow layer.
        axes: index maps of the input.
        scale: how much wider the network gets.
        keep_output: whether the number of outputs has to stay.
        layout: the order of the wide outputs; by default copies side by side.

    Raises:
        UnsupportedLayerError: when the layer cannot be widened exactly.
    """
    spatial = module.weight.ndim - 2
    inputs = axes[-spatial - 1]
    if inputs is None and any(axes):
        return _along_channels(module, axes[-spatial:])
    out = None if keep_output else outputs(module.out_channels, scale, layout)
    if inputs is None and not mixes_channels(module):
        return LayerPlan()  # depthwise: the output follows the input
    if module.groups > 1:
        plan, out = _plan_groups(module, inputs, out, keep_output)
    else:
        transposed = isinstance(module, _ConvTransposeNd)
        has_bias = module.bias is not None
        plan = LayerPlan(
            linear_tensors(module.weight.ndim, has_bias, out, inputs, transposed=transposed)
        )
    plan.resize(module, "in_channels", inputs)
    plan.resize(module, "out_channels", out)
    return _standardized(module, plan, out)


def _plan_groups(
    module: _ConvNd, inputs: IndexMap | None, out: IndexMap | None, keep_output: bool
) -> tuple[LayerPlan, IndexMap | None]:
    """The plan of a grouped convolution and the index map of its outputs."""
    groups, plan = module.groups, LayerPlan()
    within, width = module.in_channels // groups, module.out_channels // groups
    rest: tuple[None, ...] = (None,) * (module.weight.ndim - 2)
    transposed = isinstance(module, _ConvTransposeNd)
    # Depthwise layers stay depthwise, unless they have several outputs per channel: the outputs of
    # one wide channel are neighbours, so that copying channels would not put copies side by side.
    depthwise = within == width == 1
    local = None if inputs is None or depthwise else shared_by_groups(inputs, groups)
    if (inputs is None or local is not None) and not transposed:
        # The same number of groups, each wider: copies lie side by side, so groups stay together.
        if out is not None and shared_by_groups(out, groups) is None:
            out = stack(spread(width, len(out) // groups), groups)
        if out is None and local is None:
            return plan, None
        plan.tensors["weight"] = TensorPlan((out, local, *rest), None if local is None else 1)
    else:
        # More groups, each a copy of a narrow one (depthwise convolutions).
        group = None if inputs is None else copied_groups(inputs, within)
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


def _along_channels(module: _ConvNd, spatial: Axes) -> LayerPlan:
    """A convolution that slides along channels (ECA): its taps step over the copies."""
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
    """Copy kernels that are standardized before use: standardization would undo a division by n.

    The gain after the standardized kernel is divided by n instead.
    """
    if type(module).__name__ not in _WEIGHT_STANDARDIZED:
        return plan
    weight = plan.tensors.get("weight")
    if weight is None:
        return plan
    inputs = weight.fan_in_map
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
        plan.tensors["gain"] = TensorPlan(axes, extra_divisor=times)
    return plan
