"""Opening the splits of a data set by name, with error messages that name the remedy."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset

from gpd_cli.data.digits import SPLITS
from gpd_cli.data.folders import (
    ALL,
    EXTENSIONS,
    SYNONYMS,
    flat_split,
    is_flat,
    is_split_name,
    read_pictures,
    read_tree,
    split_folders,
    with_synonyms,
)
from gpd_cli.data.shards import IMAGE_KEYS, ShardReader
from gpd_cli.data.sources import DigitSource, FileSource, Source
from gpd_cli.data.streams import StreamSource
from gpd_cli.errors import DataError, did_you_mean, reason_of

# timm's schemes for data sets beside image folders: the module that reads the data set, and the
# packages to install.
_READERS = {
    "torch": ("torchvision", "torchvision"),
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
_STREAMED = ("hfids", "tfds", "wds")
_LAYOUT = "the folder that holds train/CLASS/IMAGE, or CLASS/IMAGE"
_NEEDS_ROOT = ("torch", "wds")
# Data sets of torchvision without a validation split. For every split name but "train", timm
# returns the test split, so that checkpoints would be chosen on test images.
_TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
# Names of torchvision's reader of image folders. If a split has no folder of its own, timm has this
# reader take the whole data set as the split.
_FOLDERS = ("folder", "image_folder")
# Data sets of torchvision that timm can read, for an error message.
_OF_TORCHVISION = tuple(
    f"torch/{name}" for name in (*_TRAIN_AND_TEST, "imagenet", "places365", "inaturalist")
)
# Readers that would convert images themselves, and thereby clip images of 16 bits.
_LEFT_AS_DECODED = ("hfids", "wds")


class MissingSplitError(DataError):
    """Raised when a data set has no split of the given name."""


@dataclass(frozen=True)
class DataSpec:
    """A data set by its name, with what is needed to open its splits.

    Args:
        dataset: digits, folder, or SCHEME/NAME for timm's data sets.
        root: folder of the data set.
        input_key: name of the column with the images.
        target_key: name of the column with the labels.
        classes: number of classes, for a data set that does not name its classes.
        download: whether the data set may be downloaded.
        batch_size: number of images per batch, for streams.
        train_samples: number of training images, for a stream that does not state this number.
        val_fraction: for a folder without splits, the fraction of the images to keep for testing.
        seed: seed of the choice of the images that are kept for testing.

    Raises:
        DataError: when the data set is unknown, its root is missing, or a package that it needs is
            not installed.
    """

    dataset: str
    root: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    classes: int | None = None
    download: bool = False
    batch_size: int = 1
    train_samples: int | None = None
    val_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.is_digits:
            return
        if self.is_folder:
            if self.root is None:
                raise DataError(f"An image folder needs --data.root, {_LAYOUT}.")
            if not Path(self.root).exists():
                raise DataError(f"There is no folder '{self.root}'; set --data.root to {_LAYOUT}.")
            return
        scheme, slash, _ = self.dataset.partition("/")
        if not slash or self.scheme not in _READERS:
            raise DataError(
                f"Unknown data set '{self.dataset}'; set --data.dataset to digits, folder, or one "
                f"of timm's: {', '.join(f'{name}/NAME' for name in _READERS)}."
            )
        module, package = _READERS[self.scheme]
        if find_spec(module) is None:
            raise DataError(
                f"Data sets of {scheme}/ need a package that is not installed: pip install "
                f"{package}."
            )
        if self.scheme in _NEEDS_ROOT and self.root is None:
            raise DataError(
                f"'{self.dataset}' needs --data.root, the folder that it is in"
                + (" or is downloaded to." if self.scheme == "torch" else ".")
            )

    @property
    def is_digits(self) -> bool:
        """Whether these are scikit-learn's digits."""
        return self.dataset == "digits"

    @property
    def is_folder(self) -> bool:
        """Whether this is a tree of image folders."""
        return self.dataset in ("", "folder")

    @property
    def is_downloaded(self) -> bool:
        """Whether the data set is downloaded if it is missing."""
        return self.download and not (self.is_digits or self.is_folder)

    @property
    def is_streamed(self) -> bool:
        """Whether the data set can only be read in order."""
        return self.scheme in _STREAMED

    @property
    def scheme(self) -> str:
        """The part of the name before the slash."""
        return self.dataset.partition("/")[0].lower()

    @property
    def in_chans(self) -> int:
        """Default number of image channels, 1 (grey) or 3 (RGB)."""
        return 1 if self.is_digits else 3

    def open(self, split: str, *, mode: str, training: bool) -> Source:
        """Open a split.

        Args:
            split: name of the split; validation, val and valid mean the same, as do train and
                training.
            mode: Pillow's image mode, L or RGB.
            training: whether a stream is shuffled.

        Returns:
            The split. If the data set does not name its classes, their names are their numbers.

        Raises:
            MissingSplitError: when the data set has no split of this name.
            DataError: when the data set is missing, cannot be read, or does not have the expected
                classes.
        """
        source = self._open(split, mode, training)
        found = len(source.class_names)
        if not (found or self.classes):
            raise DataError(
                f"'{self.dataset}' does not name its classes; set --data.classes to their number."
            )
        if found and self.classes not in (None, found):
            raise DataError(
                f"'{self.dataset}' has {found} classes, not {self.classes}; leave out "
                "--data.classes."
            )
        source.named = bool(found)
        source.class_names = source.class_names or numbered(self.classes or 0)
        return source

    def pictures(self, split: str, names: Sequence[str], trained_on: str | None) -> Source | None:
        """Open the images to predict from an image folder; these images need no labels.

        - If the root is a single image, or the split is ``all``, everything at the root is taken.
        - If the folder has the split, the images of the split are taken.
        - If the folder is not divided into splits, all images are taken, unless the network was
          trained on this folder; then the images that were kept for testing are taken.

        Args:
            split: name of the split, or ``all`` for every image below the root.
            names: names of the network's classes, in the order of their numbers.
            trained_on: root of the training images; None if it is not known.

        Returns:
            The images; None if they are the same as for testing, so that `open` gives them. This is
            always so for data sets other than image folders.

        Raises:
            DataError: when there are no images.
        """
        if not self.is_folder:
            return None
        root = Path(str(self.root))
        if root.is_file() or split == ALL:
            return read_pictures(root, names)
        folder = self._split_folder(split)
        if folder is not None:
            return read_pictures(folder, names)
        own = trained_on is not None and root.resolve() == Path(trained_on).resolve()
        if split_folders(root) or (own and is_flat(root)):
            return None
        return read_pictures(root, names)

    def _open(self, split: str, mode: str, training: bool) -> Source:
        if self.is_digits:
            name = next((name for name in with_synonyms(split) if name in SPLITS), None)
            if name is None:
                raise self._missing(split, SPLITS)
            return DigitSource(name)
        if self.is_folder:
            return self._open_folder(split)
        if _torchvision_name(self.dataset) in _TRAIN_AND_TEST:
            found = next((name for name in with_synonyms(split) if name in ("train", "test")), None)
            if found is None:
                raise self._missing(split, ("train", "test"))
            split = found
        return self._open_with_timm(split, mode, training)

    def _open_folder(self, split: str) -> Source:
        root = Path(str(self.root))
        if root.is_file():
            raise DataError(
                f"'{root}' is a file; set --data.root to {_LAYOUT}, or give a single image to gpd "
                "predict --images."
            )
        folder = self._split_folder(split)
        if folder is not None:
            return read_tree(folder)
        if is_flat(root):
            known = ("train", "test", ALL)
            name = next((name for name in with_synonyms(split) if name in known), split)
            if (found := flat_split(root, name, self.val_fraction, self.seed)) is not None:
                return found
            if name == "test":
                raise MissingSplitError(
                    f"'{root}' has no split 'test', and none of its images are kept for testing "
                    f"(--data.val_fraction 0); --data.test_split {ALL} scores all of them."
                )
            raise self._missing(split, ("train", "test", ALL))
        if not split_folders(root):
            raise DataError(
                f"'{root}' contains no images ({', '.join(EXTENSIONS)}); set --data.root to "
                f"{_LAYOUT}."
            )
        raise self._missing(split, sorted(p.name for p in root.iterdir() if p.is_dir()))

    def _split_folder(self, split: str) -> Path | None:
        root = Path(str(self.root))
        names, splits = with_synonyms(split), split_folders(root)
        exact = [root / name for name in names if (root / name).is_dir()]
        # A folder with the usual name of a split may be a class.
        exact = [folder for folder in exact if folder in splits or not is_split_name(folder.name)]
        others = [folder for folder in splits if folder.name.lower() in names]
        return next(iter([*exact, *others]), None)

    def _open_with_timm(self, split: str, mode: str, training: bool) -> Source:
        options: dict[str, Any] = {}
        if self.scheme != "torch":
            options = {"input_key": self.input_key, "target_key": self.target_key}
        if self.scheme == "wds" and self.input_key is None:
            options["input_key"] = IMAGE_KEYS
        if self.is_streamed:
            # In evaluation a stream is read to its end. The reader of hfids requires a number all
            # the same.
            uncounted = 1 if self.scheme == "hfids" else None
            options["num_samples"] = self.train_samples if training else uncounted
        try:
            # Suppress torchvision's messages about files that have been downloaded already.
            with contextlib.redirect_stdout(io.StringIO()):
                dataset = create_dataset(
                    self.dataset,
                    root=self.root,
                    split=split,
                    is_training=training,
                    download=self.download,
                    batch_size=self.batch_size,
                    # The order of streams follows the global seed, like all shuffling.
                    seed=torch.initial_seed() % 2**32,
                    input_img_mode="" if self.scheme in _LEFT_AS_DECODED else mode,
                    **options,
                )
            if self.scheme == "hfids" and not self.download:
                # Find out now whether the split exists; the reader would look only in a worker.
                dataset.reader.builder.as_streaming_dataset(split=split)
        except Exception as error:  # each library raises errors of its own types
            reason = reason_of(error)
            if "num_samples" in reason:
                raise DataError(
                    f"'{self.dataset}' does not say how many training images it has; set "
                    "--data.train_samples to their number."
                ) from error
            if "Unknown torchvision dataset" in reason:
                hint = did_you_mean(*get_close_matches(self.dataset.lower(), _OF_TORCHVISION, n=1))
                raise DataError(
                    f"Unknown data set '{self.dataset}'{hint}; of torchvision's data sets timm "
                    f"reads {', '.join(_OF_TORCHVISION)}."
                ) from error
            # torchvision's INaturalist calls its splits versions.
            if "split" in reason.lower() or "for argument version" in reason:
                raise MissingSplitError(
                    f"Data set '{self.dataset}' has no split '{split}': {reason}."
                ) from error
            remedy = "check --data.dataset and --data.root"
            if not self.download:
                remedy += ", or let it be downloaded with --data.download true"
            raise DataError(
                f"Data set '{self.dataset}' cannot be opened ({reason}); {remedy}."
            ) from error
        if self.is_streamed:
            shards = None
            if self.scheme == "wds":
                shards = self._shards(dataset.reader)
                ShardReader.convert(dataset.reader)
            return StreamSource(dataset, training, shards)
        if self.scheme == "hfds":
            self._check_columns(dataset.reader)
        return FileSource(dataset)

    def _shards(self, reader: Any) -> tuple[str, ...]:
        """The file names of WebDataset shards.

        Their existence is checked here, since the reader would skip missing files silently.

        Raises:
            DataError: when a file is missing.
        """
        names = tuple(reader.split_info.filenames)
        for name in names:
            path = Path(str(self.root)) / name
            if not (
                _is_url_or_command(str(self.root)) or _is_url_or_command(name) or path.is_file()
            ):
                raise DataError(
                    f"There is no shard '{path}'; check --data.root and the file names of the "
                    "split."
                )
        return names

    def _check_columns(self, reader: Any) -> None:
        row: dict[str, Any] = next(iter(reader.dataset), {})
        # If the image column is missing, the reader adds an empty one; the label column may be
        # empty.
        columns = {key for key, value in row.items() if key != reader.image_key or value}
        for option, key in (("input_key", reader.image_key), ("target_key", reader.label_key)):
            if key not in columns:
                others = ", ".join(name for name in row if name != key)
                raise DataError(
                    f"'{self.dataset}' has no column '{key}'; set --data.{option} to one of: "
                    f"{others}."
                )

    def _missing(self, split: str, found: Any) -> MissingSplitError:
        name = f"'{self.root}'" if self.is_folder else f"Data set '{self.dataset}'"
        kind = next((names[0] for names in SYNONYMS if split in names), split)
        option = {"train": "train", "validation": "val", "test": "test"}.get(kind)
        remedy = f"--data.{option}_split" if option else "--data.*_split"
        return MissingSplitError(
            f"{name} has no split '{split}'; name another split with {remedy} (there is: "
            f"{', '.join(found) or 'none'})."
        )


def resolved_name(dataset: str, root: str | None) -> str:
    """The name of the data set that the user means.

    Digits (the default) need no root, so that a root without the name of a data set means an image
    folder. torchvision's reader of image folders is replaced by ours, which numbers the classes in
    the same way.

    Args:
        dataset: name of the data set as given.
        root: folder of the data set as given; None without one.
    """
    if _torchvision_name(dataset) in _FOLDERS or (dataset == "digits" and root is not None):
        return "folder"
    return dataset


def _torchvision_name(dataset: str) -> str | None:
    """The name in timm of a data set of torchvision; None for a data set of another scheme."""
    scheme, *rest = dataset.lower().split("/", 2)
    return rest[-1] if scheme == "torch" and rest else None


def numbered(classes: int) -> list[str]:
    """Names for classes without names: their numbers as text, ``0``, ``1``, ...

    Args:
        classes: the number of classes.
    """
    return [str(number) for number in range(classes)]


def _is_url_or_command(place: str) -> bool:
    """Whether a location is a URL or a command to read from, and not a local path."""
    return ":" in place
