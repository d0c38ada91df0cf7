"""Image folders: data sets whose classes are folders of image files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities import rank_zero_info
from timm.data import ImageDataset

from gpd_cli.data.image_files import image_files
from gpd_cli.data.sources import UNKNOWN, FileSource, hold_out
from gpd_cli.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SYNONYMS = (("train", "training"), ("validation", "val", "valid"), ("test", "testing"))
"""Names of splits that mean the same, and of folders that hold such a split."""
ALL = "all"
"""Name of the split that has every image below the root."""


def read_tree(folder: Path) -> FileSource:
    """Read a split whose images lie in one folder per class.

    The class of an image is the first folder on its path below the split: ``cat/indoor/1.jpg``
    is a cat. Classes are numbered as by torchvision's ImageFolder (in the order 1, 10, 2), since
    networks that were trained elsewhere have this order. Hidden folders are left out.

    Args:
        folder: folder of the split.

    Raises:
        DataError: when there are no images, or some images do not lie in the folder of a class.
    """
    reader = _images_below(folder)
    if not reader.samples:
        raise DataError(
            f"No images in '{folder}'; put them into one folder per class, as "
            f"{folder.name}/CLASS/IMAGE ({', '.join(EXTENSIONS)})."
        )
    first = [_parents(path, folder)[:1] for path, _ in reader.samples]
    if () in first:
        raise DataError(
            f"There are images directly in '{folder}'; move each image into the folder of its "
            f"class, {folder.name}/CLASS/IMAGE."
        )
    names = sorted({name for (name,) in first})
    _remark_on_left_out(reader)
    reader.class_to_idx = {name: number for number, name in enumerate(names)}
    reader.samples = [
        (path, reader.class_to_idx[name])
        for (path, _), (name,) in zip(reader.samples, first, strict=True)
    ]
    return FileSource(ImageDataset(str(folder), reader=reader))


def has_images(folder: Path, *, below: bool = False) -> bool:
    """Whether a folder holds images.

    Args:
        folder: the folder.
        below: whether images in the folders below it count as well.
    """
    if below:
        return bool(_images_below(folder).samples)
    return any(path.name.lower().endswith(EXTENSIONS) for path in folder.iterdir())


def with_synonyms(split: str) -> tuple[str, ...]:
    """The name of a split, followed by its synonyms.

    Args:
        split: the name.
    """
    others = next((names for names in SYNONYMS if split in names), ())
    return (split, *(name for name in others if name != split))


def split_folders(root: Path) -> list[Path]:
    """The folders of splits in a folder, in the order of their names.

    A name may begin with a capital, as in ``Train`` and ``Test``. A folder of such a name may also
    be a class (a train among vehicles, or ``valid`` beside ``invalid``), and is one if all such
    folders hold images directly. But if no other folder holds images, they are taken for splits, so
    that the missing folders of classes are reported.

    Args:
        root: the folder.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    named = [folder for folder in folders if is_split_name(folder.name)]
    if not all(has_images(folder) for folder in named):
        return named
    others = (folder for folder in folders if folder not in named)
    is_class = named and any(has_images(folder, below=True) for folder in others)
    return [] if is_class else named


def is_split_name(name: str) -> bool:
    """Whether a name is usual for the folder of a split, with or without capitals.

    Args:
        name: name of a folder.
    """
    return any(name.lower() in names for names in SYNONYMS)


def is_flat(root: Path) -> bool:
    """Whether a folder holds classes directly, and is not divided into splits.

    Args:
        root: the folder.
    """
    return root.is_dir() and not split_folders(root) and has_images(root, below=True)


def flat_split(root: Path, split: str, fraction: float, seed: int) -> FileSource | None:
    """Read a split of a folder that holds classes directly and is not divided into splits.

    A fraction of every class is kept for testing, and the rest is for training. The choice is
    always the same as long as the folder holds the same images.

    Args:
        root: the folder.
        split: train, test or all.
        fraction: fraction of the images that is kept for testing; 0 for none.
        seed: seed of the choice, which depends on nothing else.

    Returns:
        The split; None if there is no split of this name.
    """
    if split == ALL:
        return read_tree(root)
    if split not in ("train", "test") or (split == "test" and not fraction):
        return None
    tree = read_tree(root)
    if not fraction:
        return tree
    count = len(tree)
    remedy = (
        "add images, or change --data.val_fraction (0 keeps none)"
        if split == "train"
        else f"add images, or --data.test_split {ALL} to score all of them"
    )
    kept, tested = hold_out(tree, fraction, seed, purpose="testing", remedy=remedy)
    chosen = kept if split == "train" else tested
    tree.draw = tree.draw_of(fraction, seed)
    tree.reader.samples = [tree.reader.samples[index] for index in chosen]
    # When testing, the message does not say that the images were kept out of training: the network
    # may have been trained on another folder.
    what = (
        "kept for testing" if split == "train" else "scored, the share that fit would keep for it"
    )
    rank_zero_info(
        f"'{root}' has classes and no splits: {len(tested)} of its {count} images are {what} "
        f"(--data.test_split {ALL} scores all of them)."
    )
    return tree


def read_pictures(place: Path, names: Sequence[str]) -> FileSource:
    """Read images to predict: a single file, or all images anywhere below a folder.

    If a folder on the path of an image has the name of a class, the image gets this class as label;
    otherwise it has no label.

    Args:
        place: path of the image file, or of the folder.
        names: names of the classes, in the order of their numbers.

    Raises:
        DataError: when there are no images.
    """
    if place.is_file():
        reader = _Files([str(place)], place.parent)
    else:
        reader = _images_below(place)
        _remark_on_left_out(reader)
        numbers = {name: number for number, name in enumerate(names)}
        reader.samples = [
            (path, next((numbers[p] for p in _parents(path, place) if p in numbers), UNKNOWN))
            for path, _ in reader.samples
        ]
    if not len(reader):
        raise DataError(
            f"No images in '{place}' or in folders below it; give a folder of images or one image "
            f"({', '.join(EXTENSIONS)})."
        )
    source = FileSource(ImageDataset(str(place), reader=reader))
    source.class_names = list(names)
    return source


def _remark_on_left_out(reader: _Files) -> None:
    """Remark on pictures in formats that are not read, of which a class may have no others."""
    if reader.left_out:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in reader.left_out.items())
        rank_zero_info(
            f"'{reader.root}' has pictures that are left out ({counts}); convert them to one of "
            f"{', '.join(EXTENSIONS)}."
        )


def _images_below(folder: Path) -> _Files:
    """All images below a folder, except those in hidden folders; all without labels."""
    paths, left_out = image_files(folder, EXTENSIONS)
    return _Files(paths, folder, left_out)


def _parents(path: str, folder: Path) -> tuple[str, ...]:
    """Names of the folders between a folder and a file below it, from the outermost inwards."""
    return Path(path).relative_to(folder).parts[:-1]


class _Files:
    """A reader of image files, with those parts of timm's interface that `FileSource` uses.

    Args:
        paths: paths of the images.
        root: a folder that contains all images.
        left_out: number of pictures in formats that are not read, by suffix.
    """

    def __init__(
        self, paths: Sequence[str], root: Path, left_out: Mapping[str, int] | None = None
    ) -> None:
        self.samples = [(path, UNKNOWN) for path in paths]
        self.class_to_idx: dict[str, int] = {}
        self.root, self.left_out = root, left_out or {}

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The path of an image, or its last part; by default relative to the root."""
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)  # noqa: PTH119 - called for millions of images
        return path if absolute else path.removeprefix(str(self.root)).lstrip(os.sep)
