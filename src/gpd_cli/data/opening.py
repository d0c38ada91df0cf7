"""Data sets by name: opening a split, with a remedy in the message when that fails."""

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
from gpd_cli.data.folders import ALL, EXTENSIONS, flat_split, is_flat, read_pictures, read_tree
from gpd_cli.data.sources import DigitSource, FileSource, Source
from gpd_cli.data.streams import StreamSource
from gpd_cli.errors import DataError, did_you_mean

# Schemes of timm beside image folders: the module that reads them, and packages to install.
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
# Data sets of torchvision without a validation split. timm returns their test split for any name
# but train, so that checkpoints would be chosen on test images.
_TRAIN_AND_TEST = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
# torchvision's reader of image folders. timm gives it the whole folder for every split that has no
# folder of its own.
_FOLDERS = ("folder", "image_folder")
# Those of torchvision that timm reads, for a message.
_OF_TORCHVISION = tuple(
    f"torch/{name}" for name in (*_TRAIN_AND_TEST, "imagenet", "places365", "inaturalist")
)
_SYNONYMS = (("train", "training"), ("validation", "val", "valid"))
_SPLITS = (*_SYNONYMS[0], *_SYNONYMS[1], "test", "testing")
# Readers that would convert images by themselves, and clip those of 16 bits.
_LEFT_AS_DECODED = ("hfids", "wds")


class MissingSplitError(DataError):
    """The data set has no split of this name."""


@dataclass(frozen=True)
class DataSpec:
    """A data set by name.

    Args:
        dataset: digits, folder, or SCHEME/NAME for timm.
        root: folder of the data set.
        input_key: name of the images' column.
        target_key: name of the labels' column.
        classes: number of classes, for a data set that does not name them.
        download: whether the data set may be downloaded.
        batch_size: images per batch, for streams.
        train_samples: number of training images, for a stream that does not state it.
        val_fraction: fraction of the images to keep for testing, of a folder without splits.
        seed: seed of the choice of these images.

    Raises:
        DataError: when the data set is unknown, needs a root, or a package that is not installed.
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
                raise DataError(f"There is no '{self.root}'; --data.root is {_LAYOUT}.")
            return
        scheme, slash, _ = self.dataset.partition("/")
        if not slash or self.scheme not in _READERS:
            raise DataError(
                f"Unknown data set '{self.dataset}'; --data.dataset is digits, folder, or one of "
                f"timm's: {', '.join(f'{name}/NAME' for name in _READERS)}."
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
        """Whether the data set is fetched where it is not there."""
        return self.download and not (self.is_digits or self.is_folder)

    @property
    def is_streamed(self) -> bool:
        """Whether the data set is read in order only."""
        return self.scheme in _STREAMED

    @property
    def scheme(self) -> str:
        """The part of the name before the slash."""
        return self.dataset.partition("/")[0].lower()

    @property
    def in_chans(self) -> int:
        """Default number of channels."""
        return 1 if self.is_digits else 3

    def open(self, split: str, *, mode: str, training: bool) -> Source:
        """Open a split.

        Args:
            split: name of the split; validation, val and valid mean the same, as do train and
                training.
            mode: Pillow's image mode, L or RGB.
            training: whether streams are shuffled.

        Returns:
            The split, with names for its classes: their numbers where it has no names.

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
                f"'{self.dataset}' has {found} classes, not {self.classes}; leave --data.classes "
                "out."
            )
        source.named = bool(found)
        source.class_names = source.class_names or numbered(self.classes or 0)
        return source

    def pictures(self, split: str, names: Sequence[str], trained_on: str | None) -> Source | None:
        """Open the images to predict, which need have no labels.

        Of an image folder they are the split, where there is one, and everything where the folder
        is not divided into splits, or is but one image; of one that was trained on, its test part.

        Args:
            split: its name, or all for every image below the root.
            names: names of the classes that the network tells apart.
            trained_on: the root of the training images.

        Returns:
            The images; None where they are those of the split as for testing.

        Raises:
            DataError: when there are none.
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
        if any((root / name).is_dir() for name in _SPLITS) or (own and is_flat(root, _SPLITS)):
            return None
        return read_pictures(root, names)

    def _open(self, split: str, mode: str, training: bool) -> Source:
        if self.is_digits:
            name = next((name for name in _same(split) if name in SPLITS), None)
            if name is None:
                raise self._missing(split, SPLITS)
            return DigitSource(name)
        if self.is_folder:
            return self._open_folder(split)
        if _torchvision_name(self.dataset) in _TRAIN_AND_TEST:
            found = next((name for name in _same(split) if name in ("train", "test")), None)
            if found is None:
                raise self._missing(split, ("train", "test"))
            split = found
        return self._open_with_timm(split, mode, training)

    def _open_folder(self, split: str) -> Source:
        root = Path(str(self.root))
        if root.is_file():
            raise DataError(
                f"'{root}' is one file, and --data.root the folder that holds train/CLASS/IMAGE; "
                "gpd predict takes single images."
            )
        folder = self._split_folder(split)
        if folder is not None:
            return read_tree(folder)
        if is_flat(root, _SPLITS):
            name = next((name for name in _same(split) if name in ("train", "test", ALL)), split)
            if (found := flat_split(root, name, self.val_fraction, self.seed)) is not None:
                return found
        elif not any((root / name).is_dir() for name in _SPLITS):
            raise DataError(
                f"'{root}' holds no images ({', '.join(EXTENSIONS)}); --data.root is {_LAYOUT}."
            )
        raise self._missing(split, sorted(p.name for p in root.iterdir() if p.is_dir()))

    def _split_folder(self, split: str) -> Path | None:
        root = Path(str(self.root))
        return next((root / name for name in _same(split) if (root / name).is_dir()), None)

    def _open_with_timm(self, split: str, mode: str, training: bool) -> Source:
        options: dict[str, Any] = {}
        if self.scheme != "torch":
            options = {"input_key": self.input_key, "target_key": self.target_key}
        if self.is_streamed:
            # Evaluation reads to the end, but the reader of hfids requires a number.
            uncounted = 1 if self.scheme == "hfids" else None
            options["num_samples"] = self.train_samples if training else uncounted
        try:
            # torchvision prints whenever it looks at a download.
            with contextlib.redirect_stdout(io.StringIO()):
                dataset = create_dataset(
                    self.dataset,
                    root=self.root,
                    split=split,
                    is_training=training,
                    download=self.download,
                    batch_size=self.batch_size,
                    # As all shuffling, the order of streams follows the global seed.
                    seed=torch.initial_seed() % 2**32,
                    input_img_mode="" if self.scheme in _LEFT_AS_DECODED else mode,
                    **options,
                )
            if self.scheme == "hfids" and not self.download:
                # The reader itself would look for the split only in a worker.
                dataset.reader.builder.as_streaming_dataset(split=split)
        except Exception as error:  # each library has errors of its own
            reason = " ".join(str(error).split())[:300].rstrip(".")
            if "num_samples" in reason:
                raise DataError(
                    f"'{self.dataset}' does not say how many training images it has; set "
                    "--data.train_samples to their number."
                ) from error
            if "Unknown torchvision dataset" in reason:
                hint = did_you_mean(*get_close_matches(self.dataset.lower(), _OF_TORCHVISION, n=1))
                raise DataError(
                    f"Unknown data set '{self.dataset}'{hint}; timm reads "
                    f"{', '.join(_OF_TORCHVISION)} of torchvision's."
                ) from error
            # The splits of torchvision's INaturalist are called versions.
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
            shards = self._shards(dataset.reader) if self.scheme == "wds" else None
            return StreamSource(dataset, training, shards)
        if self.scheme == "hfds":
            self._check_columns(dataset.reader)
        return FileSource(dataset)

    def _shards(self, reader: Any) -> tuple[str, ...]:
        """The file names of WebDataset shards, checked, since the reader skips missing files."""
        names = tuple(reader.split_info.filenames)
        for name in names:
            path = Path(str(self.root)) / name
            if not (_is_remote(str(self.root)) or _is_remote(name) or path.is_file()):
                raise DataError(
                    f"The shard '{path}' is not there; check --data.root and the file names of the "
                    "split."
                )
        return names

    def _check_columns(self, reader: Any) -> None:
        row: dict[str, Any] = next(iter(reader.dataset), {})
        # The reader adds a missing image column, without values. Labels may have none.
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
        kind = next((names[0] for names in _SYNONYMS if split in names), split)
        option = {"train": "train", "validation": "val", "test": "test"}.get(kind)
        remedy = f"--data.{option}_split" if option else "--data.*_split"
        return MissingSplitError(
            f"{name} has no split '{split}'; name another with {remedy} (there is: "
            f"{', '.join(found) or 'none'})."
        )


def understood(dataset: str, root: str | None) -> str:
    """The data set that is meant: digits have no folder, so a folder is one of images.

    torchvision's reader of image folders numbers their classes as ours does.

    Args:
        dataset: the data set's name.
        root: the folder that was given with it.
    """
    if _torchvision_name(dataset) in _FOLDERS or (dataset == "digits" and root is not None):
        return "folder"
    return dataset


def _torchvision_name(dataset: str) -> str | None:
    """The name by which timm knows a data set of torchvision; None for those of other schemes."""
    scheme, *rest = dataset.lower().split("/", 2)
    return rest[-1] if scheme == "torch" and rest else None


def numbered(classes: int) -> list[str]:
    """Names of classes that have none: their numbers, as words.

    Args:
        classes: the number of classes.
    """
    return [str(number) for number in range(classes)]


def _is_remote(place: str) -> bool:
    """Whether a place is an address or a command to read from, and not a path."""
    return ":" in place


def _same(split: str) -> tuple[str, ...]:
    """A split's name and its synonyms."""
    others = next((names for names in _SYNONYMS if split in names), ())
    return (split, *(name for name in others if name != split))
