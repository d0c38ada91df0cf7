"""The splits of data sets, with a common interface for all readers.

Files are read by timm or torchvision. Errors name the file and the remedy.
"""

from __future__ import annotations

import hashlib
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
from gpd_cli.errors import DataError, reason_of

Indices = Sequence[int]
UNKNOWN = -1
"""The class number of an image without label."""


class ImageError(DataError):
    """Raised when an image of a data set cannot be used.

    When an error is raised in a loader worker, torch makes it anew with the traceback before the
    message; only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class UnreadableImageError(ImageError):
    """Raised when an image cannot be decoded."""

    @classmethod
    def of(cls, name: str, error: Exception) -> UnreadableImageError:
        """Make the error for an image.

        Args:
            name: the image in words, at the beginning of a sentence.
            error: the error that decoding the image led to.
        """
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known image format" if unknown else reason_of(error)
        return cls(f"{name} cannot be read ({reason}); replace it or remove it from the data.")


class LabelError(ImageError):
    """Raised when the label of an image is not a class number."""


class Source(ABC):
    """One split of a data set.

    Attributes:
        class_names: names of the classes in the order of class numbers; empty if there are none.
        named: whether these names come from the data set itself.
        numbers: for each label of the data set, the class number to use; None if labels are class
            numbers already.
        streamed: whether images come in a stream, without length, shuffling or random access.
        draw: if the images were drawn at random from a folder that is not divided into splits, the
            digest of this draw (see `draw_of`); else None.
    """

    class_names: list[str]
    named: bool = True
    numbers: list[int] | None = None
    streamed = False
    draw: str | None = None

    def renumber(self, names: Sequence[str]) -> list[str]:
        """Number the classes of the split as another list of class names does.

        Args:
            names: names of the classes in the order of their new numbers.

        Returns:
            Names of this split's classes that are not in the list. If there are any, nothing is
            changed.
        """
        unknown = [name for name in self.class_names if name not in names]
        if not unknown and self.class_names != list(names):
            numbers = {name: number for number, name in enumerate(names)}
            self.numbers = [numbers[name] for name in self.class_names]
            self.class_names = list(names)
        return unknown

    def number(self, label: Any, index: int | None = None, unlabelled: bool = False) -> int:
        """Convert a label of the data set to a class number.

        Args:
            label: the label as the data set gives it.
            index: position of the image in the split, for error messages; None in a stream.
            unlabelled: whether images need no label, as for prediction.

        Returns:
            The class number; `UNKNOWN` if the image has no label and needs none.

        Raises:
            LabelError: when the label is no class number, or is missing and needed.
        """
        try:
            own = UNKNOWN if label is None else operator.index(label)
        except TypeError as error:
            if unlabelled:
                return UNKNOWN
            raise LabelError(
                f"{self._name(index)} has the label {reprlib.repr(label)}, which is not a class "
                "number; name a column of class numbers with --data.target_key, or number the "
                "classes in the data."
            ) from error
        if own == UNKNOWN:
            if unlabelled:
                return UNKNOWN
            raise LabelError(
                f"{self._name(index)} has no label, which training and scoring need; name a split "
                "with labels (for gpd test by --data.test_split), or use gpd predict, which needs "
                "no labels."
            )
        count = len(self.class_names if self.numbers is None else self.numbers)
        if not 0 <= own < count:
            raise LabelError(
                f"{self._name(index)} has the label {own}, but {count} classes have the numbers 0 "
                f"to {count - 1}; number the classes from 0 in the data, or set --data.classes "
                "above the greatest label."
            )
        return own if self.numbers is None else self.numbers[own]

    def _name(self, index: int | None) -> str:
        """The name of an image in error messages."""
        return "A streamed image" if index is None else f"Image number {index}"

    def draw_of(self, fraction: float, seed: int) -> str | None:
        """A digest of what a random choice of images to hold out depends on.

        As long as the digest is the same, so are the images that are held out.

        Args:
            fraction: fraction of each class that is held out.
            seed: seed of the choice.

        Returns:
            The digest; None if the images are not files of their own.
        """
        return None

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
            training: whether the images are augmented.
            indices: positions of the images in the split; None for all images.
            unlabelled: whether the images need no label; the class number of an image without label
                is then `UNKNOWN`.
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
        """The digits at some positions of the split, or all; see `Source.images`."""
        rows = slice(None) if indices is None else list(indices)
        labels = torch.as_tensor(self.labels())[rows]
        return DigitImages(self._images[rows], labels, preprocessing, training)


class FileSource(Source):
    """A split with random access: timm's `ImageDataset`, or a data set of torchvision.

    Args:
        dataset: the data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # Images are read through the reader: timm's ImageDataset itself would silently replace
        # unreadable images by other images.
        self.reader: Any = getattr(dataset, "reader", None)
        if self.reader is not None:
            found = getattr(self.reader, "class_to_idx", None) or {}
            self.class_names = [str(name) for name in sorted(found, key=found.__getitem__)]
        else:
            names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", [])
            # ImageNet's class names are tuples of synonyms, of which the first is taken.
            self.class_names = [n if isinstance(n, str) else str(n[0]) for n in names]

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self) -> np.ndarray:
        """Class numbers, ``[N]``.

        Raises:
            DataError: when the data set does not list its labels, or a label is not a class number.
        """
        found: Any = None
        if hasattr(self.reader, "samples"):
            found = [label for _, label in self.reader.samples]
        elif hasattr(self.reader, "label_key"):
            found = list(self.reader.dataset[self.reader.label_key])
        elif hasattr(self.dataset, "targets"):
            found = self.dataset.targets
            if np.ndim(found) > 1:  # QMNIST has a row per image: the class, the writer, and more
                found = found[:, 0]
        if found is not None:
            return np.asarray([self.number(label, index) for index, label in enumerate(found)])
        raise DataError(
            "This data set does not list its labels, so that no images can be held out for "
            "validation; name a validation split with --data.val_split."
        )

    def load(self, index: int, mode: str, unlabelled: bool = False) -> tuple[Image.Image, int]:
        """Read one image and its label.

        Args:
            index: position of the image in the split.
            mode: Pillow's image mode, L or RGB.
            unlabelled: whether the image needs no label.

        Raises:
            UnreadableImageError: when the file is not an image, or is damaged.
            LabelError: when the label is not a class number.
        """
        try:
            if self.reader is None:
                image, label = self.dataset[index]
                image = to_mode(image, mode)
            else:
                stream, label = self.reader[index][:2]
                with stream, Image.open(stream) as opened:
                    image = to_mode(opened, mode)
        except Exception as error:  # decoders raise errors of any type
            raise UnreadableImageError.of(self._name(index), error) from error
        return image, self.number(label, index, unlabelled)

    def file(self, index: int) -> str | None:
        """The path of an image; None if the images of the data set are not files of their own.

        Args:
            index: position of the image in the split.
        """
        found = getattr(self.reader, "samples", None)
        return None if found is None else str(found[index][0])

    def draw_of(self, fraction: float, seed: int) -> str | None:
        """A digest of the images' names, of fraction and seed; see `Source.draw_of`."""
        if not hasattr(self.reader, "samples"):
            return None
        digest = hashlib.sha256(f"{fraction} {seed}\n".encode())
        for index in range(len(self)):
            digest.update(f"{self.reader.filename(index)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def _name(self, index: int | None) -> str:
        try:
            if self.reader is not None:
                path = self.reader.filename(index, absolute=True)
            else:
                path = self.dataset.samples[index][0]
        except (AttributeError, LookupError, TypeError):
            path = None
        # Data sets in tables may have no paths.
        return f"The image {path}" if path else super()._name(index)

    def images(
        self,
        preprocessing: Preprocessing,
        training: bool,
        indices: Indices | None = None,
        unlabelled: bool = False,
    ) -> Dataset[Any]:
        """The images at some positions of the split, or all; see `Source.images`."""
        chosen = range(len(self)) if indices is None else indices
        transform = preprocessing.transform(training)
        return _ImageItems(self, chosen, preprocessing.mode, transform, unlabelled)

    def pixels(
        self, preprocessing: Preprocessing, training: bool, indices: Indices | None = None
    ) -> Dataset[Any]:
        """The images as byte tensors ``[C, H, W]`` that are resized only, for the cache.

        Args:
            preprocessing: how the images are prepared.
            training: whether the images are for training.
            indices: positions of the images in the split; None for all images.
        """
        chosen = range(len(self)) if indices is None else indices
        return _ImageItems(self, chosen, preprocessing.mode, preprocessing.sizing(training))


class _ImageItems(Dataset[tuple[Tensor, int]]):
    """Images of a source at given positions, transformed, with their labels."""

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


def hold_out(
    source: Source, fraction: float, seed: int, *, purpose: str, remedy: str
) -> tuple[list[int], list[int]]:
    """Split images into a part to train on and a part that is held out.

    Args:
        source: the images.
        fraction: fraction of each class that is held out.
        seed: seed of the choice, which depends on nothing else.
        purpose: what the images are held out for, for the error message.
        remedy: what to do where there are too few images, for the error message.

    Returns:
        Indices of the images to train on, and of the images held out, both in ascending order.

    Raises:
        DataError: when the images are too few for every class to be in both parts.
    """
    labels = source.labels()
    from sklearn.model_selection import train_test_split  # slow to import

    try:
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        numbers, counts = np.unique(labels, return_counts=True)
        least = int(counts.argmin())
        raise DataError(
            f"Of {len(labels)} images in {len(numbers)} classes, the fraction {fraction} of every "
            f"class cannot be held out for {purpose} (the smallest class, "
            f"'{source.class_names[numbers[least]]}', has {counts[least]}); {remedy}."
        ) from error
    parts = _share_every_class(labels, kept, held_out)
    return sorted(parts[0].tolist()), sorted(parts[1].tolist())


def _share_every_class(
    labels: np.ndarray, kept: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give each part an image of every class that has two or more.

    Args:
        labels: class numbers of all images, ``[N]``.
        kept: indices of the images to train on, in random order.
        held_out: indices of the images held out, in random order.

    Returns:
        The two parts, in which the first image of a class has moved where all were in one part.
    """
    parts = [kept, held_out]
    for part, other in ((0, 1), (1, 0)):
        numbers, first = np.unique(labels[parts[other]], return_index=True)
        moved = first[~np.isin(numbers, labels[parts[part]])]
        parts[part] = np.concatenate([parts[part], parts[other][moved]])
        parts[other] = np.delete(parts[other], moved)
    return parts[0], parts[1]
