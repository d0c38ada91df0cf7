"""Operations of timm's augmentation policies that Pillow refuses, replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from PIL import Image


def allow_all_settings(steps: Any) -> None:
    """Let augmentation policies run at every magnitude and with every interpolation.

    RandAugment posterizes to zero bits at its greatest magnitude, with ``rand-m9-mstd0.5-inc1`` for
    one image in several hundred, and Pillow 13 refuses to. Pillow resizes images with Lanczos but
    does not rotate, shear or translate them with it: these operations are bicubic then.

    Args:
        steps: steps of timm's transform; operations in its policies are changed in place.
    """
    for step in steps:
        for operation in _operations(step):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = partial(_posterize, operation.aug_fn)
            if operation.kwargs.get("resample") == Image.Resampling.LANCZOS:
                operation.kwargs["resample"] = Image.Resampling.BICUBIC


def _operations(step: Any) -> Iterator[Any]:
    """The operations of RandAugment, AugMix or AutoAugment, which has sequences of operations."""
    yield from getattr(step, "ops", ())
    for pair in getattr(step, "policy", ()):
        yield from pair


def _posterize(
    posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any
) -> Image.Image:
    # Beyond magnitude 10 (mmax) the number of bits is negative, which gave black as well.
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
