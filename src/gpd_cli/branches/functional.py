"""Branch algebra: functions that turn several layers in a row into the kernel of one convolution.

No branch has a bias, a norm or an activation. So a branch is linear in its input, and the
equivalent kernel is exact for any stride, padding and dilation (DBB, Ding et al., CVPR 2021; OREPA,
Hu et al., CVPR 2022).

Tensors have the shapes of convolution weights: with O output channels, I input channels, g groups
and kernels of kh x kw, the equivalent kernel is ``[O, I/g, kh, kw]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def centred(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Place a smaller kernel at the centre of a larger one (DBB, transform VI; ACNet).

    Args:
        weight: the smaller kernel, ``[O, I/g, h, w]``, where h is 1 or kh, and w is 1 or kw.
        kernel_size: (kh, kw) of the larger kernel; the centre of a side of even length k is at
            index ``(k - 1) // 2``.

    Returns:
        The larger kernel, ``[O, I/g, kh, kw]``, zero around the smaller one.

    Example:
        >>> centred(torch.ones(1, 1, 1, 1), (3, 3))[0, 0]
        tensor([[0., 0., 0.],
                [0., 1., 0.],
                [0., 0., 0.]])
    """
    padding: list[int] = []
    for size, inner in zip(reversed(kernel_size), reversed(weight.shape[2:]), strict=True):
        before = (size - inner) // 2
        padding += [before, size - inner - before]
    return F.pad(weight, padding)


def identity_kernel(
    channels: Tensor,
    kernel_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Make a kernel that copies one input channel to each output (RepVGG's identity branch).

    In a layer with a stride, only the positions that the stride keeps are copied.

    Args:
        channels: for each output the index of its input channel within the group, ``[O]``.
        kernel_shape: shape of the result, ``[O, I/g, kh, kw]``.
        dtype: dtype of the result.

    Returns:
        The kernel, ``[O, I/g, kh, kw]``: one at the centre of the chosen channels, zero elsewhere.

    Example:
        >>> identity_kernel(torch.tensor([1, 0]), (2, 2, 1, 1)).flatten(1)
        tensor([[0., 1.],
                [1., 0.]])
    """
    ones = F.one_hot(channels, kernel_shape[1]).to(dtype or torch.get_default_dtype())
    return centred(ones[:, :, None, None], kernel_shape[2:])


def from_identity(deviation: Tensor, size: int) -> Tensor:
    """Add the identity to a deviation, so that weight decay acts on the deviation only (DBB).

    Args:
        deviation: a tensor of any shape, whose elements in order are taken as rows of ``size``
            numbers. An identity is added to each block of ``size`` rows.
        size: number of rows and columns of the identity.

    Returns:
        The sum, of the shape of ``deviation``.

    Example:
        >>> from_identity(torch.zeros(4, 2), 2)
        tensor([[1., 0.],
                [0., 1.],
                [1., 0.],
                [0., 1.]])
    """
    eye = torch.eye(size, dtype=deviation.dtype, device=deviation.device)
    return (deviation.reshape(-1, size, size) + eye).view(deviation.shape)


def pointwise_average(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Merge a 1 x 1 convolution followed by average pooling (DBB, transforms III and V).

    Args:
        weight: the weight of the 1 x 1 convolution, ``[O, I/g, 1, 1]``.
        kernel_size: (kh, kw), the window of the pooling, which includes padding in its averages.

    Returns:
        The equivalent kernel, ``[O, I/g, kh, kw]``: a view in which all positions of a kernel share
        one value in memory.

    Example:
        >>> pointwise_average(torch.full((1, 1, 1, 1), 8.0), (2, 2))[0, 0]
        tensor([[2., 2.],
                [2., 2.]])
    """
    kh, kw = kernel_size
    return (weight / (kh * kw)).expand(-1, -1, kh, kw)


def frequency_filters(
    out_channels: int,
    kernel_size: Sequence[int],
    *,
    growing: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fixed filters of the frequency-prior branch: one DCT-II basis vector per output channel.

    In the first half of the channels the filters vary along the height, in the second half along
    the width, and neighbouring channels have different frequencies. By default the frequencies
    cycle through ``0 .. k - 1``, with k the side of the kernel. In OREPA the frequencies grow with
    the channel; there a filter whose frequency is an odd multiple of k is zero, so that its channel
    never learns. All other filters are the same in both cases, up to their sign.

    Args:
        out_channels: number of output channels, O.
        kernel_size: (kh, kw).
        growing: whether frequencies grow with the channel, as in OREPA and in the code of the
            paper's authors, with filters that are zero.
        dtype: dtype of the result.
        device: device of the result.

    Returns:
        The filters, ``[O, kh, kw]``.
    """
    kh, kw = kernel_size
    half = (out_channels + 1) // 2

    def basis(size: int, first: float, channels: int) -> Tensor:
        frequency = torch.arange(channels, dtype=torch.float64) + first
        if not growing:
            frequency = frequency % size
        position = torch.arange(size, dtype=torch.float64) + 0.5
        return torch.cos(torch.outer(frequency, position) * (math.pi / size))

    # In OREPA the frequencies of the second half begin at O / 2, which is no integer if O is odd.
    second = half + 1 - out_channels / 2 if growing else 1
    vertical = basis(kh, 1, half)[:, :, None].expand(-1, kh, kw)
    horizontal = basis(kw, second, out_channels - half)[:, None, :].expand(-1, kh, kw)
    return torch.cat([vertical, horizontal]).to(device, dtype or torch.get_default_dtype())


def frequency_prior(weight: Tensor, filters: Tensor) -> Tensor:
    """Multiply a 1 x 1 weight by a fixed filter per output channel (OREPA's frequency prior).

    Args:
        weight: the trainable weight, ``[O, I/g, 1, 1]``.
        filters: the fixed filters, ``[O, kh, kw]``, see `frequency_filters`.

    Returns:
        The equivalent kernel, ``[O, I/g, kh, kw]``.
    """
    return weight * filters[:, None]


def pointwise_kxk(pointwise: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Merge a 1 x 1 convolution followed by a k x k one (DBB, transform III).

    Both convolutions have the same number of groups. The result takes one matrix product per group.

    Args:
        pointwise: the weight of the 1 x 1 convolution, ``[g * J, I/g, 1, 1]``, with J inner
            channels per group.
        weight: the weight of the k x k convolution, ``[O, J, kh, kw]``.
        groups: number of groups, g.

    Returns:
        The equivalent kernel, ``[O, I/g, kh, kw]``, in channels-last memory.

    Example:
        >>> images = torch.randn(1, 2, 5, 5)
        >>> pointwise, weight = torch.randn(4, 2, 1, 1), torch.randn(3, 4, 3, 3)
        >>> in_a_row = F.conv2d(F.conv2d(images, pointwise), weight)
        >>> merged = F.conv2d(images, pointwise_kxk(pointwise, weight))
        >>> torch.allclose(merged, in_a_row, atol=1e-4)
        True
    """
    out_channels, inner, kh, kw = weight.shape
    # With the summed axis last, kernel positions are rows like output channels, so one GEMM per
    # group computes all of them. A weight in channels-last memory is not copied.
    rows = weight.permute(0, 2, 3, 1).reshape(groups, -1, inner)
    product = torch.bmm(rows, pointwise.reshape(groups, inner, -1))
    return product.view(out_channels, kh, kw, -1).permute(0, 3, 1, 2)


def depthwise_separable(depthwise: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Merge a depthwise k x k convolution followed by a 1 x 1 one (OREPA).

    Args:
        depthwise: the weight of the depthwise convolution, ``[I, m, kh, kw]``, with m outputs per
            input channel; a convolution with I groups has the same weight as
            ``[I * m, 1, kh, kw]``.
        weight: the weight of the 1 x 1 convolution, ``[O, I/g * m, 1, 1]``.
        groups: number of groups of the 1 x 1 convolution, g.

    Returns:
        The equivalent kernel, ``[O, I/g, kh, kw]``.

    Example:
        >>> images = torch.randn(1, 2, 5, 5)
        >>> depthwise, weight = torch.randn(2, 3, 3, 3), torch.randn(4, 6, 1, 1)
        >>> in_a_row = F.conv2d(F.conv2d(images, depthwise.reshape(6, 1, 3, 3), groups=2), weight)
        >>> merged = F.conv2d(images, depthwise_separable(depthwise, weight))
        >>> torch.allclose(merged, in_a_row, atol=1e-4)
        True
    """
    in_channels, multiplier, kh, kw = depthwise.shape
    out_channels, fan = weight.shape[0], in_channels // groups
    # Batched matrix products of [O/g, m] and [m, kh * kw], one for each input channel.
    left = weight.reshape(groups, out_channels // groups, fan, multiplier).transpose(1, 2)
    right = depthwise.reshape(groups, fan, multiplier, kh * kw)
    return torch.matmul(left, right).transpose(1, 2).reshape(out_channels, fan, kh, kw)


def expandnet(first: Tensor, middle: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Merge a 1 x 1, a k x k and a 1 x 1 convolution in a row (ExpandNets).

    These are the linear factors of one convolution in strategy CL of Guo et al., NeurIPS 2020. All
    three convolutions have the same number of groups.

    Args:
        first: the weight of the first convolution, ``[g * Q, I/g, 1, 1]``, with Q output channels
            per group.
        middle: the weight of the k x k convolution, ``[g * P, Q, kh, kw]``, with P output channels
            per group.
        weight: the weight of the last convolution, ``[O, P, 1, 1]``.
        groups: number of groups, g.

    Returns:
        The equivalent kernel, ``[O, I/g, kh, kw]``, in channels-last memory.
    """
    (out_channels, inner), (kh, kw) = weight.shape[:2], middle.shape[2:]
    # The product is in channels-last memory, so its rows are views for the next product, no copies.
    rows = pointwise_kxk(first, middle, groups).permute(0, 2, 3, 1).reshape(groups, inner, -1)
    product = torch.bmm(weight.reshape(groups, -1, inner), rows)
    return product.view(out_channels, kh, kw, -1).permute(0, 3, 1, 2)


def linear_factors(square: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Merge two linear layers in a row (OREPA's 1 x 1 block).

    One of the two is square: it comes first where the layer has no more inputs than outputs (per
    group), and last otherwise.

    Args:
        square: the weight of the square layer, ``[g * m, m]``, with m the smaller of O/g and I/g.
        weight: the weight of the other layer, ``[O, I/g]``, or ``[O, I/g, 1, 1]`` for a 1 x 1
            convolution.
        groups: number of groups, g.

    Returns:
        The equivalent weight, of the shape of ``weight``.

    Example:
        >>> square, weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[5.0, 7.0]] * 3)
        >>> linear_factors(square, weight)[0]  # the square layer swaps the two inputs
        tensor([7., 5.])
    """
    fan, size = weight.shape[1], square.shape[1]
    factor, matrix = square.view(groups, size, size), weight.reshape(groups, -1, fan)
    product = torch.bmm(matrix, factor) if size == fan else torch.bmm(factor, matrix)
    return product.view(weight.shape)
