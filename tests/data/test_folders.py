"""Trees of images as people have them: nested, flat, of 16 bits, without labels."""

from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpd_cli.data import ImageData, ImageSpec
from gpd_cli.data.folders import read_pictures
from gpd_cli.data.pixels import to_mode
from gpd_cli.errors import DataError

GREY = {"ant": 40, "bee": 120, "wasp": 200}
"""The brightness of each class's images."""


def write(folder: Path, name: str, count: int = 2, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        Image.new("L", (12, 12), GREY[name] + number).save(folder / f"{name}{number:02}.png")


def folder_data(root: Path, **options: Any) -> ImageData:
    """Grey images, in [0, 255]."""
    settings: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 8, "in_chans": 1}
    settings |= {"mean": [0.0], "std": [1 / 255], "crop_pct": 1.0, "no_aug": True}
    return ImageData("folder", root=str(root), **(settings | options))


def served(loader: Any) -> list[tuple[int, int]]:
    """Brightness and label of every image."""
    found = []
    for images, labels in loader:
        for image, label in zip(images, labels, strict=True):
            found.append((round(image.mean().item()), label.item()))
    return found


def by_class(pairs: list[tuple[int, int]]) -> dict[str, set[int]]:
    """The labels of the images of each class, told by their brightness."""
    found: dict[str, set[int]] = {}
    for grey, label in pairs:
        name = max((n for n, low in GREY.items() if low <= grey), key=GREY.__getitem__)
        found.setdefault(name, set()).add(label)
    return found


# Classes


def test_the_class_is_the_first_folder_below_the_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            write(tmp_path / split / name, name)
            for place in ("indoor", "outdoor"):
                write(tmp_path / split / name / place / "today", name, start=3)
    write(tmp_path / "train" / ".thumbnails", "ant")
    data = folder_data(tmp_path)
    data.setup("fit")
    assert data.class_names == ["ant", "bee"]
    assert by_class(served(data.train_dataloader())) == {"ant": {0}, "bee": {1}}
    assert len(served(data.val_dataloader())) == 12


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_another_root_is_scored_by_the_names_of_classes(tmp_path: Path, stage: str) -> None:
    """There is no training image, the first class is missing, and numbers of folders are others."""
    split = {"validate": "val", "test": "test"}[stage]
    for name in ("bee", "wasp"):
        write(tmp_path / split / name, name)
    data = folder_data(tmp_path)
    data.follow(ImageSpec(class_names=("ant", "bee", "wasp")))
    data.setup(stage)
    loader = data.val_dataloader() if stage == "validate" else data.test_dataloader()
    assert by_class(served(loader)) == {"bee": {1}, "wasp": {2}}
    assert data.class_names == ["ant", "bee", "wasp"]
    assert data.num_classes == 3


def test_an_unknown_class_is_refused_until_it_has_its_name_again(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        write(tmp_path / "test" / name, name)
    (tmp_path / "test" / "ant").rename(tmp_path / "test" / "formica")
    trained = ImageSpec(class_names=("ant", "bee"))
    data = folder_data(tmp_path)
    data.follow(trained)
    with pytest.raises(DataError, match=r"training images do not have: 'formica' .*ant, bee"):
        data.setup("test")
    (tmp_path / "test" / "formica").rename(tmp_path / "test" / "ant")  # as it says
    data = folder_data(tmp_path)
    data.follow(trained)
    data.setup("test")
    assert by_class(served(data.test_dataloader())) == {"ant": {0}, "bee": {1}}


def test_validation_may_lack_a_class(tmp_path: Path) -> None:
    for name in GREY:
        write(tmp_path / "train" / name, name)
    write(tmp_path / "val" / "wasp", "wasp")
    data = folder_data(tmp_path)
    data.setup("fit")
    assert by_class(served(data.val_dataloader())) == {"wasp": {2}}


def test_held_out_images_of_a_part_of_the_classes_keep_their_numbers(tmp_path: Path) -> None:
    for name in ("bee", "wasp"):
        write(tmp_path / "train" / name, name, 6)
    data = folder_data(tmp_path, val_fraction=0.5)
    data.follow(ImageSpec(class_names=("ant", "bee", "wasp")))
    data.setup("validate")
    assert by_class(served(data.val_dataloader())) == {"bee": {1}, "wasp": {2}}


# Flat folders


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name in GREY:
        write(tmp_path / name, name, 20)
    return tmp_path


def test_a_flat_folder_is_split_into_disjoint_parts(
    flat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = folder_data(flat)
    data.setup("fit")
    data.setup("test")
    parts = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    seen = [served(part) for part in parts]
    assert [len(part) for part in seen] == [48, 6, 6]
    assert len({grey for part in seen for grey, _ in part}) == 60
    for part in seen:
        assert by_class(part) == {"ant": {0}, "bee": {1}, "wasp": {2}}
    assert "has classes and no splits: 6 of its 60 images are kept for testing" in caplog.text
    assert "6 of its 60 images are scored, the share that fit would keep" in caplog.text


def test_the_test_part_is_the_same_from_the_checkpoint_and_all_has_everything(flat: Path) -> None:
    trained = folder_data(flat)
    trained.setup("fit")
    kept = {grey for subset in trained._splits.fit_subsets for grey in files(subset)}  # type: ignore[arg-type]
    later = folder_data(flat)
    later.follow(trained.image_spec)
    later.setup("test")
    assert not kept & files(later._splits.test)
    assert len(kept | files(later._splits.test)) == 60
    everything = folder_data(flat, test_split="all")
    everything.follow(trained.image_spec)
    everything.setup("test")
    assert len(files(everything._splits.test)) == 60


def files(part: Any) -> set[str]:
    indices = range(len(part.source)) if part.indices is None else part.indices
    return {part.source.file(index) for index in indices}


def test_a_flat_folder_may_be_trained_on_as_a_whole(flat: Path) -> None:
    data = folder_data(flat, val_fraction=0)
    data.setup("fit")
    assert len(served(data.train_dataloader())) == 60
    with pytest.raises(DataError, match=r"no split 'test', .*--data\.test_split all scores all"):
        data.setup("test")


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize(
    "change", ["more", "fewer", "another fraction", "another folder with the same images", "none"]
)
def test_it_is_said_when_other_images_are_held_out_than_in_training(
    flat: Path, caplog: pytest.LogCaptureFixture, stage: str, change: str
) -> None:
    trained = folder_data(flat)
    trained.setup("fit")
    caplog.clear()
    if change == "more":
        write(flat / "ant", "ant", 1, start=20)
    elif change == "fewer":
        (flat / "ant" / "ant03.png").unlink()
    elif change == "another folder with the same images":
        flat = flat.rename(flat.with_name(f"{flat.name} moved"))
    later = folder_data(flat, **({"val_fraction": 0.2} if change == "another fraction" else {}))
    later.follow(trained.image_spec)
    later.setup(stage)
    is_another = change in ("more", "fewer", "another fraction")
    assert ("some of those that are scored may have been trained on" in caplog.text) == is_another
    later = folder_data(flat, test_split="all")
    later.follow(trained.image_spec)
    caplog.clear()
    later.setup("test")
    assert "trained on" not in caplog.text


def test_held_out_images_of_a_split_that_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in GREY:
        write(tmp_path / "train" / name, name, 10)
    trained = folder_data(tmp_path)
    trained.setup("fit")
    write(tmp_path / "train" / "bee", "bee", 1, start=10)
    later = folder_data(tmp_path)
    later.follow(ImageSpec.from_dict(trained.image_spec.to_dict()))  # type: ignore[arg-type]
    later.setup("validate")
    assert "some of those that are scored may have been trained on" in caplog.text


def test_images_whose_names_differ_in_zeros_and_case_are_in_one_order(tmp_path: Path) -> None:
    names = ["B.png", "b.png", "01.png", "1.png", "001.png", "5\N{SUPERSCRIPT TWO}3.png", "10.png"]
    orders = []
    for number in range(2):
        folder = tmp_path / str(number) / "ant"
        folder.mkdir(parents=True)
        for name in names:
            Image.new("L", (12, 12), 40).save(folder / name)
        names.reverse()
        source = read_pictures(tmp_path / str(number), ["ant"])
        orders.append([Path(source.file(index)).name for index in range(len(source))])
    assert orders[0] == orders[1]
    assert orders[0].index("1.png") < orders[0].index("10.png")


def test_pictures_of_other_formats_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in GREY:
        write(tmp_path / "train" / name, name)
    folder_data(tmp_path, val_fraction=0).setup("fit")
    assert "left out" not in caplog.text
    for name in ("a.gif", "b.GIF", "c.heic", "notes.txt"):
        (tmp_path / "train" / "ant" / name).touch()
    folder_data(tmp_path, val_fraction=0).setup("fit")
    assert (
        "pictures that are left out (2 .gif, 1 .heic); convert them to one of .png" in caplog.text
    )


@pytest.mark.parametrize("splits", [("Train", "Test"), ("Training", "Testing", "Val")])
def test_splits_may_begin_with_capitals(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        for name in GREY:
            write(tmp_path / split / name, name, 10)
    data = folder_data(tmp_path)
    data.setup("fit")
    data.setup("test")
    assert data.class_names == list(GREY)
    assert len(served(data.test_dataloader())) == 30
    assert len(served(data.val_dataloader())) == (30 if "Val" in splits else 3)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    for folder, name in (("Bus", "ant"), ("Car", "bee"), ("Train", "wasp")):
        write(tmp_path / folder, name, 20)
    data = folder_data(tmp_path)
    data.setup("fit")
    assert data.class_names == ["Bus", "Car", "Train"]


def test_too_few_images_to_keep_some_for_testing(tmp_path: Path) -> None:
    for name in GREY:
        write(tmp_path / name, name, 1 if name == "bee" else 9)
    few = r"Of 19 images .* for testing \(the smallest class, 'bee', has 1\); add images, or "
    with pytest.raises(DataError, match=few + r"change --data\.val_fraction \(0 keeps none\)"):
        folder_data(tmp_path).setup("fit")
    folder_data(tmp_path, val_fraction=0).setup("fit")
    for split in ("test", "all"):
        data = folder_data(tmp_path, test_split=split)
        data.follow(ImageSpec(class_names=tuple(GREY)))
        if split == "all":
            data.setup("test")
            continue
        with pytest.raises(DataError, match=few + "--data.test_split all to score all of them"):
            data.setup("test")


def test_a_tree_with_splits_is_not_taken_for_a_flat_one(tmp_path: Path) -> None:
    write(tmp_path / "val" / "ant", "ant")
    write(tmp_path / "val" / "bee", "bee")
    with pytest.raises(DataError, match=r"no split 'train'"):
        folder_data(tmp_path).setup("fit")


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    said = r"' contains no images .*set --data.root to the folder that holds train/CLASS/IMAGE"
    with pytest.raises(DataError, match=said):
        folder_data(tmp_path).setup("fit")
    # A split that is asked for and not there is another matter.
    write(tmp_path / "train" / "ant", "ant")
    with pytest.raises(DataError, match=r"no split 'test'"):
        folder_data(tmp_path).setup("test")


@pytest.mark.parametrize("split", ["", "train"])
def test_one_class_is_not_trained_on_but_may_be_scored(tmp_path: Path, split: str) -> None:
    write(tmp_path / split / "bee", "bee", 20)
    data = folder_data(tmp_path)
    with pytest.raises(DataError, match=r"images of a single class, 'bee'.*add images"):
        data.setup("fit")
    scored = folder_data(tmp_path, test_split="train")
    scored.follow(ImageSpec(class_names=("ant", "bee")))
    scored.setup("test")
    assert {label for _, label in served(scored.test_dataloader())} == {1}


def test_a_root_without_dataset_is_an_image_folder(
    flat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ImageData(root=str(flat), image_size=8, num_workers=0)
    assert "is read as an image folder (--data.dataset folder)" in caplog.text
    assert data.class_names == list(GREY)
    assert data.image_shape == (3, 8, 8)
    assert data.image_spec.crop_pct == 0.875


# Images to predict


TRAINED = ImageSpec(class_names=("ant", "bee", "wasp"))


def predicted(root: Path, **options: Any) -> dict[str, int]:
    """The labels by the files' paths, relative to the root."""
    data = folder_data(root, **options)
    data.follow(TRAINED)
    data.setup("predict")
    labels = [label for _, label in served(data.predict_dataloader())]
    paths = data.predicted_files()
    assert paths is not None
    base = root if root.is_dir() else root.parent
    names = [Path(path).relative_to(base).as_posix() for path in paths]
    return dict(zip(names, labels, strict=True))


def test_images_to_predict_lie_in_any_layout(tmp_path: Path) -> None:
    write(tmp_path / "one", "bee", 3)
    assert predicted(tmp_path / "one" / "bee01.png") == {"bee01.png": -1}
    assert predicted(tmp_path / "one") == {f"bee0{i}.png": -1 for i in range(3)}
    tree = tmp_path / "tree"
    write(tree, "ant", 1)
    write(tree / "2024" / "wasp" / "june", "wasp", 1)
    write(tree / "unknown", "bee", 1)
    found = {"ant00.png": -1, "2024/wasp/june/wasp00.png": 2, "unknown/bee00.png": -1}
    assert predicted(tree) == found


def test_a_test_split_is_predicted_with_and_without_labels(tmp_path: Path) -> None:
    write(tmp_path / "train" / "ant", "ant")
    write(tmp_path / "test", "ant", 1)
    write(tmp_path / "test" / "wasp", "wasp", 1)
    assert predicted(tmp_path) == {"test/ant00.png": -1, "test/wasp/wasp00.png": 2}
    everything = predicted(tmp_path, test_split="all")
    assert everything.keys() - predicted(tmp_path).keys() == {
        "train/ant/ant00.png",
        "train/ant/ant01.png",
    }
    with pytest.raises(DataError, match=r"no split 'new'"):
        predicted(tmp_path, test_split="new")


def test_of_the_folder_that_was_trained_on_the_test_part_is_predicted(flat: Path) -> None:
    data = folder_data(flat)
    data.follow(folder_data(flat).image_spec)
    data.setup("predict")
    assert len(data.predicted_files() or ()) == 6
    assert len(predicted(flat)) == 60  # trained elsewhere


def test_nothing_to_predict(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"No images in '.*empty'"):
        predicted(tmp_path / "empty")
    with pytest.raises(
        DataError, match=r"There is no folder '.*gone'; set --data.root to the folder"
    ):
        predicted(tmp_path / "gone")


def test_one_image_cannot_be_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "ant", 1)
    with pytest.raises(DataError, match=r"is a file.*gpd predict --images"):
        folder_data(tmp_path / "ant00.png").setup("fit")


# Values


def saved(path: Path, values: np.ndarray) -> Image.Image:
    Image.fromarray(values).save(path)
    return Image.open(path)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_16_bit_images_are_scaled_to_8(tmp_path: Path, ending: str, mode: str) -> None:
    values = np.array([[0, 257, 32767], [32896, 65534, 65535]], dtype=np.uint16)
    image = to_mode(saved(tmp_path / f"x.{ending}", values), mode)
    expected = np.array([[0, 1, 127], [128, 255, 255]], dtype=np.uint8)
    pixels = np.asarray(image)
    assert image.mode == mode
    assert np.array_equal(pixels if mode == "L" else pixels[..., 2], expected)


def test_32_bit_images_are_read_where_their_range_is_plain(tmp_path: Path) -> None:
    shares = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(to_mode(saved(tmp_path / "f.tif", shares), "L")).tolist() == [[0, 128, 255]]
    bytes_ = np.array([[0, 7, 255]], dtype=np.int32)
    assert np.asarray(to_mode(saved(tmp_path / "i.tif", bytes_), "L")).tolist() == [[0, 7, 255]]
    for name, values in (("a", bytes_ * 100), ("b", bytes_ - 1)):
        with pytest.raises(ValueError, match="no known range"):
            to_mode(saved(tmp_path / f"{name}.tif", values), "L")


def test_16_bit_images_differ_as_they_are_served(tmp_path: Path) -> None:
    for name, value in (("bright", 50000), ("dark", 10000)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for number in range(2):
            values = np.full((12, 12), value, dtype=np.uint16)
            Image.fromarray(values).save(folder / f"{number}.png")
    data = folder_data(tmp_path, val_fraction=0)
    data.setup("fit")
    assert set(served(data.train_dataloader())) == {(195, 0), (39, 1)}
    odd = tmp_path / "train" / "dark" / "odd.tif"
    Image.fromarray(np.full((12, 12), 70000, dtype=np.int32)).save(odd)
    data = folder_data(tmp_path, val_fraction=0)
    with pytest.raises(
        DataError, match=r"odd\.tif cannot be read \(its 32-bit values from 0 to 70000"
    ):
        served(data.train_dataloader())


# Classes named like splits, or by numbers


def test_classes_may_have_the_names_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "valid", "ant", 10)
    write(tmp_path / "invalid", "bee", 10)
    data = folder_data(tmp_path)
    assert data.class_names == ["invalid", "valid"]
    assert by_class(served(data.test_dataloader())) == {"ant": {1}, "bee": {0}}
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert by_class(served(loader)) == {"ant": {1}, "bee": {0}}


def test_a_split_without_classes_lies_beside_one_with_classes(tmp_path: Path) -> None:
    write(tmp_path / "Train" / "ant", "ant")
    write(tmp_path / "Test", "bee", 3)
    assert len(predicted(tmp_path, train_split="Train", test_split="Test")) == 3
    assert len(predicted(tmp_path)) == 3


def test_folders_of_splits_need_folders_of_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / split, "ant")
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match=r"There are images directly in '.*train'"):
        folder_data(tmp_path).setup("fit")


@pytest.mark.parametrize("is_named", [True, False])
def test_classes_named_by_numbers_are_matched_by_name(tmp_path: Path, is_named: bool) -> None:
    """Folders have the order 0, 1, 10, 11, 2; labels without names are in the order of numbers."""
    for number in range(12):
        (tmp_path / "test" / f"{number}").mkdir(parents=True)
        Image.new("L", (8, 8), 10 * number).save(tmp_path / "test" / f"{number}" / "0.png")
    names = tuple(sorted(map(str, range(12)))) if is_named else None
    data = folder_data(tmp_path)
    data.follow(ImageSpec(class_names=names, classes=None if is_named else 12))
    data.setup("test")
    found = {grey // 10: label for grey, label in served(data.test_dataloader())}
    order = [str(number) for number in range(12)] if names is None else list(names)
    assert found == {number: order.index(str(number)) for number in range(12)}


def test_that_classes_are_matched_by_position_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in GREY:
        write(tmp_path / "test" / name, name)
    data = folder_data(tmp_path)
    data.follow(ImageSpec(classes=3))
    data.setup("test")
    assert by_class(served(data.test_dataloader())) == {"ant": {0}, "bee": {1}, "wasp": {2}}
    assert "matched by position: 0 is ant, 1 is bee, 2 is wasp." in caplog.text


# The folder of the training


def test_the_data_of_the_training_is_read_wherever_the_command_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another folder of the same name may hold other images."""
    for folder in ("one", "two"):
        (tmp_path / folder / "data").mkdir(parents=True)
    own = str(tmp_path / "one" / "data")
    trained = ImageSpec(root=own)
    with chdir(tmp_path / "one"):
        assert trained.present_root("data") == "data"
    with chdir(tmp_path):
        assert trained.present_root("data") == own
    assert caplog.text == ""
    with chdir(tmp_path / "two"):
        assert trained.present_root("data") == own
        assert f"The data is that of the training, in '{own}'." in caplog.text
        (tmp_path / "one" / "data").rmdir()
        assert trained.present_root("data") == "data"
        assert "is gone; 'data' is read" in caplog.text
