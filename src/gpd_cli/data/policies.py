"""Replacement of operations in timm's augmentation policies that Pillow refuses to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from PIL import Image


def allow_all_settings(steps: Any) -> None:
    """Make augmentation policies work at every magnitude and with every interpolation.

    At its greatest magnitude, RandAugment posterizes images to zero bits, which Pillow 13 refuses;
    with ``rand-m9-mstd0.5-inc1`` this happens for one image in several hundred. And Pillow can
    resize images with the Lanczos filter, but cannot rotate, shear or translate them with it; these
    operations are made bicubic.

    Args:
        steps: steps of timm's transform; the operations of its policies are changed in place.
    """
    for step in steps:
        for operation in _operations(step):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = partial(_posterize, operation.aug_fn)
            if operation.kwargs.get("resample") == Image.Resampling.LANCZOS:
                operation.kwargs["resample"] = Image.Resampling.BICUBIC


def _operations(step: Any) -> Iterator[Any]:
    """Yield the operations of a policy: RandAugment, AugMix or AutoAugment.

    The policies of AutoAugment consist of sequences of operations.
    """
    yield from getattr(step, "ops", ())
    for pair in getattr(step, "policy", ()):
        yield from pair


def _posterize(
    posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any
) -> Image.Image:
    # Zero bits give a black image. Beyond magnitude 10 (mmax) the number of bits is negative, for
    # which earlier versions of Pillow gave a black image as well.
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
