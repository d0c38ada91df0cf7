"""Find the axes of constants that are aligned with axes of activations in a call.

Axes are aligned by broadcasting, or because a matrix product sums over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Functions that sum over or look up their operands, and do not broadcast them to each other.
_UNALIGNED = {
    torch.einsum,
    F.linear,
    F.bilinear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.conv_transpose2d,
    F.embedding,
    F.grid_sample,
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.index_select,
    torch.index_select,
    Tensor.gather,
    torch.gather,
    Tensor.copy_,
    Tensor.type_as,
    Tensor.to,
    Tensor.expand_as,
    Tensor.view_as,
}
_PRODUCTS = {
    Tensor.matmul,
    Tensor.__matmul__,
    torch.matmul,
    Tensor.bmm,
    torch.bmm,
    Tensor.mm,
    torch.mm,
}
_BY_CHANNEL = {F.batch_norm, F.instance_norm, F.group_norm, F.prelu, torch.prelu, torch.batch_norm}
_JOINING = {torch.cat, torch.concat, torch.concatenate}


def overlays_operands(function: Callable[..., Any]) -> bool:
    """Whether a function aligns axes of its tensors, such as element-wise functions do."""
    return function not in _UNALIGNED


def aligned(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    x: Tensor,
    constant: Tensor,
) -> dict[int, int]:
    """Find the axis of an activation that each axis of a constant is aligned with in a call.

    Args:
        function: the function that both are passed to.
        args: the call's positional arguments.
        kwargs: the call's keyword arguments.
        x: the activation.
        constant: the constant.

    Returns:
        The activation's axis by the constant's axis; axes that are aligned with none are left out.
    """
    if function in _PRODUCTS:
        return {}
    if function in _BY_CHANNEL:
        return {0: 1} if constant.ndim == 1 and x.ndim > 1 else {}
    if function in _JOINING:
        joined = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return {k: k for k in range(constant.ndim) if k != joined % constant.ndim}
    # An attention mask is added to products of queries and keys, [..., heads, queries, keys]: all
    # axes but the last two are aligned with axes of the queries.
    common = constant.ndim - 2 * (function is F.scaled_dot_product_attention)
    offset = x.ndim - constant.ndim
    return {k: k + offset for k in range(common) if k + offset >= 0}


def summed(
    function: Callable[..., Any], args: tuple[Any, ...], x: Tensor, constant: Tensor
) -> tuple[int, int] | None:
    """Find the axes that a matrix product of a constant and an activation sums over.

    Args:
        function: the function that both are passed to.
        args: the call's positional arguments.
        x: the activation.
        constant: the constant.

    Returns:
        The axis of the constant and that of the activation; None if the call is no such product.
    """
    if function not in _PRODUCTS or len(args) < 2:
        return None
    if args[0] is x:
        return max(0, constant.ndim - 2), x.ndim - 1
    return constant.ndim - 1, max(0, x.ndim - 2)
