"""Conversion of images of any kind to 8-bit grey or colour images."""

from __future__ import annotations

import numpy as np
from PIL import Image

_WIDE = ("I", "F")  # Pillow's modes for 32-bit integers and 32-bit floating-point numbers
_PER_BYTE = 257  # 65535 / 255


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits, scaling larger values, which Pillow would clip to white.

    16-bit values are scaled from [0, 65535] to [0, 255]. The range of 32-bit values is not known in
    advance: floating-point images with values in [0, 1] are scaled to [0, 255], and all others are
    taken as they are if their values lie in [0, 255].

    Args:
        image: the image as Pillow has opened it.
        mode: Pillow's name of the desired mode, L or RGB.

    Raises:
        ValueError: when 32-bit values lie beyond these ranges.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / _PER_BYTE, mode)
    if image.mode not in _WIDE:
        return image.convert(mode)
    values = np.asarray(image).astype(np.float64)
    # Older versions of Pillow open 16-bit PNG files as 32-bit images.
    if image.format == "PNG":
        return _grey(values / _PER_BYTE, mode)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if image.mode == "F" and low >= 0 and high <= 1:
        return _grey(values * 255, mode)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"its 32-bit values from {low:g} to {high:g} have no known range; save it with 8 or 16 "
            "bits"
        )
    return _grey(values, mode)


def _grey(values: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert(mode)
