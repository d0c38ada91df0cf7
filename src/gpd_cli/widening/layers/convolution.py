"""Plan convolutions: plain, grouped, depthwise, transposed, standardized, along channels."""

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
    """Whether a layer makes new channels, by sums over input channels or from a table."""
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
        layout: the order of the wide outputs; by default copies are side by side.

    Raises:
        UnsupportedLayerError: when the layer cannot be widened exactly.
    """
    spatial = module.weight.ndim - 2
    inputs = axes[-spatial - 1]
    if inputs is None and any(axes):
        return _along_channels(module, axes[-spatial:])
    out = None if keep_output else outputs(module.out_channels, scale, layout)
    if inputs is None and not mixes_channels(module):
        return LayerPlan()  # a depthwise convolution widens as its input does, which stays narrow
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
    """Plan a grouped convolution.

    Args:
        module: the narrow layer.
        inputs: index map of the inputs, or None.
        out: wanted index map of the outputs, or None.
        keep_output: whether the number of outputs has to stay.

    Returns:
        The plan, and the index map that the outputs get.
    """
    groups, plan = module.groups, LayerPlan()
    within, width = module.in_channels // groups, module.out_channels // groups
    rest: tuple[None, ...] = (None,) * (module.weight.ndim - 2)
    transposed = isinstance(module, _ConvTransposeNd)
    # A depthwise layer with one output per channel stays depthwise. With several outputs per
    # channel, the outputs of one wide channel are neighbours, so that copies of the whole channel
    # would not put the copies of an output side by side.
    depthwise = within == width == 1
    local = None if inputs is None or depthwise else shared_by_groups(inputs, groups)
    if (inputs is None or local is not None) and not transposed:
        # The number of groups stays, and each is wider: copies side by side are in the same group.
        if out is not None and shared_by_groups(out, groups) is None:
            out = stack(spread(width, len(out) // groups), groups)
        if out is None and local is None:
            return plan, None
        plan.tensors["weight"] = TensorPlan((out, local, *rest), None if local is None else 1)
    elif inputs is None:
        return plan, None
    else:
        # There are more groups, each of them a copy of a narrow group (as in depthwise layers).
        group = copied_groups(inputs, within)
        if group is None:
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
    """Plan a convolution that slides along channels (ECA), with a dilation that skips copies.

    Args:
        module: the narrow layer.
        spatial: index maps of the axes that the convolution slides along.
    """
    plan = LayerPlan()
    for k, map_ in enumerate(spatial):
        if map_ is None or module.kernel_size[k] == 1:
            continue
        times = len(map_) // map_.narrow_size
        regular = map_.index == spread(map_.narrow_size, len(map_)).index and map_.is_uniform
        if not regular or module.stride[k] != 1 or isinstance(module.padding, str):
            raise UnsupportedLayerError(
                "it slides along channels that are not all copied equally often, side by side"
            )
        for name in ("dilation", "padding"):
            value = list(plan.attributes.get(name, getattr(module, name)))
            value[k] *= times
            plan.attributes[name] = tuple(value)
        if module.padding_mode != "zeros":  # torch pads by a list of its own then
            padding = reversed(plan.attributes["padding"])
            plan.attributes["_reversed_padding_repeated_twice"] = [p for p in padding for _ in "ab"]
    return plan


def _standardized(module: _ConvNd, plan: LayerPlan, out: IndexMap | None) -> LayerPlan:
    """Change the plan of a convolution that standardizes its kernel before use.

    Standardization would undo the division of the kernel by the number of copies n. So the kernel
    is only copied, and the gain that follows the standardization is divided by n instead.

    Args:
        module: the narrow layer.
        plan: the plan of the layer as a convolution without standardization.
        out: index map of the outputs, or None.
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
    times = 1 if inputs is None else len(inputs) // inputs.narrow_size
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
