"""scikit-learn's 1,797 handwritten digits, grey images of 8 x 8 pixels, held in memory."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from gpd_cli.data.transforms import Preprocessing

CLASSES = tuple(str(digit) for digit in range(10))
SPLITS = ("train", "validation", "test")
_EDGE = 8  # height and width of an image, in pixels
_HIGHEST = 16  # largest grey value
_HELD_OUT = 0.2  # fraction of the images in the validation split, and the same in the test split
# Settings of the preprocessing that have an effect on digits.
_EFFECTIVE = ("image_size", "in_chans", "mean", "std", "no_aug")


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Load one split of the digits.

    60 % of the images are for training, 20 % for validation and 20 % for testing. The splits are
    stratified by class, and always the same. The images come with scikit-learn (UCI, Optical
    Recognition of Handwritten Digits, test part), so nothing is downloaded.

    Args:
        split: train, validation or test.

    Returns:
        Images with values in [0, 1], ``[N, 1, 8, 8]``, and class numbers, ``[N]``.
    """
    # Imported here since the import is slow, and needed for this data set only.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    labels = data.target
    rest, test = train_test_split(
        range(len(labels)), test_size=_HELD_OUT, stratify=labels, random_state=0
    )
    train, validation = train_test_split(
        rest, test_size=_HELD_OUT / (1 - _HELD_OUT), stratify=labels[rest], random_state=0
    )
    rows = sorted({"train": train, "validation": validation, "test": test}[split])
    images = torch.from_numpy(data.images[rows]).float().unsqueeze(1) / _HIGHEST
    return images, torch.from_numpy(labels[rows]).long()


def ignored_settings(preprocessing: Preprocessing) -> list[str]:
    """Names of settings that differ from their defaults but have no effect on digits.

    Args:
        preprocessing: the settings.

    Returns:
        The names, in the order of the fields of `Preprocessing`.

    Example:
        >>> ignored_settings(Preprocessing(image_size=8, hflip=0.0, crop_padding=4))
        ['crop_padding', 'hflip']
    """
    chosen = {field.name: getattr(preprocessing, field.name) for field in fields(preprocessing)}
    # Settings from configurations may be lists where the defaults are tuples.
    chosen = {n: tuple(value) if isinstance(value, list) else value for n, value in chosen.items()}
    return [
        field.name
        for field in fields(preprocessing)
        if field.name not in _EFFECTIVE and chosen[field.name] != field.default
    ]


class DigitImages(Dataset[tuple[Tensor, Tensor]]):
    """Digits that are resized and normalized once, and read from memory in batches.

    In training, each image is shifted at random by up to one of its original 8 x 8 pixels. Other
    augmentations (flips, crops, colours) do not suit digits, and are left out.

    Args:
        images: images with values in [0, 1], ``[N, 1, 8, 8]``.
        labels: class numbers, ``[N]``.
        preprocessing: image size, channels, mean and std, and whether to augment.
        training: whether the images are for training.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, preprocessing: Preprocessing, training: bool
    ) -> None:
        size, channels = preprocessing.image_size, preprocessing.in_chans
        if size != _EDGE:
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        shift = training and not preprocessing.no_aug
        self._margin = -(-size // _EDGE) if shift else 0
        images = F.pad(images, [self._margin] * 4).expand(-1, channels, -1, -1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in preprocessing.statistics)
        self._images = (images - mean) / std
        self._labels = labels
        self._size = size

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Fetch all items of a batch at once, as pairs of image ``[C, H, W]`` and label."""
        rows = torch.tensor(indices)
        images = self._images[rows]
        if self._margin:
            images = self._shift(images)
        return list(zip(images.unbind(), self._labels[rows].unbind(), strict=True))

    def _shift(self, images: Tensor) -> Tensor:
        """Cut a random window out of each padded image, ``[B, C, H', W'] -> [B, C, H, W]``."""
        batch = len(images)
        window = torch.arange(self._size)
        corners = torch.randint(0, 2 * self._margin + 1, (2, batch, 1))
        down, across = corners + window  # [B, H], [B, W]
        which = torch.arange(batch).view(-1, 1, 1)
        # Index tensors on both sides of a slice put the sliced axis, the channels, last.
        return images[which, :, down.unsqueeze(2), across.unsqueeze(1)].permute(0, 3, 1, 2)
