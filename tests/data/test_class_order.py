"""Classes have the numbers that torchvision's ImageFolder gives them, and keep them."""

from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from gpd_cli.__main__ import main
from gpd_cli.data import ImageData

NAMES = ["1", "2", "10", "b", "A"]
CONFIG = """
model:
  student: resnet18
  student_args: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}
  num_classes: 5
  ratio: 1
  branches: 1
data: {dataset: folder, root: data, image_size: 16, batch_size: 5, num_workers: 0}
trainer: {accelerator: cpu, max_epochs: 1}
"""
LAST = ["--ckpt_path", "runs/tiny/version_0/checkpoints/last.ckpt"]


def make_tree(root: Path, names: list[str]) -> None:
    for split in ("train", "val", "test"):
        for k, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 20), (40 * k, 100 * i, 120)).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    make_tree(tmp_path / "data", NAMES)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with chdir(tmp_path):
        yield tmp_path


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def edit(path: Path, names: list[str] | None) -> None:
    """Let a checkpoint have other class names, or none, as older ones."""
    content = torch.load(path, weights_only=True)
    del content["class_names"]
    content["gpd"].pop("images", None)
    if names is not None:
        content["class_names"] = names
    torch.save(content, path)


def test_classes_of_folders_have_the_numbers_of_torchvision(folder: Path) -> None:
    data = ImageData(dataset="folder", root="data", image_size=16, batch_size=5, num_workers=0)
    data.setup("fit")
    expected = ImageFolder("data/val")
    assert data.class_names == expected.classes == ["1", "10", "2", "A", "b"]
    _, validation = data._splits.fit_subsets
    assert validation is not None
    source: Any = validation.source
    ours = {str(Path(path)): label for path, label in source.reader.samples}
    assert ours == {str(Path(path)): label for path, label in expected.samples}
    assert sorted(source.labels()) == sorted(expected.targets)
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert labels.tolist() == source.labels().tolist()


def test_a_run_goes_on_with_the_classes_of_its_checkpoint_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", "tiny.yaml"]) == 0
    path = folder / LAST[1]
    assert torch.load(path, weights_only=True)["class_names"] == ["1", "10", "2", "A", "b"]
    longer = ["fit", "-c", "tiny.yaml", "--trainer.max_epochs", "2", *LAST]
    edit(path, ["1", "2", "10", "A", "b"])
    assert main(longer) == 1
    assert "class 1 is '2' in the checkpoint and '10' in the data" in refusal(capsys)
    edit(path, ["1", "10", "2", "a", "b"])
    assert main(longer) == 1
    assert "class 3 is 'a' in the checkpoint and 'A' in the data" in refusal(capsys)


def test_an_older_checkpoint_of_numbered_folders_is_refused_until_both_orders_agree(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", "tiny.yaml"]) == 0
    edit(folder / LAST[1], None)
    assert main(["test", *LAST]) == 1
    error = refusal(capsys)
    assert "1, 2, 10, A" in error
    assert "1, 10, 2, A" in error
    for split in ("train", "val", "test"):
        for name in ("1", "2"):
            (folder / "data" / split / name).rename(folder / "data" / split / f"0{name}")
    assert main(["test", *LAST]) == 0
