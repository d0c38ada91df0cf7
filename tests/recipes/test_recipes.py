"""Every recipe takes two steps, on generated images of the shape it is made for."""

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gpd_cli.__main__ import main
from gpd_cli.files import save_tensors
from gpd_cli.models import create_model

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET = sorted(CONFIGS.glob("imagenet/*/*.yaml"))
PAIRS = sorted(path for path in CONFIGS.glob("cifar100/*.yaml") if path.stem != "base")
METHODS = sorted(CONFIGS.glob("methods/*.yaml"))
SPLITS = {"train": 12, "val": 2, "test": 2}  # images per class
CLASSES = ("cat", "dog")


def images(folder: Path, size: int) -> Path:
    random = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {size: images(tmp_path_factory.mktemp(f"images{size}"), size) for size in (32, 64, 224)}


def weights(folder: Path, name: str) -> str:
    """A file of untrained weights."""
    torch.manual_seed(0)
    path = folder / "weights.safetensors"
    save_tensors(path, create_model(name, num_classes=len(CLASSES)).state_dict())
    return str(path)


def trains(folder: Path, data: Path, *arguments: str, steps: int = 2) -> None:
    options = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--data.root", str(data)]
    options += ["--model.num_classes", "2", "--data.batch_size", "4", "--data.num_workers", "0"]
    with chdir(folder):
        assert main(["fit", *arguments, *options, "--trainer.fast_dev_run", str(steps)]) == 0


def entry(path: Path, key: str) -> str | None:
    return yaml.safe_load(path.read_text()).get(key)


def test_the_recipe_of_a_network_alone_names_the_rates_that_pairs_have_for_their_students() -> None:
    text = (CONFIGS / "cifar100" / "alone.yaml").read_text()
    of_pairs = {entry(path, "model.student"): entry(path, "model.optimizer.lr") for path in PAIRS}
    others = {str(name): rate for name, rate in of_pairs.items() if name and rate}
    assert len(others) == 3
    for name, rate in others.items():
        assert name in text
        assert f"--model.optimizer.lr {rate}" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_imagenet(path: Path, data: dict[int, Path], tmp_path: Path) -> None:
    options = ["-c", str(path)]
    teacher, student = entry(path, "model.static_teacher.name"), entry(path, "model.student")
    if teacher is not None:
        options += ["--model.static_teacher.weights", weights(tmp_path, teacher)]
    elif path.parent.stem == "finetune":
        assert student is not None
        options += ["--model.student_weights", weights(tmp_path, student)]
    size = 224 if "rvt" in path.stem else 64  # a convolutional network takes any size
    # One step, since merging and moving the 150 million numbers of a ResNet-18 takes seconds.
    trains(tmp_path, data[size], *options, "--data.image_size", str(size), steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_pairs(path: Path, data: dict[int, Path], tmp_path: Path) -> None:
    teacher = entry(path, "model.static_teacher.name")
    if teacher is None:
        options = ["--model.student", "cifar_resnet8"]
    else:
        options = ["--model.static_teacher.weights", weights(tmp_path, teacher)]
    trains(tmp_path, data[32], "-c", str(path), *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "method"),
    [  # stages with names of their own, before activations, of unequal sizes
        ("vgg8", "reviewkd"),
        ("mobilenetv2_half", "reviewkd"),
        ("wrn_16_2", "reviewkd"),
        ("shufflenetv2", "fitnets"),
        ("shufflenetv1", "at"),
        ("vgg8", "catkd"),
    ],
)
def test_methods_of_pairs(pair: str, method: str, data: dict[int, Path], tmp_path: Path) -> None:
    files = CONFIGS / "cifar100" / f"{pair}.yaml", CONFIGS / "methods" / f"{method}.yaml"
    teacher = entry(files[0], "model.static_teacher.name")
    assert teacher is not None
    options = ["--model.static_teacher.weights", weights(tmp_path, teacher)]
    trains(tmp_path, data[32], "-c", str(files[0]), "-c", str(files[1]), *options)


@pytest.mark.parametrize("alone", [False, True], ids=["gpd", "alone"])
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_methods(path: Path, alone: bool, data: dict[int, Path], tmp_path: Path) -> None:
    options = ["--model.static_teacher.weights", weights(tmp_path, "cifar_resnet14")]
    options += ["--model.static_teacher.name", "cifar_resnet14", "--model.student", "cifar_resnet8"]
    options += ["--model.branches", "1"]
    if path.stem == "simkd":
        options += ["--model.student", "simkd/cifar_resnet8"]
        options += ["--model.student_args", "{features: 64}"]
    if path.stem == "crd":
        options += ["--model.method.num_images", str(SPLITS["train"] * len(CLASSES))]
    if alone:
        options += ["--model.ratio", "1"]
    recipe = CONFIGS / "cifar100" / "resnet20.yaml"
    trains(tmp_path, data[32], "-c", str(recipe), "-c", str(path), *options)
