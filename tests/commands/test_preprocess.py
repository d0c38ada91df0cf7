"""Preprocessing as a module agrees with timm's transforms on Pillow's images."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from gpd_cli.commands.exports.preprocess import Prepare

SIZES = [
    ((97, 131), (32, 32), 0.875),
    ((300, 211), (96, 96), 0.9),
    ((50, 50), (32, 32), 1.0),
    ((20, 27), (32, 32), 0.9),
    ((97, 131), (32, 48), 0.875),
    ((300, 211), (32, 48), 1.0),
    ((60, 47), (40, 24), 0.9),
    ((15, 90), (40, 24), 0.875),
]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("image", "size", "crop_pct"), SIZES)
def test_pixels_are_those_of_timm(
    image: tuple[int, int], size: tuple[int, int], crop_pct: float, interpolation: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*image, 3), dtype=np.uint8)
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": interpolation}
    prepare = create_transform(input_size=(3, *size), crop_pct=crop_pct, **plain)
    expected = prepare(Image.fromarray(pixels)) * 255
    module = Prepare(size, crop_pct=crop_pct, **plain)
    difference = (module(torch.tensor(pixels)[None])[0] * 255 - expected).abs()
    assert difference.max() < 1.01  # one byte, where a sum lies between two
    assert (difference > 0.5).float().mean() < 0.05


def test_normalization_alone_keeps_the_size() -> None:
    pixels = torch.randint(256, (2, 5, 7, 1), dtype=torch.uint8)
    prepared = Prepare((5, 7), [0.5], [0.25])(pixels)
    torch.testing.assert_close(prepared, (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
