"""Conversion of images to normalized tensors, with timm's transforms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torchvision import transforms

from gpd_cli.data.policies import allow_all_settings
from gpd_cli.errors import DataError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Erasing = Literal["pixel", "rand", "const"]
Transform = Callable[[Any], Any]
_LARGEST = 2**14  # largest height and width of an image, in pixels
_LEAST_CROP = 0.05  # smallest crop_pct, with which images are resized to 20 times the crop

# torchvision does not accept interpolations by name.
_MODES = {
    "nearest": transforms.InterpolationMode.NEAREST,
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
    "lanczos": transforms.InterpolationMode.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor ``[C, H, W]``.

    Args:
        image_size: height and width of the tensor, in pixels.
        in_chans: number of channels, 1 (grey) or 3 (RGB).
        mean: mean of each channel, for values in [0, 1]; by default ImageNet's for RGB and 0.5 for
            grey.
        std: standard deviation of each channel, for values in [0, 1]; by default ImageNet's for RGB
            and 0.5 for grey.
        interpolation: interpolation for resizing.
        crop_pct: in evaluation, the fraction of the resized image's edge that the center crop
            keeps.
        no_aug: whether to train without augmentation, on resized and center-cropped images.
        scale: least and greatest area of the random crop, as fractions of the image's area.
        ratio: least and greatest aspect ratio of the random crop.
        crop_padding: if positive, images are padded by this number of pixels on each side and
            cropped at random, without rescaling.
        hflip: probability of a horizontal flip.
        color_jitter: strength of random changes of brightness, contrast and saturation.
        auto_augment: name of an augmentation policy of timm; None for none.
        re_prob: probability of random erasing.
        re_mode: what fills an erased rectangle: noise (pixel), one random colour (rand) or the mean
            colour (const).
        re_count: largest number of erased rectangles per image.

    Raises:
        DataError: when a value is out of range, or statistics do not match the channels.
    """

    image_size: int = 32
    in_chans: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 0.875
    no_aug: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    re_mode: Erasing = "pixel"
    re_count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= _LARGEST:
            raise DataError(
                f"--data.image_size must be from 1 to {_LARGEST}, not {self.image_size}."
            )
        if not _LEAST_CROP <= self.crop_pct <= 1:
            raise DataError(
                f"--data.crop_pct must be from {_LEAST_CROP} to 1, not {self.crop_pct}."
            )
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            least, greatest = getattr(self, name)
            if not 0 < least <= greatest <= most:
                bound = " and at most 1" if most == 1 else ""
                raise DataError(
                    f"--data.{name} must be two numbers above 0{bound}, the smaller one first, not "
                    f"{list(getattr(self, name))}."
                )
        if not self.color_jitter >= 0:
            raise DataError(f"--data.color_jitter must be 0 or more, not {self.color_jitter}.")
        for name in ("hflip", "re_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"--data.{name} must be in [0, 1], not {getattr(self, name)}.")
        if not 0 <= self.crop_padding <= self.image_size:
            raise DataError(
                f"--data.crop_padding must be from 0 to --data.image_size ({self.image_size}), not "
                f"{self.crop_padding}."
            )
        if self.re_count < 1:
            raise DataError(f"--data.re_count must be 1 or more, not {self.re_count}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise DataError(
                    f"--data.{name} has {len(values)} values but the images have {self.in_chans} "
                    f"channels; give {self.in_chans} values, or change --data.in_chans."
                )
        if self.std is not None and not min(self.std) > 0:
            raise DataError(f"--data.std must be above 0, not {list(self.std)}.")

    @property
    def mode(self) -> str:
        """Pillow's image mode, L or RGB."""
        return "L" if self.in_chans == 1 else "RGB"

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, for values in [0, 1]."""
        grey = self.in_chans == 1
        return (
            self.mean or ((0.5,) if grey else IMAGENET_DEFAULT_MEAN),
            self.std or ((0.5,) if grey else IMAGENET_DEFAULT_STD),
        )

    def transform(self, training: bool) -> Transform:
        """The transform from Pillow images (of mode `mode`) to normalized tensors ``[C, H, W]``.

        Args:
            training: whether the transform is for training, and so may augment.

        Raises:
            DataError: when timm does not know the augmentation policy.
        """
        mean, std = self.statistics
        shared: dict[str, Any] = {
            "input_size": (self.in_chans, self.image_size, self.image_size),
            "interpolation": self.interpolation,
            "mean": mean,
            "std": std,
        }
        if self.no_aug or not training:
            return _compose(create_transform(**self._calm(training), **shared))
        padded = self.crop_padding > 0
        augmentations: dict[str, Any] = {
            # After pad-and-crop, timm's random resized crop has to take the whole image.
            "scale": (1.0, 1.0) if padded else self.scale,
            "ratio": (1.0, 1.0) if padded else self.ratio,
            "hflip": self.hflip,
            "color_jitter": self.color_jitter or None,
            "auto_augment": self.auto_augment,
            "re_prob": self.re_prob,
            "re_mode": self.re_mode,
            "re_count": self.re_count,
        }
        try:
            _check_policy(self.auto_augment)
            augment = create_transform(is_training=True, **augmentations, **shared)
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise DataError(
                f"timm does not know the augmentation '{self.auto_augment}'; set "
                "--data.auto_augment to a policy such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, "
                "original or 3a, or leave it out."
            ) from error
        allow_all_settings(augment.transforms)
        return _compose(*(self._padded_crop() if padded else ()), augment)

    def sizing(self, training: bool) -> Transform:
        """The first part of `transform`, before augmentation and normalization: only the resizing.

        The result converts Pillow images (of mode `mode`) to byte tensors ``[C, H, W]``.

        Args:
            training: whether the images are for training.
        """
        if training and not self.no_aug:
            return _compose(self._resize(), transforms.PILToTensor())
        size = (self.in_chans, self.image_size, self.image_size)
        # timm's prefetcher normalizes bytes itself, so that a transform made for it returns bytes.
        calm = create_transform(
            input_size=size,
            interpolation=self.interpolation,
            use_prefetcher=True,
            **self._calm(training),
        )
        return _compose(calm, torch.as_tensor)  # some versions of timm return arrays here

    def _calm(self, training: bool) -> dict[str, Any]:
        """Arguments of timm's `create_transform` for a transform without augmentation."""
        if training:
            return {"is_training": True, "no_aug": True}
        return {"crop_pct": self.crop_pct}

    def _resize(self) -> Transform:
        size = (self.image_size, self.image_size)
        resize: Transform = transforms.Resize(size, interpolation=_MODES[self.interpolation])
        return resize

    def _padded_crop(self) -> tuple[Transform, ...]:
        return (
            self._resize(),
            transforms.RandomCrop(self.image_size, padding=self.crop_padding),
        )


def _compose(*steps: Transform) -> Transform:
    composed: Transform = transforms.Compose(list(steps))
    return composed


def _check_policy(policy: str | None) -> None:
    """Check the parts of an augmentation policy, of which timm ignores those without a number.

    Args:
        policy: name of the policy, such as ``rand-m9-mstd0.5``; None for none.

    Raises:
        ValueError: when a part has no number and names no set of transforms.
    """
    kind, *parts = (policy or "").split("-")
    for part in parts:
        is_set = kind == "rand" and part.startswith("t")
        if not is_set and re.fullmatch(r"[a-z]+\d+(\.\d+)?", part) is None:
            raise ValueError(part)
