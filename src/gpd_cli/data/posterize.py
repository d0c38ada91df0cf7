"""Posterizing to no bits at all, which policies of timm ask for and Pillow 13 refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from PIL import Image


def allow_no_bits(steps: Any) -> None:
    """Let the policies among some steps of augmentation posterize to no bits, as before Pillow 13.

    RandAugment does so at its greatest magnitude: with ``rand-m9-mstd0.5-inc1`` for one image in
    several hundred.

    Args:
        steps: of timm's transform; their operations are changed in place.
    """
    for step in steps:
        for operation in _operations(step):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = partial(_posterize, operation.aug_fn)


def _operations(step: Any) -> Iterator[Any]:
    """Those of RandAugment and AugMix, and those of AutoAugment, which has pairs of them."""
    yield from getattr(step, "ops", ())
    for pair in getattr(step, "policy", ()):
        yield from pair


def _posterize(
    posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any
) -> Image.Image:
    # Beyond magnitude 10 (mmax) the number is negative, which was black as well.
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
