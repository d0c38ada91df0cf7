"""Networks trained on data that number their classes and do not name them."""

import csv
import io
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpd_cli.__main__ import main
from gpd_cli.data import ImageData, ImageSpec
from gpd_cli.errors import DataError
from gpd_cli.teacher.checkpoint import image_spec
from shard_files import Files, write_shard

COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))
CONFIG = """
model:
  student: resnet18
  student_args: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], num_classes: 3}
  branches: 1
data:
  dataset: wds/colours
  root: shards
  train_split: train-0.tar|12
  val_split: val-0.tar
  test_split: test-0.tar
  classes: 3
  image_size: 16
  batch_size: 6
  num_workers: 0
  no_aug: true
trainer: {accelerator: cpu, max_epochs: 1, enable_progress_bar: false}
"""


def samples(count: int) -> Iterator[Files]:
    for number in range(count):
        image = io.BytesIO()
        Image.new("RGB", (20, 20), COLOURS[number % 3]).save(image, "png")
        yield {"png": image.getvalue(), "cls": b"%d" % (number % 3)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run; the shards that it was trained on are gone."""
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("colours")
    (folder / "shards").mkdir()
    for split, count in (("train", 12), ("val", 6), ("test", 9)):
        write_shard(folder / "shards" / f"{split}-0.tar", samples(count))
    (folder / "c.yaml").write_text(CONFIG)
    with chdir(folder):
        assert main(["fit", "-c", "c.yaml"]) == 0
    (folder / "shards" / "train-0.tar").unlink()
    return folder


@pytest.fixture
def last(run: Path) -> str:
    return str(run / "runs" / "c" / "version_0" / "checkpoints" / "last.ckpt")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_shards_are_scored_and_predicted_without_those_of_training(
    run: Path, last: str, tmp_path: Path
) -> None:
    table = tmp_path / "p.csv"
    with chdir(run):
        assert main(["test", "--ckpt_path", last]) == 0
        assert main(["validate", "--ckpt_path", last]) == 0
        assert main(["predict", "--ckpt_path", last, "--output", str(table)]) == 0
    assert [row["label"] for row in rows(table)] == ["0", "1", "2"] * 3
    assert {row["student_class"] for row in rows(table)} <= {"0", "1", "2"}


def test_photos_are_predicted_by_class_number(run: Path, last: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), COLOURS[0]).save(tmp_path / "one.png")
    for place in (tmp_path, tmp_path / "one.png"):
        table = tmp_path / "p.csv"
        arguments = ["predict", "--ckpt_path", last, "--images", str(place)]
        assert main([*arguments, "--output", str(table)]) == 0
        (row,) = rows(table)
        assert row["file"] == str(tmp_path / "one.png")
        assert row["student_class"] in ("0", "1", "2")


def test_checkpoints_of_earlier_versions_know_the_number_by_their_network(last: str) -> None:
    content = torch.load(last, weights_only=True)
    del content["gpd"]["images"]["classes"]
    found = image_spec(content)
    assert found is not None
    assert (found.class_names, found.classes) == (None, 3)


def test_a_split_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "test" / name / "0.png")
    data = ImageData("folder", root=str(tmp_path), num_workers=0)
    data.follow(ImageSpec(classes=3))
    with pytest.raises(DataError, match=r"has 2 classes but the training images have 3"):
        data.setup("test")
