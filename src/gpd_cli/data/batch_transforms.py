"""Augmentation and normalization of whole batches of decoded images, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Draws(NamedTuple):
    """Random crops and flips for `N` images.

    Attributes:
        down: first row of each crop in the padded image, ``[N]``, int64.
        across: first column of each crop, ``[N]``, int64.
        flipped: whether each crop is mirrored, ``[N]``, bool.
    """

    down: Tensor
    across: Tensor
    flipped: Tensor

    def to(self, device: torch.device) -> Draws:
        """The same choices on another device."""
        return Draws(*(values.to(device) for values in self))

    def select(self, which: slice) -> Draws:
        """The choices for some of the images.

        Args:
            which: a slice of the images.
        """
        return Draws(*(values[which] for values in self))


def draw(count: int, padding: int, hflip: float, generator: torch.Generator) -> Draws:
    """Draw random crops and flips for images.

    The choices are drawn on the CPU, so that they are the same for every device.

    Args:
        count: number of images `N`.
        padding: number of pixels of padding on each side; with 0, the crop is the whole image.
        hflip: probability of a flip, in [0, 1].
        generator: a random generator on the CPU.
    """
    corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flipped = torch.rand(count, generator=generator) < hflip
    return Draws(corners[0], corners[1], flipped)


def crop_and_flip(images: Tensor, padding: int, draws: Draws) -> Tensor:
    """Pad images with zeros, crop them to their former size, and mirror them, as drawn.

    Args:
        images: images of any type, ``[B, C, H, W]``.
        padding: number of pixels of padding on each side.
        draws: the choices for the `B` images, on the device of the images.

    Returns:
        The augmented images, ``[B, C, H, W]``, of the same type.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4) if padding else images
    rows = draws.down.view(-1, 1) + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    mirrored = torch.where(draws.flipped.view(-1, 1), width - 1 - columns, columns)
    columns = draws.across.view(-1, 1) + mirrored  # [B, W]
    # With one index per pixel, crop and flip are a single gather.
    places = rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)  # [B, H, W]
    places = places.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, places).view(batch, channels, height, width)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert images of bytes to normalized float32 images.

    Args:
        images: images of bytes, ``[B, C, H, W]``.
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].

    Returns:
        The normalized images in float32, ``[B, C, H, W]``.
    """
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    values = images.float().div_(255)
    device = images.device
    return values.sub_(shift.to(device)).div_(scale.to(device))
