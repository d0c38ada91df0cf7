"""Merge all branches of a layer into one kernel: ``kernel[o] + sum_b gate_b[o] * branch_b[o]``.

The kernels are summed first, and then a single convolution runs (online reparameterization: OREPA,
Hu et al., CVPR 2022). In the authors' block the main kernel has a gate as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gpd_cli.branches.functional import (
    centred,
    depthwise_separable,
    expandnet,
    frequency_filters,
    frequency_prior,
    from_identity,
    identity_kernel,
    linear_factors,
    pointwise_average,
    pointwise_kxk,
)
from gpd_cli.branches.gated_sum import (
    Dense,
    DepthwiseProduct,
    Filtered,
    Identity,
    PointwiseProduct,
    Term,
    gated_sum,
)
from gpd_cli.branches.names import MAIN_GATE

FILTERED_BRANCHES = ("1x1", "1x1_avg", "frequency", "1xk", "kx1")
"""Branches whose kernel is a sum of 1 x 1 weights, each times a fixed filter per output channel."""


def branch_kernel(
    name: str, parameters: Mapping[str, Tensor], kernel_shape: Sequence[int], groups: int = 1
) -> Tensor:
    """Compute the equivalent kernel of one branch, before its gate.

    Args:
        name: one of `gpd_cli.branches.EXTRA_BRANCHES`.
        parameters: the branch's tensors, by the names of `gpd_cli.branches.initial_parameters`. In
            the authors' block the teacher's ``1x1_kxk`` also has ``identity``: the student's
            identity matrix, widened as the deviation is.
        kernel_shape: ``[O, I/g, kh, kw]``, or ``[O, I]`` for a linear layer.
        groups: groups of the layer.

    Returns:
        A tensor of shape ``kernel_shape``, in any memory format.
    """
    fan, *kernel_size = kernel_shape[1:]
    if name == "identity":
        return identity_kernel(parameters["channels"], kernel_shape)
    weight = parameters["weight"]
    match name:
        case "1x1" | "1xk" | "kx1":
            return centred(weight, kernel_size)
        case "kxk_2":
            return weight
        case "1x1_kxk":
            return pointwise_kxk(pointwise_factor(parameters, fan), weight, groups)
        case "1x1_avg":
            return pointwise_average(weight, kernel_size)
        case "frequency":
            filters = frequency_filters(
                weight.shape[0], kernel_size, dtype=weight.dtype, device=weight.device
            )
            return frequency_prior(weight, filters)
        case "depthwise_separable" | "do_conv":
            depthwise = depthwise_factor(parameters, kernel_size)
            return depthwise_separable(depthwise, weight.flatten(1)[:, :, None, None], groups)
        case "expandnet":
            return expandnet(parameters["first"], parameters["middle"], weight, groups)
        case "linear":
            deviation = parameters["deviation"]
            return linear_factors(from_identity(deviation, deviation.shape[1]), weight, groups)
    raise ValueError(f"no branch is named '{name}'")


def pointwise_factor(parameters: Mapping[str, Tensor], fan: int) -> Tensor:
    """Compute the 1 x 1 convolution of ``1x1_kxk`` from the branch's tensors.

    By default the branch stores the deviation of this convolution from the identity.

    Args:
        parameters: the branch's tensors, see `branch_kernel`.
        fan: number of input channels per group, I/g.

    Returns:
        The weight of the 1 x 1 convolution, ``[g * J, I/g, 1, 1]``, with J inner channels per
        group.
    """
    if "first" in parameters:  # stored as it is, where `branch_width` is not 1
        return parameters["first"]
    deviation, identity = parameters["deviation"], parameters.get("identity")
    return from_identity(deviation, fan) if identity is None else deviation + identity


def depthwise_factor(parameters: Mapping[str, Tensor], kernel_size: Sequence[int]) -> Tensor:
    """Compute the depthwise convolution of ``depthwise_separable`` or ``do_conv``.

    Args:
        parameters: the branch's tensors, see `branch_kernel`.
        kernel_size: (kh, kw).

    Returns:
        The weight of the depthwise convolution, ``[I, m, kh, kw]``, with m outputs per input
        channel.
    """
    if "depthwise" in parameters:
        return parameters["depthwise"]
    return from_identity(parameters["deviation"], math.prod(kernel_size))


def weight_size(name: str, kernel_size: Sequence[int]) -> tuple[int, int]:
    """Height and width of the weight of one of the `FILTERED_BRANCHES`.

    Args:
        name: name of the branch.
        kernel_size: (kh, kw) of the layer.
    """
    kh, kw = kernel_size
    return (kh if name == "kx1" else 1, kw if name == "1xk" else 1)


def spatial_filters(
    names: Sequence[str],
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Compute the fixed filters of those branches that are `FILTERED_BRANCHES`.

    Args:
        names: branches, in the order of the gates that `merge` is called with; others than
            `FILTERED_BRANCHES` have no filters.
        out_channels: number of output channels, O.
        kernel_size: (kh, kw); may have any length where none of the branches has a filter.
        dtype: dtype of the result.
        device: device of the result.

    Returns:
        The filters, ``[T, O, kh, kw]``, with T taps (positions) in the weights of all branches
        together: a 1 x 1 weight has one tap, a 1 x k weight has k taps. The filter of a tap is the
        kernel of the branch when this tap is one and all others are zero.
    """
    filters = [torch.empty(0, out_channels, *kernel_size, dtype=torch.float64)]
    for name in names:
        if name in FILTERED_BRANCHES:
            height, width = weight_size(name, kernel_size)
            taps = height * width
            each = torch.eye(taps, dtype=torch.float64).view(taps, 1, 1, height, width)
            ones = each.expand(-1, out_channels, -1, -1, -1)
            shape = (out_channels, 1, *kernel_size)
            kernels = [branch_kernel(name, {"weight": one}, shape).squeeze(1) for one in ones]
            if name == "frequency" and MAIN_GATE in names:  # the authors' block
                growing = frequency_filters(
                    out_channels, kernel_size, growing=True, dtype=torch.float64
                )
                kernels = [growing]
            filters.append(torch.stack(kernels))
    return torch.cat(filters).to(device, dtype or torch.get_default_dtype())


def merge(
    kernel: Tensor,
    gates: Mapping[str, Tensor],
    parameters: Mapping[str, Mapping[str, Tensor]],
    filters: Tensor,
    groups: int = 1,
) -> Tensor:
    """Merge gated branches into the main kernel: ``kernel[o] + sum_b gate_b[o] * branch_b[o]``.

    The result is the sum of the main kernel and of each gated `branch_kernel`, computed in one
    autograd node (see `gated_sum`). All branches with fixed filters are computed in one product.
    Under autocast the products may run in lower precision, but the sum is taken in the main
    kernel's precision, so with zero gates the result is the main kernel to the last bit.

    Args:
        kernel: the main kernel, ``[O, I/g, kh, kw]`` (``[O, I]`` for a linear layer).
        gates: a gate, ``[O]``, for each branch, and for the main kernel where it has one
            (``main_gate``). Branches with fixed filters are added first, the others in this order.
        parameters: each branch's tensors by name (see `branch_kernel`), by branch name.
        filters: the fixed filters, ``[T, O, kh, kw]``, from `spatial_filters` of the same names.
        groups: number of groups of the layer.

    Returns:
        The merged kernel, of the main kernel's shape, dtype and memory format; the main kernel
        itself where there is no branch.
    """
    if not gates:
        return kernel
    main_gate: Tensor | None = None
    terms: list[Term] = []
    filtered = [name for name in gates if name in FILTERED_BRANCHES]
    if filtered:
        terms.append(_filtered_term(filtered, gates, parameters, filters))
    for name, gate in gates.items():
        if name == MAIN_GATE:
            main_gate = gate
        elif name not in FILTERED_BRANCHES:
            terms.append(_term(name, gate, parameters[name], kernel, groups))
    return gated_sum(kernel, main_gate, terms)


def _filtered_term(
    names: Sequence[str],
    gates: Mapping[str, Tensor],
    parameters: Mapping[str, Mapping[str, Tensor]],
    filters: Tensor,
) -> Filtered:
    """The sum of all branches with fixed filters as one term: one product per output channel.

    Args:
        names: the branches, all of them `FILTERED_BRANCHES`.
        gates: the gates by branch name, each ``[O]``.
        parameters: each branch's tensors by name, by branch name.
        filters: the fixed filters, ``[T, O, kh, kw]``.
    """
    weights = [parameters[name]["weight"].flatten(2).transpose(1, 2) for name in names]
    gated = torch.cat(
        [gates[n].expand(w.shape[1], -1) for n, w in zip(names, weights, strict=True)]
    )
    patterns = gated[:, :, None] * filters.flatten(2)
    return Filtered(torch.cat(weights, dim=1), patterns.transpose(0, 1))


def _term(
    name: str, gate: Tensor, parameters: Mapping[str, Tensor], kernel: Tensor, groups: int
) -> Term:
    """A branch without fixed filters as a term of the sum.

    Branches that are the product of two layers become terms that keep the two factors only, since
    their product has the kernel's size.

    Args:
        name: name of the branch.
        gate: gate of the branch, ``[O]``.
        parameters: the branch's tensors by name.
        kernel: the main kernel, ``[O, I/g, kh, kw]`` or ``[O, I]``.
        groups: number of groups of the layer.
    """
    fan, *kernel_size = kernel.shape[1:]
    match name:
        case "identity":
            return Identity(gate, parameters["channels"])
        case "1x1_kxk":
            first = pointwise_factor(parameters, fan)
            return PointwiseProduct(gate, first.view(groups, -1, fan), parameters["weight"])
        case "depthwise_separable" | "do_conv":
            depthwise = depthwise_factor(parameters, kernel_size)
            filters = depthwise.reshape(groups, fan, depthwise.shape[1], -1)
            return DepthwiseProduct(
                gate, filters, parameters["weight"].reshape(-1, *filters.shape[1:3])
            )
    return Dense(gate, branch_kernel(name, parameters, kernel.shape, groups))
