"""Splits of data sets, read by timm or torchvision, with errors that name file and remedy."""

from __future__ import annotations

import operator
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from gpd_cli.data.digits import CLASSES, DigitImages, load_split
from gpd_cli.data.pixels import to_mode
from gpd_cli.data.transforms import Preprocessing, Transform
from gpd_cli.errors import DataError

Indices = Sequence[int]
UNKNOWN = -1
"""The class number of an image without label."""


class ImageError(DataError):
    """An image of a data set that cannot be used.

    A loader's worker puts the traceback before the message; only the message is kept here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class UnreadableImageError(ImageError):
    """An image that cannot be decoded."""


class LabelError(ImageError):
    """An image whose label is no class number."""


class Source(ABC):
    """One split of a data set.

    Attributes:
        class_names: names in the order of class numbers; empty where the data set has none.
        named: whether the data set itself names them.
        numbers: the class number of each of its classes, where that is another one than its place.
        streamed: whether images come in a stream, without length, shuffling or random access.
    """

    class_names: list[str]
    named: bool = True
    numbers: list[int] | None = None
    streamed = False

    def renumber(self, names: Sequence[str]) -> list[str]:
        """Give classes the numbers that classes of these names have.

        Args:
            names: names of the classes, in the order of their numbers.

        Returns:
            Names of its own that are not among these; nothing is changed where there are any.
        """
        unknown = [name for name in self.class_names if name not in names]
        if not unknown and self.class_names != list(names):
            numbers = {name: number for number, name in enumerate(names)}
            self.numbers = [numbers[name] for name in self.class_names]
            self.class_names = list(names)
        return unknown

    def number(self, label: Any, index: int | None = None, unlabelled: bool = False) -> int:
        """The class number of a label.

        Args:
            label: the label, as the data set has it.
            index: position of its image in the split, for a message; None in a stream.
            unlabelled: whether images need no label, as those to predict.

        Returns:
            The class number; `UNKNOWN` for an image that has none and needs none.

        Raises:
            LabelError: when the label is no class number, or is missing and needed.
        """
        try:
            own = UNKNOWN if label is None else operator.index(label)
        except TypeError as error:
            if unlabelled:
                return UNKNOWN
            raise LabelError(
                f"{self._name(index)} has the label {reprlib.repr(label)}, which is no class "
                "number; name a column of class numbers with --data.target_key, or number the "
                "classes in the data."
            ) from error
        if own == UNKNOWN:
            if unlabelled:
                return UNKNOWN
            raise LabelError(
                f"{self._name(index)} has no label, which training and scoring need; name a split "
                "with labels, as with --data.test_split, or use gpd predict, which needs none."
            )
        count = len(self.class_names if self.numbers is None else self.numbers)
        if not 0 <= own < count:
            raise LabelError(
                f"{self._name(index)} has the label {own}, and the numbers of {count} classes are "
                f"0 to {count - 1}; number the classes from 0 in the data, or set --data.classes "
                "above the greatest label."
            )
        return own if self.numbers is None else self.numbers[own]

    def _name(self, index: int | None) -> str:
        """How messages name an image."""
        return "A streamed image" if index is None else f"Image number {index}"

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def labels(self) -> np.ndarray:
        """Class numbers of all images, ``[N]``, without reading the images."""

    @abstractmethod
    def images(
        self,
        preprocessing: Preprocessing,
        training: bool,
        indices: Indices | None = None,
        unlabelled: bool = False,
    ) -> Dataset[Any]:
        """The split, or a part of it, as pairs of image ``[C, H, W]`` and class number.

        Args:
            preprocessing: how the images are prepared.
            training: whether they are augmented.
            indices: positions of the images in the split; None for all.
            unlabelled: whether they need no label; their class number is then `UNKNOWN`.
        """


class DigitSource(Source):
    """A split of scikit-learn's digits."""

    def __init__(self, split: str) -> None:
        self._images, self._labels = load_split(split)
        self.class_names = list(CLASSES)

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> np.ndarray:
        """Class numbers, ``[N]``."""
        return np.asarray([self.number(label) for label in self._labels.tolist()])

    def images(
        self,
        preprocessing: Preprocessing,
        training: bool,
        indices: Indices | None = None,
        unlabelled: bool = False,
    ) -> Dataset[Any]:
        """All digits, or some; all have labels."""
        part = slice(None) if indices is None else list(indices)
        labels = torch.as_tensor(self.labels())[part]
        return DigitImages(self._images[part], labels, preprocessing, training)


class FileSource(Source):
    """A split with random access: timm's `ImageDataset`, or a data set of torchvision."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # timm's ImageDataset replaces unreadable images by other images, but its reader does not.
        self.reader: Any = getattr(dataset, "reader", None)
        if self.reader is not None:
            found = getattr(self.reader, "class_to_idx", None) or {}
            self.class_names = [str(name) for name in sorted(found, key=found.__getitem__)]
        else:
            names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", [])
            # ImageNet's classes are tuples of synonyms.
            self.class_names = [n if isinstance(n, str) else str(n[0]) for n in names]

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self) -> np.ndarray:
        """Class numbers, ``[N]``.

        Raises:
            DataError: when the data set does not list its labels, or one is no class number.
        """
        found: Any = None
        if hasattr(self.reader, "samples"):
            found = [label for _, label in self.reader.samples]
        elif hasattr(self.reader, "label_key"):
            found = list(self.reader.dataset[self.reader.label_key])
        elif hasattr(self.dataset, "targets"):
            found = self.dataset.targets
            if np.ndim(found) > 1:  # of QMNIST: the class, the writer, and more
                found = found[:, 0]
        if found is not None:
            return np.asarray([self.number(label, index) for index, label in enumerate(found)])
        raise DataError(
            "This data set does not list its labels, so that no part can be held out; name a "
            "validation split with --data.val_split."
        )

    def load(self, index: int, mode: str, unlabelled: bool = False) -> tuple[Image.Image, int]:
        """Read one image and its label.

        Args:
            index: position of the image in the split.
            mode: Pillow's image mode, L or RGB.
            unlabelled: whether the image needs no label.

        Raises:
            UnreadableImageError: when the file is no image, or damaged.
            LabelError: when the label is no class number.
        """
        try:
            if self.reader is None:
                image, label = self.dataset[index]
                image = to_mode(image, mode)
            else:
                stream, label = self.reader[index][:2]
                with stream, Image.open(stream) as opened:
                    image = to_mode(opened, mode)
        except Exception as error:  # decoders raise errors of every kind
            reason = str(error).strip().rstrip(".") or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "no known image format"
            raise UnreadableImageError(
                f"{self._name(index)} cannot be read ({reason}); replace it or take it out of "
                "the data."
            ) from error
        return image, self.number(label, index, unlabelled)

    def file(self, index: int) -> str | None:
        """The path of an image, where it has one of its own."""
        found = getattr(self.reader, "samples", None)
        return None if found is None else str(found[index][0])

    def _name(self, index: int | None) -> str:
        try:
            if self.reader is not None:
                path = self.reader.filename(index, absolute=True)
            else:
                path = self.dataset.samples[index][0]
        except (AttributeError, LookupError, TypeError):
            path = None
        return f"The image {path}" if path else super()._name(index)  # tables may hold no paths

    def images(
        self,
        preprocessing: Preprocessing,
        training: bool,
        indices: Indices | None = None,
        unlabelled: bool = False,
    ) -> Dataset[Any]:
        """All images, or some."""
        chosen = range(len(self)) if indices is None else indices
        transform = preprocessing.transform(training)
        return _Files(self, chosen, preprocessing.mode, transform, unlabelled)

    def pixels(
        self, preprocessing: Preprocessing, training: bool, indices: Indices | None = None
    ) -> Dataset[Any]:
        """All images, or some, as byte tensors ``[C, H, W]``, resized only."""
        chosen = range(len(self)) if indices is None else indices
        return _Files(self, chosen, preprocessing.mode, preprocessing.sizing(training))


class _Files(Dataset[tuple[Tensor, int]]):
    def __init__(
        self,
        source: FileSource,
        indices: Indices,
        mode: str,
        transform: Transform,
        unlabelled: bool = False,
    ) -> None:
        self.source, self.indices, self.mode, self.transform = source, indices, mode, transform
        self.unlabelled = unlabelled

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source.load(self.indices[index], self.mode, self.unlabelled)
        return self.transform(image), label


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split a training set into a part to train on and a part to validate on.

    Args:
        labels: class numbers, ``[N]``.
        fraction: fraction of each class that is held out.
        seed: random seed of the choice, which depends on nothing else.

    Returns:
        Indices to train on and indices held out, both ascending.

    Raises:
        DataError: when the images are too few for every class to be in both parts.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    try:
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"Of {len(labels)} training images in {len(np.unique(labels))} classes, no part with "
            f"the share {fraction} of every class can be held out for validation; change "
            "--data.val_fraction, or add a validation split."
        ) from error
    return sorted(kept.tolist()), sorted(held_out.tolist())
