"""What is downloaded, once per machine, before any process opens it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from gpd_cli.data import ImageData, ImageSpec, opening
from gpd_cli.errors import DataError

CLASSES = ("ant", "bee")
NO_SPLIT = "Unknown value 'test' for argument split. Valid values are {train, val}."
NO_VERSION = "Unknown value 'test' for argument version. Valid values are {2021_train}."


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were opened; names of splits in ``failures`` raise their error."""
    found: list[str] = []

    def create(name: str, split: str, download: bool, **options: Any) -> Any:
        assert download
        if split in failures:
            raise failures[split]
        found.append(split)
        return SimpleNamespace(classes=list(CLASSES), targets=[0, 1] * 4)

    monkeypatch.setattr(opening, "create_dataset", create)
    return found


failures: dict[str, Exception] = {}


@pytest.fixture(autouse=True)
def no_failures() -> None:
    failures.clear()


def places(command: str, dataset: str = "torch/places365", **options: Any) -> ImageData:
    data = ImageData(dataset, root=".", download=True, **options)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=command))
    return data


def test_fit_fetches_every_split(fetched: list[str]) -> None:
    places("fit").prepare_data()
    assert fetched == ["train", "validation", "test"]


def test_fit_goes_on_without_test_images(fetched: list[str]) -> None:
    for reason in (NO_SPLIT, NO_VERSION, "The connection was reset."):
        failures["test"] = ValueError(reason)
        data = places("fit")
        data.prepare_data()
        data.setup("fit")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_fit_needs_is_reported(fetched: list[str], split: str) -> None:
    failures[split] = OSError("The connection was reset.")
    with pytest.raises(DataError, match=r"cannot be opened \(The connection was reset\)"):
        places("fit").prepare_data()


def test_a_missing_version_is_a_missing_split(fetched: list[str]) -> None:
    failures["test"] = ValueError(NO_VERSION)
    with pytest.raises(DataError, match=r"'torch/inaturalist' has no split 'test': Unknown value"):
        places("test", "torch/inaturalist").setup("test")


def test_a_part_is_held_out_where_there_is_no_split_to_fetch(fetched: list[str]) -> None:
    for split in ("validation", None):
        data = places("fit", "torch/cifar10", val_split=split)
        data.prepare_data()
        assert fetched == ["train", "test"]
        fetched.clear()


@pytest.mark.parametrize(
    ("command", "split"), [("validate", "validation"), ("test", "test"), ("predict", "test")]
)
def test_an_evaluation_fetches_what_it_evaluates(
    fetched: list[str], command: str, split: str
) -> None:
    data = places(command)
    data.follow(ImageSpec(class_names=CLASSES))
    data.prepare_data()
    assert fetched == [split]
    data.setup(command)
    assert set(fetched) == {split}


def test_an_evaluation_fetches_training_images_where_it_opens_them(fetched: list[str]) -> None:
    held_out = places("validate", "torch/cifar10")
    held_out.follow(ImageSpec(class_names=CLASSES))
    held_out.prepare_data()
    assert fetched == ["train"]
    fetched.clear()
    places("test").prepare_data()  # class names are those of the training images
    assert sorted(fetched) == ["test", "train"]


def test_nothing_is_fetched_for_photos(tmp_path: Path) -> None:
    """Settings come from a checkpoint, and its data had been downloaded."""
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    data = ImageData("folder", root=str(tmp_path), test_split="all", download=True)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn="predict"))  # type: ignore[assignment]
    data.follow(ImageSpec(class_names=CLASSES))
    data.prepare_data()
    data.setup("predict")
    assert data.predicted_files() == [str(tmp_path / "photo.png")]
