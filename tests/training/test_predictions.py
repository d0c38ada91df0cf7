"""From a checkpoint alone to a table of named classes, and the score of any other folder."""

import csv
import io
import json
import os
import shutil
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gpd_cli.__main__ import main
from gpd_cli.commands.predictions import Row, write_rows
from gpd_cli.teacher.checkpoint import load_networks

COLOURS = {"ant": (250, 20, 20), "bee": (20, 250, 20), "wasp": (20, 20, 250)}
CONFIG = """
model:
  student: resnet18
  student_args: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], num_classes: 3}
  branches: 1
  optimizer: {lr: 0.05}
data: {root: all, image_size: 16, batch_size: 6, num_workers: 0, no_aug: true}
trainer: {accelerator: cpu, max_epochs: 6, enable_progress_bar: false}
"""


def write(folder: Path, name: str, count: int = 4) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        colour = tuple(value - 4 * number if value > 100 else value for value in COLOURS[name])
        Image.new("RGB", (20, 20), colour).save(folder / f"{name}{number}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run that tells colours apart; its images are gone."""
    folder = tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        for name in COLOURS:
            write(folder / "all" / split / name, name, 12 if split == "train" else 2)
    (folder / "c.yaml").write_text(CONFIG)
    with chdir(folder):
        assert main(["fit", "-c", "c.yaml"]) == 0
    shutil.rmtree(folder / "all")
    return folder


@pytest.fixture
def checkpoint(run: Path) -> str:
    return str(run / "runs" / "c" / "version_0" / "checkpoints" / "last.ckpt")


def say(folder: Path, *arguments: str) -> int:
    with chdir(folder):
        return main(list(arguments))


@pytest.mark.slow
def test_a_checkpoint_knows_its_classes_and_preprocessing(run: Path, checkpoint: str) -> None:
    images = load_networks(checkpoint)[1].images
    assert images is not None
    assert images.class_names == ("ant", "bee", "wasp")
    assert (images.size, images.channels, images.crop_pct) == ((16, 16), 3, 0.875)
    assert images.mean == pytest.approx((0.485, 0.456, 0.406))
    assert images.interpolation == "bilinear"
    assert (images.dataset, images.root) == ("folder", str((run / "all").resolve()))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pictures_of_a_weights_file_have_the_networks_classes(
    run: Path, checkpoint: str, tmp_path: Path, suffix: str
) -> None:
    weights = str(tmp_path / f"student{suffix}")
    assert main(["extract", "--ckpt_path", checkpoint, "--output", weights]) == 0
    for name, folder in (("ant", "beach"), ("wasp", "forest"), ("wasp", "bee")):
        write(tmp_path / "holiday" / folder, name)
    settings = json.dumps({"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]})
    table = ["predict", "--model.student", "resnet18", "--model.student_args", settings]
    table += ["--model.num_classes", "3", "--model.student_weights", weights]
    # The file of `extract` says how images are prepared, too.
    table += ["--data.image_size", "16"] if suffix == ".pth" else []
    table += ["--images", "holiday", "--trainer.accelerator", "cpu"]
    assert say(tmp_path, *table, "--output", "p.csv") == 0
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    known = ["predict", "--ckpt_path", checkpoint, "--images", "holiday", "--output", "known.csv"]
    assert say(tmp_path, *known) == 0
    with (tmp_path / "known.csv").open() as file:
        expected = {row["file"]: row["student_probability"] for row in csv.DictReader(file)}
    assert {row["file"]: row["student_probability"] for row in rows} == expected
    names = ["ant", "bee", "wasp"] if suffix == ".safetensors" else ["0", "1", "2"]
    right = {"ant": names[0], "wasp": names[2]}
    assert len(rows) == 12
    assert all(row["student_class"] == right[Path(row["file"]).name[:-5]] for row in rows)
    labels = {Path(row["file"]).parent.name: row["label"] for row in rows}
    assert labels == {"beach": "", "forest": "", "bee": "bee" if suffix == ".safetensors" else ""}
    # No other folder of pictures is needed, and a single picture will do.
    single = [*table[: table.index("--images")], "--images", "holiday/beach/ant0.png"]
    assert say(tmp_path, *single, "--trainer.accelerator", "cpu", "--output", "p.csv") == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 2


OWN_DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Bare(LightningDataModule):
    def predict_dataloader(self):
        return DataLoader(IMAGES, batch_size=4)


class One(Bare):
    def predict_dataloader(self):
        return [super().predict_dataloader()]


class Two(Bare):
    def predict_dataloader(self):
        return [super().predict_dataloader()] * 2


class Named(Bare):
    def predict_dataloader(self):
        return {name: super(Named, self).predict_dataloader() for name in "ab"}
"""


def test_own_data_may_give_images_alone(
    tmp_path: Path,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_images.py").write_text(OWN_DATA)
    options = ["--ckpt_path", checkpoint, "--output", str(tmp_path / "p.csv")]
    for name in ("Bare", "One"):
        assert main(["predict", "--data", f"own_images.{name}", *options]) == 0
        with (tmp_path / "p.csv").open() as file:
            assert [row["label"] for row in csv.DictReader(file)] == [""] * 6
    for name in ("Two", "Named"):
        capsys.readouterr()
        assert main(["predict", "--data", f"own_images.{name}", *options]) == 1
        assert "The data has 2 loaders of images to predict" in capsys.readouterr().err


def test_images_in_any_layout_are_predicted_by_name(
    tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "mail", "ant", 1)
    write(tmp_path / "mail" / "2024", "wasp", 1)
    write(tmp_path / "mail" / "bee", "bee", 1)
    table = ["predict", "--ckpt_path", checkpoint, "--images", "mail"]
    assert say(tmp_path, *table, "--output", "p.csv") == 0
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {row["file"]: (row["label"], row["student_class"]) for row in rows}
    assert found == {
        "mail/ant0.png": ("", "ant"),
        "mail/2024/wasp0.png": ("", "wasp"),
        "mail/bee/bee0.png": ("bee", "bee"),
    }
    assert all(0.34 < float(row["teacher_probability"]) <= 1 for row in rows)

    assert say(tmp_path, *table[:-1], "mail/ant0.png", "--output", "p.jsonl", "--top", "9") == 0
    (line,) = (tmp_path / "p.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["file"], entry["label"]) == ("mail/ant0.png", None)
    for network in ("student", "teacher"):
        likeliest = [top["class"] for top in entry[network]]
        assert likeliest[0] == "ant"
        assert sorted(likeliest) == ["ant", "bee", "wasp"]
        assert sum(top["probability"] for top in entry[network]) == pytest.approx(1, abs=1e-5)

    assert say(tmp_path, *table, "--output", "p.txt") == 1
    assert "its suffix must be one of .csv, .jsonl" in capsys.readouterr().err


def test_names_that_are_no_text_keep_their_bytes(
    tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of files are bytes; such as are no UTF-8 come from older systems and archives."""
    folder = os.fsdecode(b"courrier \xe9t\xe9")
    try:
        write(tmp_path / folder, "bee", 1)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    table = ["predict", "--ckpt_path", checkpoint, "--images"]
    assert say(tmp_path, *table, ".", "--output", f"{folder}/p.csv") == 0
    with (tmp_path / folder / "p.csv").open(encoding="utf-8", errors="surrogateescape") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == f"./{folder}/bee0.png"
    assert b"courrier \xe9t\xe9/bee0.png" in (tmp_path / folder / "p.csv").read_bytes()
    assert say(tmp_path, *table, ".", "--output", "p.jsonl") == 0
    (line,) = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["file"] == f"./{folder}/bee0.png"


def test_names_of_classes_that_are_no_text_keep_their_bytes(tmp_path: Path) -> None:
    rows = {0: Row({"student": [(0, 0.5), (1, 0.25)]}, 1)}
    names = ["pâté", os.fsdecode(b"p\xe2t\xe9")]
    write_rows(tmp_path / "p.csv", rows, names)
    text = (tmp_path / "p.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert text.splitlines()[1] == f"0,{names[1]},pâté,0.500000,{names[1]},0.250000"
    write_rows(tmp_path / "p.jsonl", rows, names)
    entry = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8"))
    assert [entry["label"], *(top["class"] for top in entry["student"])] == [names[1], *names]


def scores(folder: Path, checkpoint: str, capsys: Any, *options: str) -> dict[str, float]:
    """What `gpd test` prints, by name."""
    capsys.readouterr()
    assert say(folder, "test", "--ckpt_path", checkpoint, "--data.root", ".", *options) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: float(line[1]) for line in lines if len(line) == 2 and "test/" in line[0]}


def test_another_folder_is_scored_by_class_names(
    tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first class is missing, so that folders are numbered otherwise."""
    for name in ("bee", "wasp"):
        write(tmp_path / "test" / name, name)
    assert scores(tmp_path, checkpoint, capsys)["test/student_top1"] == 100
    (tmp_path / "test" / "wasp").rename(tmp_path / "test" / "Vespa")
    assert say(tmp_path, "test", "--ckpt_path", checkpoint, "--data.root", ".") == 1
    error = capsys.readouterr().err
    assert "training images do not have: 'Vespa' (those of training are ant, bee, wasp)" in error


def test_a_checkpoint_of_before_still_names_its_classes(
    tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["gpd"]["images"]
    torch.save(content, tmp_path / "old.ckpt")
    images = load_networks(tmp_path / "old.ckpt")[1].images
    assert images is not None
    assert images.class_names == ("ant", "bee", "wasp")
    assert images.crop_pct == 0.875
    write(tmp_path / "test" / "wasp", "wasp")
    assert scores(tmp_path, "old.ckpt", capsys)["test/student_top1"] == 100
