"""Plan linear layers, and any weight ``[O, I, ...]`` with its bias."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from gpd_cli.widening.layers.base import LayerPlan
from gpd_cli.widening.layout import Layout, Scale, Segment, layout_map
from gpd_cli.widening.plan import Axes, IndexMap, TensorPlan


def plan_linear(
    module: nn.Linear, axes: Axes, scale: Scale, keep_output: bool, layout: Layout | None
) -> LayerPlan:
    """Plan a linear layer.

    Args:
        module: the narrow layer.
        axes: index maps of the input.
        scale: how much wider the network gets.
        keep_output: whether the number of outputs has to stay.
        layout: the order of the wide outputs; by default copies are side by side.
    """
    inputs = axes[-1]
    if inputs is None and any(axes):
        return LayerPlan()  # the layer mixes another axis (tokens) and leaves copies in place
    out = None if keep_output else outputs(module.out_features, scale, layout)
    plan = LayerPlan(linear_tensors(module.weight.ndim, module.bias is not None, out, inputs))
    plan.resize(module, "in_features", inputs)
    plan.resize(module, "out_features", out)
    return plan


def linear_tensors(
    ndim: int,
    has_bias: bool,
    out: IndexMap | None,
    inputs: IndexMap | None,
    transposed: bool = False,
) -> dict[str, TensorPlan]:
    """Make the plans of a weight ``[O, I, ...]`` and its bias.

    Args:
        ndim: number of axes of the weight.
        has_bias: whether there is a bias.
        out: index map of the outputs, or None if they stay.
        inputs: index map of the inputs, or None if they stay.
        transposed: whether the weight is ``[I, O, ...]``.

    Returns:
        Plans by name, ``weight`` and ``bias``, for the tensors that widen.
    """
    tensors = {}
    if out is not None or inputs is not None:
        first = (inputs, out) if transposed else (out, inputs)
        fan_in = None if inputs is None else int(not transposed)
        tensors["weight"] = TensorPlan((*first, *(None,) * (ndim - 2)), fan_in)
    if out is not None and has_bias:
        tensors["bias"] = TensorPlan((out,))
    return tensors


def rescaled(
    layer: LayerPlan, module: nn.Module, input_factor: float, output_factor: float
) -> LayerPlan:
    """Adjust the plan of a dense layer whose inputs or outputs are multiples of copies.

    Args:
        layer: the plan of the layer for inputs and outputs that are plain copies.
        module: the narrow layer, with a weight and perhaps a bias.
        input_factor: the number that the copies in the inputs are multiplied by.
        output_factor: the number that the copies in the outputs have to be multiplied by.
    """
    if input_factor == output_factor == 1:
        return layer
    divisors = {"weight": input_factor / output_factor, "bias": 1 / output_factor}
    tensors = dict(layer.tensors)
    for name, tensor in module.named_parameters(recurse=False):
        if divisors.get(name, 1) != 1:
            plan = tensors.get(name, TensorPlan((None,) * tensor.ndim))
            tensors[name] = replace(plan, extra_divisor=divisors[name])
    return LayerPlan(tensors, layer.attributes)


def outputs(size: int, scale: Scale, layout: Layout | None) -> IndexMap | None:
    """Make the index map of a layer's outputs, or return None if they stay.

    Args:
        size: narrow number of outputs.
        scale: how much wider the network gets.
        layout: the order of the wide outputs; by default copies are side by side.
    """
    return layout_map(layout or (Segment(size),), scale)
