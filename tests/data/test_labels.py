"""Labels that are not class numbers are named where they are read; predictions need none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset

from complaints import complaint
from gpd_cli.data import ImageData, opening
from gpd_cli.errors import DataError

COUNT = 8
UNUSABLE = [
    (-1, r"Image number 5 has no label, .*--data\.test_split"),
    (None, r"Image number 5 has no label, .*--data\.test_split"),
    (2, r"Image number 5 has the label 2, .*0 to 1.*--data\.classes"),
    (-2, r"Image number 5 has the label -2, "),
    ("wasp", r"Image number 5 has the label 'wasp', .*not a class number.*--data\.target_key"),
    (1.5, r"Image number 5 has the label 1\.5, .*not a class number"),
]


class Table:
    """Images with the labels given, as data sets of torchvision have them."""

    def __init__(self, labels: list[Any]) -> None:
        self.targets = labels
        self.classes = ["ant", "bee"]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Image.Image, Any]:
        return Image.new("RGB", (8, 8), (number, 0, 0)), self.targets[number]


class Stream:
    """The same, read in order, as timm's readers of streams do."""

    def __init__(self, labels: list[Any]) -> None:
        self.table = Table(labels)

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Any:
        return (self.table[number] for number in range(len(self.table)))


def labels_with(label: Any) -> list[Any]:
    return [label if number == 5 else number % 2 for number in range(COUNT)]


def data_with(monkeypatch: pytest.MonkeyPatch, labels: list[Any], **options: Any) -> ImageData:
    found = Table(labels)
    monkeypatch.setattr(opening, "create_dataset", lambda *args, **kwargs: found)
    settings = {"image_size": 8, "batch_size": 4, "num_workers": 0, "no_aug": True}
    return ImageData("torch/imagenet", root=".", **(settings | options))


def stream_with(monkeypatch: pytest.MonkeyPatch, labels: list[Any], **options: Any) -> ImageData:
    monkeypatch.setattr(opening, "find_spec", lambda module: module)
    found = IterableImageDataset(None, reader=Stream(labels))
    monkeypatch.setattr(opening, "create_dataset", lambda *args, **kwargs: found)
    settings = {"image_size": 8, "batch_size": 4, "num_workers": 0, "no_aug": True}
    return ImageData("tfds/name", root=".", classes=2, **(settings | options))


@pytest.mark.parametrize(("label", "message"), UNUSABLE)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_label_that_is_no_class_number_is_named(
    monkeypatch: pytest.MonkeyPatch, label: Any, message: str, split: str
) -> None:
    data = data_with(monkeypatch, labels_with(label))
    loaders = {
        "train": data.train_dataloader,
        "validation": data.val_dataloader,
        "test": data.test_dataloader,
    }
    said = complaint(loaders[split]())
    assert "\n" not in said
    with pytest.raises(DataError, match=message):
        raise DataError(said)


@pytest.mark.parametrize(("label", "message"), UNUSABLE)
def test_so_it_is_while_a_part_is_held_out(
    monkeypatch: pytest.MonkeyPatch, label: Any, message: str
) -> None:
    data = data_with(monkeypatch, labels_with(label), val_split=None, val_fraction=0.25)
    with pytest.raises(DataError, match=message):
        data.setup("fit")


def test_so_it_is_by_a_worker_and_by_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"num_workers": 1}, {"cache": "memory"}):
        data = data_with(monkeypatch, labels_with(2), **options)
        try:
            said = complaint(data.train_dataloader())
        except DataError as error:  # a cache reads at once
            said = str(error)
        assert said.startswith("Image number 5 has the label 2, ")
        assert "\n" not in said


@pytest.mark.parametrize(("label", "message"), UNUSABLE)
def test_an_image_of_a_stream_has_no_number(
    monkeypatch: pytest.MonkeyPatch, label: Any, message: str
) -> None:
    data = stream_with(monkeypatch, labels_with(label))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        with pytest.raises(DataError, match=message.replace("Image number 5", "A streamed image")):
            list(loader)


@pytest.mark.parametrize("make", [data_with, stream_with])
def test_images_to_predict_need_no_label(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    for label in (-1, None, "wasp", 1.5):
        data = make(monkeypatch, labels_with(label))
        labels = torch.cat([batch[1] for batch in data.predict_dataloader()])
        assert labels.tolist() == [0, 1, 0, 1, 0, -1, 0, 1]
    with pytest.raises(DataError, match=r"has the label 2, "):
        list(make(monkeypatch, labels_with(2)).predict_dataloader())


def test_class_numbers_of_any_integer_type_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [0, True, np.int64(0), np.uint8(1), torch.tensor(0), torch.tensor(1), False, 1]
    (images, found), (_, more) = data_with(monkeypatch, labels).test_dataloader()
    assert found.dtype == more.dtype == torch.int64
    assert [*found.tolist(), *more.tolist()] == [0, 1] * 4
    assert images.shape == (4, 3, 8, 8)


def test_the_file_of_an_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_with(monkeypatch, labels_with(2))
    opening.create_dataset("").samples = [  # type: ignore[attr-defined]
        (str(tmp_path / f"{number}.png"), 0) for number in range(COUNT)
    ]
    with pytest.raises(DataError, match=rf"The image {tmp_path / '5.png'} has the label 2, "):
        list(data.test_dataloader())
