"""Branch algebra: the one kernel that convolves like several branches together.

A layer's kernel is ``kernel[o] + sum_b gate_b[o] * branch_b[o]``, formed from the weights before
the one convolution is run (online reparameterization: DBB, Ding et al., CVPR 2021; OREPA, Hu et
al., CVPR 2022). No branch has a bias, a norm or an activation, so the identity is exact for any
stride, padding and dilation.

Tensors have the shapes of convolution weights. With O output channels, I input channels, g groups
and kernel kh x kw, the equivalent kernel is ``[O, I/g, kh, kw]``. A branch's ``weight`` is the one
of its tensors whose first axis is O: the branch is linear in it, row by row, which is where the
gate goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FILTERED_BRANCHES = ("1x1", "1x1_avg", "frequency")
"""Branches whose kernel is a pointwise weight times one fixed spatial filter per output channel."""


def centred(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Place a smaller kernel at the centre of a larger one (DBB, transform VI; ACNet).

    Args:
        weight: ``[O, I/g, h, w]`` with each side either 1 or that of the kernel.
        kernel_size: (kh, kw); the centre of an even side is its lower middle, ``(k - 1) // 2``.

    Returns:
        ``[O, I/g, kh, kw]``, zero elsewhere.
    """
    padding: list[int] = []
    for size, inner in zip(reversed(kernel_size), reversed(weight.shape[2:]), strict=True):
        before = (size - inner) // 2
        padding += [before, size - inner - before]
    return F.pad(weight, padding)


def pointwise_average(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """1 x 1 convolution followed by average pooling (DBB, transforms III and V).

    Args:
        weight: ``[O, I/g, 1, 1]``.
        kernel_size: (kh, kw), the window of the pooling, which counts padding.

    Returns:
        ``[O, I/g, kh, kw]``, a view of one value per channel pair.
    """
    kh, kw = kernel_size
    return (weight / (kh * kw)).expand(-1, -1, kh, kw)


def frequency_filters(
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fixed filters of the frequency-prior branch: one DCT-II basis vector per output channel.

    The first half of the channels varies along the height, the second along the width;
    neighbours differ in frequency. OREPA lets the frequency grow with the channel, and there the
    filter of every multiple of the kernel's side is zero, so that such a channel never learns.
    Cycling through ``0 .. k - 1`` gives the same filters, up to their sign, without the dead ones.

    Args:
        out_channels: O.
        kernel_size: (kh, kw).
        dtype: of the result.
        device: of the result.

    Returns:
        ``[O, kh, kw]``.
    """
    kh, kw = kernel_size
    half = (out_channels + 1) // 2

    def basis(size: int, channels: int) -> Tensor:
        frequency = torch.arange(1, channels + 1, dtype=torch.float64) % size
        position = torch.arange(size, dtype=torch.float64) + 0.5
        return torch.cos(torch.outer(frequency, position) * (math.pi / size))

    vertical = basis(kh, half)[:, :, None].expand(-1, kh, kw)
    horizontal = basis(kw, out_channels - half)[:, None, :].expand(-1, kh, kw)
    return torch.cat([vertical, horizontal]).to(device, dtype or torch.get_default_dtype())


def frequency_prior(weight: Tensor, filters: Tensor) -> Tensor:
    """Pointwise weight times a fixed filter per output channel (OREPA's frequency prior).

    Args:
        weight: ``[O, I/g, 1, 1]``.
        filters: ``[O, kh, kw]``, see `frequency_filters`.

    Returns:
        ``[O, I/g, kh, kw]``.
    """
    return weight * filters[:, None]


def pointwise_kxk(pointwise: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """1 x 1 convolution followed by a k x k one, both with the same groups (DBB, transform III).

    Args:
        pointwise: ``[g * J, I/g, 1, 1]``, with J inner channels per group.
        weight: ``[O, J, kh, kw]``.
        groups: g.

    Returns:
        ``[O, I/g, kh, kw]``, in channels-last memory: the result of one product per group.
    """
    out_channels, inner, kh, kw = weight.shape
    # With the summed axis last, kernel positions are rows like output channels: all in one GEMM,
    # at no copy for a weight that lies in channels-last memory.
    rows = weight.permute(0, 2, 3, 1).reshape(groups, -1, inner)
    product = torch.bmm(rows, pointwise.reshape(groups, inner, -1))
    return product.view(out_channels, kh, kw, -1).permute(0, 3, 1, 2)


def depthwise_separable(depthwise: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Depthwise k x k convolution, m outputs per channel, followed by a 1 x 1 one (OREPA).

    Args:
        depthwise: ``[I, m, kh, kw]``, as a convolution of I groups ``[I * m, 1, kh, kw]``.
        weight: ``[O, I/g * m, 1, 1]``, the pointwise convolution.
        groups: g, of the pointwise convolution.

    Returns:
        ``[O, I/g, kh, kw]``.
    """
    in_channels, multiplier, kh, kw = depthwise.shape
    out_channels, fan = weight.shape[0], in_channels // groups
    # Input channels are the batch: each needs an [O/g, m] by [m, kh * kw] product of its own.
    left = weight.reshape(groups, out_channels // groups, fan, multiplier).transpose(1, 2)
    right = depthwise.reshape(groups, fan, multiplier, kh * kw)
    return torch.matmul(left, right).transpose(1, 2).reshape(out_channels, fan, kh, kw)


def branch_kernel(
    name: str, parameters: Mapping[str, Tensor], kernel_size: Sequence[int], groups: int = 1
) -> Tensor:
    """Equivalent kernel of one branch, before its gate.

    Args:
        name: one of `gpd_cli.branches.EXTRA_BRANCHES`.
        parameters: its tensors, by the names that the branch's function gives them.
        kernel_size: (kh, kw).
        groups: groups of the layer.

    Returns:
        ``[O, I/g, kh, kw]``, in whatever memory layout came cheapest.
    """
    weight = parameters["weight"]
    match name:
        case "1x1" | "1xk" | "kx1":
            return centred(weight, kernel_size)
        case "1x1_kxk":
            return pointwise_kxk(parameters["pointwise"], weight, groups)
        case "1x1_avg":
            return pointwise_average(weight, kernel_size)
        case "frequency":
            filters = frequency_filters(
                weight.shape[0], kernel_size, dtype=weight.dtype, device=weight.device
            )
            return frequency_prior(weight, filters)
        case "depthwise_separable":
            return depthwise_separable(parameters["depthwise"], weight, groups)
    raise ValueError(f"no branch is named '{name}'")


def spatial_filters(
    names: Sequence[str],
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fixed filters of those among the branches that have them (`FILTERED_BRANCHES`).

    Args:
        names: branches, in the order in which `merge` will see them.
        out_channels: O.
        kernel_size: (kh, kw).
        dtype: of the result.
        device: of the result.

    Returns:
        ``[B, O, kh, kw]``: what each of the B branches makes of a pointwise weight of one.
    """
    ones = torch.ones(out_channels, 1, 1, 1, dtype=torch.float64)
    filters = [
        branch_kernel(name, {"weight": ones}, kernel_size).squeeze(1)
        for name in names
        if name in FILTERED_BRANCHES
    ]
    empty = ones.new_empty(0, out_channels, *kernel_size)
    stacked = torch.stack(filters) if filters else empty
    return stacked.to(device, dtype or torch.get_default_dtype())


def merge(
    kernel: Tensor,
    gates: Mapping[str, Tensor],
    parameters: Mapping[str, Mapping[str, Tensor]],
    filters: Tensor,
    groups: int = 1,
) -> Tensor:
    """Merge gated branches into the main kernel: ``kernel[o] + sum_b gate_b[o] * branch_b[o]``.

    The same sum as over `branch_kernel`, with fewer passes over tensors of the kernel's size:
    gates multiply weights rather than kernels, and the branches with a fixed spatial filter are
    taken together. Under autocast the products may run in lower precision, but the sum is taken in
    the main kernel's, so that with zero gates the main kernel comes out to the last bit.

    Args:
        kernel: the main kernel, ``[O, I/g, kh, kw]``.
        gates: per branch, ``[O]``; the order is that of the sum.
        parameters: per branch, its tensors by name (see `branch_kernel`).
        filters: ``[B, O, kh, kw]``, `spatial_filters` of the same names.
        groups: groups of the layer.

    Returns:
        The merged kernel, of the main kernel's shape, dtype and memory layout; the main kernel
        itself where there is no branch.
    """
    terms = []
    filtered = [name for name in gates if name in FILTERED_BRANCHES]
    if filtered:
        gated = torch.stack([gates[name] for name in filtered])[:, :, None, None] * filters
        weights = torch.stack([parameters[name]["weight"].flatten(1) for name in filtered], dim=2)
        # Per output channel, [I/g, B] by [B, kh * kw]: nothing but the sum is of the kernel's size.
        product = torch.bmm(weights, gated.flatten(2).transpose(0, 1))
        terms.append(product.view(kernel.shape))
    for name, gate in gates.items():
        if name not in FILTERED_BRANCHES:
            tensors = dict(parameters[name])
            tensors["weight"] = tensors["weight"] * gate[:, None, None, None]
            terms.append(branch_kernel(name, tensors, kernel.shape[2:], groups))
    if not terms:
        return kernel
    merged = kernel + terms[0]
    for term in terms[1:]:
        merged += term
    return merged
