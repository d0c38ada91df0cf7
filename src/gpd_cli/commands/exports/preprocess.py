"""Preprocessing as a module: resize as Pillow does, center crop, normalization.

Resizing is a product with one matrix per axis, made of plain tensor operations. So every exporter
can convert it, for images of any size, and it follows Pillow for every filter: support that grows
with the scale, weights that sum to one, and bytes between the two passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

FILTERS = {"nearest": 0.0, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""Interpolations that can be put inside, and the radius of their filter in pixels."""
_CUBIC = -0.5  # Pillow's


class Prepare(nn.Module):
    """Turn bytes as Pillow has them into what a network was trained on.

    Args:
        size: height and width that the network sees.
        mean: per channel, of values in [0, 1].
        std: per channel, likewise.
        crop_pct: share of the resized image's shorter edge that the center crop keeps, as timm
            means it; None where images come in the size that the network sees.
        interpolation: one of `FILTERS`.
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
        """Bytes ``[B, H, W, C]`` to normalized images ``[B, C, *size]``."""
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        if self.crop_pct is not None:
            pixels = self._resized(pixels)
        return (pixels / 255 - self.mean) / self.std

    def _resized(self, pixels: Tensor) -> Tensor:
        assert self.crop_pct is not None
        edges = [math.floor(side / self.crop_pct) for side in self.size]
        places = [_positions(pixels, axis) for axis in (2, 3)]
        lengths = [place[-1] + 1 for place in places]
        # The image is as small as covers both edges: as timm has it, a square one by its shorter
        # side, the other rounded down, and any other by the smaller ratio, both rounded.
        is_square = edges[0] == edges[1]
        shrunk = [length / edge for length, edge in zip(lengths, edges, strict=True)]
        shorter, ratio = torch.minimum(*lengths), torch.minimum(*shrunk)
        matrices = []
        for side, edge, place, length in zip(self.size, edges, places, lengths, strict=True):
            resized = torch.round(length / ratio)
            if is_square:
                resized = torch.floor(edge * length / shorter)
            extra = resized - side
            # Half of the rest, rounded to even, as torchvision's CenterCrop has it.
            half = torch.floor(extra / 2)
            odd_half = half - 2 * torch.floor(half / 2)
            start = torch.floor((extra + odd_half) / 2)
            rows = torch.arange(side, dtype=place.dtype, device=place.device) + start
            matrices.append(_matrix(rows, place, length / resized, self.interpolation))
        down, across = (matrix.to(pixels.dtype) for matrix in matrices)
        pixels = _bytes(pixels @ across.T)
        return _bytes(down @ pixels)


def _positions(pixels: Tensor, axis: int) -> Tensor:
    """0, 1, 2, ... along an axis whose length the exporter does not know."""
    line = pixels.select(0, 0).select(0, 0).select(3 - axis, 0)
    return torch.ones_like(line, dtype=torch.float64).cumsum(0) - 1


def _matrix(rows: Tensor, columns: Tensor, scale: Tensor, interpolation: str) -> Tensor:
    """Weights of input pixels for output pixels, ``[len(rows), len(columns)]`` (Pillow).

    Args:
        rows: output pixels.
        columns: input pixels.
        scale: input pixels per output pixel.
        interpolation: one of `FILTERS`.
    """
    centers = (rows + 0.5)[:, None] * scale
    if interpolation == "nearest":
        return (columns[None] == torch.floor(centers)).to(columns.dtype)
    # Filters widen where pixels are dropped; beyond its radius a filter is zero.
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
    """Rounded as Pillow rounds, halves up."""
    return torch.floor(pixels + 0.5).clamp(0, 255)
