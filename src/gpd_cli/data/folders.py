"""Trees of images, where folders are the classes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities import rank_zero_info
from timm.data import ImageDataset

from gpd_cli.data.image_files import image_files
from gpd_cli.data.sources import UNKNOWN, FileSource, hold_out
from gpd_cli.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ALL = "all"
"""The split that has every image below the root."""


def read_tree(folder: Path) -> FileSource:
    """Read all images below a folder that lie in folders of their classes.

    A class is the first folder below, whatever lies deeper: ``cat/indoor/1.jpg`` is a cat. Classes
    are numbered as torchvision's ImageFolder numbers them (1, 10, 2), for networks trained
    elsewhere have that order. Hidden folders are passed over.

    Args:
        folder: folder of one split.

    Raises:
        DataError: when there are no images, or some lie in no class.
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
            f"There are images directly in '{folder}'; move each into the folder of its class, "
            f"{folder.name}/CLASS/IMAGE."
        )
    names = sorted({name for (name,) in first})
    reader.class_to_idx = {name: number for number, name in enumerate(names)}
    reader.samples = [
        (path, reader.class_to_idx[name])
        for (path, _), (name,) in zip(reader.samples, first, strict=True)
    ]
    return FileSource(ImageDataset(str(folder), reader=reader))


def is_flat(root: Path, splits: Collection[str]) -> bool:
    """Whether classes lie directly below a folder, which is not divided into splits.

    Args:
        root: the folder.
        splits: names that splits may have.
    """
    if not root.is_dir():
        return False
    names = [path.name for path in root.iterdir() if path.is_dir()]
    return not set(names) & set(splits) and bool(_images_below(root).samples)


def flat_split(root: Path, split: str, fraction: float, seed: int) -> FileSource | None:
    """A split of a folder that has classes and no splits.

    A share of every class is kept for testing, and the rest is trained on: always the same images,
    as long as the folder has the same.

    Args:
        root: the folder.
        split: train, test or all.
        fraction: the share for testing.
        seed: the choice depends on nothing else.

    Returns:
        The split; None when there is none of this name.
    """
    if split == ALL:
        return read_tree(root)
    if split not in ("train", "test") or (split == "test" and not fraction):
        return None
    tree = read_tree(root)
    if not fraction:
        return tree
    count = len(tree)
    kept, tested = hold_out(tree.labels(), fraction, seed)
    chosen = kept if split == "train" else tested
    tree.reader.samples = [tree.reader.samples[index] for index in chosen]
    # Of another folder than that of the training, none has been trained on.
    what = (
        "kept for testing" if split == "train" else "scored, the share that fit would keep for it"
    )
    rank_zero_info(
        f"'{root}' has classes and no splits: {len(tested)} of its {count} images are {what} "
        f"(--data.test_split {ALL} scores all of them)."
    )
    return tree


def read_pictures(place: Path, names: Sequence[str]) -> FileSource:
    """Read images to predict: one file, or all below a folder, in whatever folders they lie.

    Where a folder on an image's way has the name of a class, the image is taken for one of it.

    Args:
        place: the file or folder.
        names: names of the classes, in the order of their numbers.

    Raises:
        DataError: when there are none.
    """
    if place.is_file():
        reader = _Files([str(place)], place.parent)
    else:
        reader = _images_below(place)
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


def _images_below(folder: Path) -> _Files:
    """All images below a folder, hidden folders left out."""
    return _Files(image_files(folder, EXTENSIONS), folder)


def _parents(path: str, folder: Path) -> tuple[str, ...]:
    """The folders on the way from a folder to a file below it."""
    return Path(path).relative_to(folder).parts[:-1]


class _Files:
    """A reader of images, with what `FileSource` uses of timm's readers.

    Args:
        paths: paths of the images.
        root: the folder that they lie below.
    """

    def __init__(self, paths: Sequence[str], root: Path) -> None:
        self.samples = [(path, UNKNOWN) for path in paths]
        self.class_to_idx: dict[str, int] = {}
        self.root = root

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The path of the image."""
        path = Path(self.samples[index][0])
        if basename:
            return path.name
        return str(path if absolute else path.relative_to(self.root))
