"""Plan torch's own multi-head attention as one layer."""

from __future__ import annotations

from torch import nn

from gpd_cli.widening.layers.base import LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layout import Scale, Segment
from gpd_cli.widening.plan import Axes, TensorPlan, stack


def plan_attention(
    module: nn.MultiheadAttention, axes: Axes, scale: Scale, keep_output: bool
) -> LayerPlan:
    """Plan torch's multi-head attention, whose heads are copied as a whole.

    Args:
        module: the narrow layer.
        axes: index maps of the queries.
        scale: how much wider the network gets.
        keep_output: whether the number of outputs has to stay.

    Raises:
        UnsupportedLayerError: when the layer cannot be widened exactly.
    """
    inputs = axes[-1]
    if inputs is None:
        return LayerPlan()
    if module.bias_k is not None:
        raise UnsupportedLayerError("a learned key and value (add_bias_kv) are not supported")
    if not module._qkv_same_embed_dim:
        raise UnsupportedLayerError("keys and values of other widths are not supported")
    if keep_output:
        raise UnsupportedLayerError("its output cannot keep its width when its input widens")
    size, width = module.embed_dim, module.head_dim
    heads = Segment(size, block=width).map(scale)
    out = Segment(size).map(scale)
    if not len(heads) == len(out) == len(inputs):
        how = f"ratio {scale.ratio:g}"
        if scale.rounded_to > 1:
            how += f" with width_multiple {scale.rounded_to}"
        if len(out) % width:
            raise UnsupportedLayerError(
                f"{how} would make {len(out)} channels of its {size}, which is no whole number of "
                f"heads of {width}"
            )
        raise UnsupportedLayerError(
            f"{how} would make {len(heads) // width} heads of its {module.num_heads}, which do not "
            f"have the {len(inputs)} channels of its input"
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
