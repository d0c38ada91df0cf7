"""Branch algebra: the kernel of the one convolution that equals several layers in a row.

No branch has a bias, a norm or an activation, so a branch is linear in its input and its kernel is
exact for any stride, padding and dilation (DBB, Ding et al., CVPR 2021; OREPA, Hu et al., CVPR
2022).

Tensors have the shapes of convolution weights. With O output channels, I input channels, g groups
and kernel kh x kw, the equivalent kernel is ``[O, I/g, kh, kw]``.
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
        weight: ``[O, I/g, h, w]`` with each side either 1 or the kernel's.
        kernel_size: (kh, kw); the centre of an even side is its lower middle, ``(k - 1) // 2``.

    Returns:
        ``[O, I/g, kh, kw]``, zero elsewhere.

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
    """Kernel that copies one input channel per output (RepVGG's identity branch).

    With a stride, the positions that the stride keeps are copied.

    Args:
        channels: ``[O]``, for each output the input channel within the group.
        kernel_shape: ``[O, I/g, kh, kw]``.
        dtype: dtype of the result.

    Returns:
        ``[O, I/g, kh, kw]``: one at the centre of the chosen channels, zero elsewhere.

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
        deviation: any shape that is rows of ``size`` numbers in memory; the identity is repeated
            for every further ``size`` rows.
        size: number of rows and columns of the identity.

    Returns:
        A tensor of the same shape.

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
    """1 x 1 convolution followed by average pooling (DBB, transforms III and V).

    Args:
        weight: ``[O, I/g, 1, 1]``.
        kernel_size: (kh, kw), the window of the pooling, which counts padding.

    Returns:
        ``[O, I/g, kh, kw]``, a view of one value per channel pair.

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

    The first half of the channels varies along the height, the second along the width;
    neighbours differ in frequency. OREPA lets the frequency grow with the channel, and there the
    filter of every odd multiple of the kernel's side is zero, so that such a channel never learns.
    Cycling through ``0 .. k - 1`` gives the same filters, up to their sign, without the dead ones.

    Args:
        out_channels: O.
        kernel_size: (kh, kw).
        growing: let the frequency grow, dead filters and all, as OREPA and the paper's authors do.
        dtype: dtype of the result.
        device: device of the result.

    Returns:
        ``[O, kh, kw]``.
    """
    kh, kw = kernel_size
    half = (out_channels + 1) // 2

    def basis(size: int, first: float, channels: int) -> Tensor:
        frequency = torch.arange(channels, dtype=torch.float64) + first
        if not growing:
            frequency = frequency % size
        position = torch.arange(size, dtype=torch.float64) + 0.5
        return torch.cos(torch.outer(frequency, position) * (math.pi / size))

    # OREPA's second half counts from O / 2, which is no whole number where O is odd.
    second = half + 1 - out_channels / 2 if growing else 1
    vertical = basis(kh, 1, half)[:, :, None].expand(-1, kh, kw)
    horizontal = basis(kw, second, out_channels - half)[:, None, :].expand(-1, kh, kw)
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

    Example:
        >>> images = torch.randn(1, 2, 5, 5)
        >>> pointwise, weight = torch.randn(4, 2, 1, 1), torch.randn(3, 4, 3, 3)
        >>> in_a_row = F.conv2d(F.conv2d(images, pointwise), weight)
        >>> merged = F.conv2d(images, pointwise_kxk(pointwise, weight))
        >>> torch.allclose(merged, in_a_row, atol=1e-4)
        True
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
        groups: g, the groups of the pointwise convolution.

    Returns:
        ``[O, I/g, kh, kw]``.

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
    # Input channels are the batch axis of products [O/g, m] by [m, kh * kw].
    left = weight.reshape(groups, out_channels // groups, fan, multiplier).transpose(1, 2)
    right = depthwise.reshape(groups, fan, multiplier, kh * kw)
    return torch.matmul(left, right).transpose(1, 2).reshape(out_channels, fan, kh, kw)


def expandnet(first: Tensor, middle: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """1 x 1, k x k and 1 x 1 convolutions in a row, with the same groups (ExpandNets).

    Linear factors of one convolution, strategy CL of Guo et al., NeurIPS 2020.

    Args:
        first: ``[g * Q, I/g, 1, 1]``, with Q inner channels per group.
        middle: ``[g * P, Q, kh, kw]``, with P inner channels per group.
        weight: ``[O, P, 1, 1]``.
        groups: g.

    Returns:
        ``[O, I/g, kh, kw]``, in channels-last memory.
    """
    (out_channels, inner), (kh, kw) = weight.shape[:2], middle.shape[2:]
    # Rows of the product in channels-last memory are contiguous: no copy before the next product.
    rows = pointwise_kxk(first, middle, groups).permute(0, 2, 3, 1).reshape(groups, inner, -1)
    product = torch.bmm(weight.reshape(groups, -1, inner), rows)
    return product.view(out_channels, kh, kw, -1).permute(0, 3, 1, 2)


def linear_factors(square: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Two linear layers in a row, the square one on the narrower side (OREPA's 1 x 1 block).

    Args:
        square: ``[g * m, m]``, with m the smaller of O/g and I/g: the first layer where m is I/g,
            else the last layer.
        weight: ``[O, I/g]``, or ``[O, I/g, 1, 1]`` for a 1 x 1 convolution.
        groups: g.

    Returns:
        A tensor of the weight's shape.

    Example:
        >>> square, weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[5.0, 7.0]] * 3)
        >>> linear_factors(square, weight)[0]  # the square layer swaps the two inputs
        tensor([7., 5.])
    """
    fan, size = weight.shape[1], square.shape[1]
    factor, matrix = square.view(groups, size, size), weight.reshape(groups, -1, fan)
    product = torch.bmm(matrix, factor) if size == fan else torch.bmm(factor, matrix)
    return product.view(weight.shape)
