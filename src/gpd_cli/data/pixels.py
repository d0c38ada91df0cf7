"""Images of any kind as 8-bit grey or colour ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

_WIDE = ("I", "F")  # 32-bit integers and floating-point numbers
_PER_BYTE = 257  # 65535 / 255


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image, scaling values of more than 8 bits where Pillow would clip them to white.

    16-bit values are scaled from [0, 65535]. Of 32-bit ones the range is not known: floating-point
    values in [0, 1] are scaled, others are taken for 8-bit ones if they can be.

    Args:
        image: the image, as Pillow opened it.
        mode: Pillow's name of the channels wanted, L or RGB.

    Raises:
        ValueError: when the values lie beyond the range that would be taken for granted.
    """
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64) / _PER_BYTE, mode)
    if image.mode not in _WIDE:
        return image.convert(mode)
    values = np.asarray(image).astype(np.float64)
    # Older Pillows open 16-bit PNGs as 32-bit images.
    if image.format == "PNG":
        return _grey(values / _PER_BYTE, mode)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if image.mode == "F" and low >= 0 and high <= 1:
        return _grey(values * 255, mode)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"it has values from {low:g} to {high:g} in 32 bits, a range that is not known; save "
            "it with 8 or 16 bits"
        )
    return _grey(values, mode)


def _grey(values: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert(mode)
