"""Preprocessing as a module that can be exported: resize as in Pillow, center crop, normalization.

Resizing multiplies the image by one matrix per axis. The matrices are computed by plain tensor
operations, so that every exporter can convert them, for images of any size. The result follows
Pillow: the support of the filter grows with the scale, the weights sum to one, and pixels are
rounded to bytes between the two passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

FILTERS = ("bilinear", "bicubic", "lanczos")
"""Interpolations that the module supports.

Pillow's "nearest" is not among them: where two pixels are equally near, Pillow chooses by the
rounding errors that it has summed up so far.
"""
_CUBIC = -0.5  # parameter `a` of Pillow's bicubic filter


class Prepare(nn.Module):
    """Turn the bytes of Pillow images into the normalized images that a network was trained on.

    Args:
        size: height and width of the network's images, in pixels.
        mean: mean of each channel, for pixel values in [0, 1].
        std: standard deviation of each channel, for pixel values in [0, 1].
        crop_pct: fraction of the resized image's edges that the center crop keeps, as in timm; None
            if images already have the size of the network's images, and are not resized.
        interpolation: filter for resizing, one of `FILTERS`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        crop_pct: float | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        self.size = size
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Convert bytes ``[B, H, W, C]`` to normalized images ``[B, C, *size]``."""
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        if self.crop_pct is not None:
            pixels = self._resized(pixels)
        return (pixels / 255 - self.mean) / self.std

    def _resized(self, pixels: Tensor) -> Tensor:
        assert self.crop_pct is not None
        edges = [math.floor(side / self.crop_pct) for side in self.size]
        places = [_positions(pixels, axis) for axis in (2, 3)]
        lengths = [place[-1] + 1 for place in places]
        # The image is resized to the smallest size that covers both edges, in the way of timm. For
        # a square crop, the shorter side gets the length of the edge, and the other side is rounded
        # down. For any other crop, both sides are divided by the smaller ratio of side to edge, and
        # rounded to the nearest integer.
        is_square = edges[0] == edges[1]
        shrunk = [length / edge for length, edge in zip(lengths, edges, strict=True)]
        shorter, ratio = torch.minimum(*lengths), torch.minimum(*shrunk)
        matrices = []
        for side, edge, place, length in zip(self.size, edges, places, lengths, strict=True):
            resized = torch.round(length / ratio)
            if is_square:
                resized = torch.floor(edge * length / shorter)
            extra = resized - side
            # The crop starts at half of the excess, rounded half to even as in torchvision's
            # CenterCrop.
            half = torch.floor(extra / 2)
            odd_half = half - 2 * torch.floor(half / 2)
            start = torch.floor((extra + odd_half) / 2)
            rows = torch.arange(side, dtype=place.dtype, device=place.device) + start
            matrices.append(_matrix(rows, place, length / resized, self.interpolation))
        down, across = (matrix.to(pixels.dtype) for matrix in matrices)
        pixels = _bytes(pixels @ across.T)
        return _bytes(down @ pixels)


def _positions(pixels: Tensor, axis: int) -> Tensor:
    """The positions 0, 1, 2, ... along an axis whose length the exporter does not know."""
    line = pixels.select(0, 0).select(0, 0).select(3 - axis, 0)
    return torch.ones_like(line, dtype=torch.float64).cumsum(0) - 1


def _matrix(rows: Tensor, columns: Tensor, scale: Tensor, interpolation: str) -> Tensor:
    """The matrix that resizes along one axis, with Pillow's filters.

    Args:
        rows: positions of the output pixels, ``[R]``.
        columns: positions of the input pixels, ``[C]``.
        scale: number of input pixels per output pixel, a scalar.
        interpolation: one of `FILTERS`.

    Returns:
        Weights of the input pixels for each output pixel, ``[R, C]``.
    """
    centers = (rows + 0.5)[:, None] * scale
    # When the image shrinks, the filter is stretched by the scale. It is zero beyond its radius.
    distance = ((columns + 0.5)[None] - centers).abs() / scale.clamp(min=1.0)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0.0)
    elif interpolation == "bicubic":
        a = _CUBIC
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * a
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    else:
        angle = distance.clamp(min=1e-9) * math.pi
        weights = 3 * torch.sin(angle) * torch.sin(angle / 3) / angle**2
        weights = torch.where(distance < 3, weights, 0.0)
    return weights / weights.sum(1, keepdim=True)


def _bytes(pixels: Tensor) -> Tensor:
    """Round to integers from 0 to 255 as Pillow does, with halves rounded up."""
    return torch.floor(pixels + 0.5).clamp(0, 255)
