"""A student and data of a user's own, by the path of their class."""

import csv
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from documentation import commands, python_file
from gpd_cli.__main__ import main
from gpd_cli.commands.expand import expand_command
from gpd_cli.errors import ModelError, WeightsError
from gpd_cli.models import ModelSpec, create_model, input_shape

PAGE = "docs/own.md"
LAST = "runs/gpd/version_0/checkpoints/last.ckpt"
CPU = ["--trainer.accelerator", "cpu"]


class Fixed(nn.Module):
    """A network that does not take its number of classes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.convolution(images).mean(dim=(2, 3)))


def build(width: int) -> nn.Module:
    return Fixed(width)


def unannotated(width: int):  # type: ignore[no-untyped-def]
    raise AssertionError("this must not be called")


class Folding(nn.Module):
    """A network whose stem folds pixels into channels, and whose classifier is registered first."""

    pretrained_cfg: ClassVar = {"input_size": (3, 8, 8)}

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.head, self.fold = nn.Linear(6, num_classes), nn.PixelUnshuffle(2)
        self.one, self.two = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(self.fold(images)).relu()).mean(dim=(2, 3)))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the documentation's example."""
    (tmp_path / "mine.py").write_text(python_file(PAGE, "mine.py", "class Squares"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_student_and_data_of_ones_own(mine: Path) -> None:
    (arguments,) = (found for _, found in commands(PAGE) if "mine.Squares" in found)
    assert main([*arguments, *CPU]) == 0
    # Only the checkpoint says what network and data there were.
    for evaluation in ("validate", "test", "predict"):
        assert main([evaluation, "--ckpt_path", LAST, *CPU]) == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 129
    assert main(["extract", "--ckpt_path", LAST, "--output", "student.pth"]) == 0
    from mine import Net

    Net(16, 4).load_state_dict(torch.load("student.pth", weights_only=True))
    assert main([*arguments, *CPU, "--ckpt_path", LAST, "--trainer.max_epochs", "3"]) == 0
    expand = ["--model.student", "mine.Net", "--model.student_weights", "student.pth"]
    expand += ["--model.student_args", "{width: 16}", "--model.num_classes", "4"]
    assert main(["expand", *expand, "--output", "wide.safetensors"]) == 0
    assert main(["extract", "--ckpt_path", "wide.safetensors", "--output", "again.pth"]) == 0
    first, again = (torch.load(f"{n}.pth", weights_only=True) for n in ("student", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_static_teacher_of_ones_own(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = create_model("mine.Net", num_classes=4)
    torch.save(network.state_dict(), "static.pth")
    options = ["--model.static_teacher.name", "mine.Net", "--data", "mine.Squares", *CPU]
    options += ["--model.static_teacher.weights", "static.pth", "--trainer.fast_dev_run", "1"]
    options += ["--model.student", "mine.Net", "--model.num_classes", "4"]
    assert main(["fit", *options, "--model.method", "PKT"]) == 0
    assert main(["fit", *options, "--data.batch_size", "many"]) == 2
    assert "--data.batch_size takes a whole number, not many" in capsys.readouterr().err


@pytest.mark.parametrize("known", [False, True], ids=["asked", "known"])
@pytest.mark.parametrize("command", ["fit", "expand"])
def test_a_network_that_does_not_say_which_images_it_takes(
    command: str, known: bool, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / f"small_{known}.py").write_text(
        "from torch import nn\n"
        "class Small(nn.Module):\n"
        "    def __init__(self, num_classes: int = 4) -> None:\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Flatten(), nn.Linear(256, num_classes))\n"
        + "        self.num_classes = num_classes\n"
        * known
        + "    def forward(self, images):\n"
        "        return self.body(images)\n"
    )
    arguments = ["--model.student", f"small_{known}.Small", "--model.num_classes", "4"]
    rest = CPU if command == "fit" else ["--output", "w.safetensors"]
    assert main([command, *arguments, *rest]) == 1
    (said,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("gpd: error:"))
    assert "Small cannot take images of shape [3, 224, 224]: mat1" in said
    assert "pretrained_cfg = {'input_size': (1, 16, 16)}" in said


@pytest.mark.parametrize("command", ["fit", "expand"])
def test_another_student_under_a_recipe(
    command: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["-c", "recipe:digits", "--model.student", "mine.Net"]
    rest = CPU if command == "fit" else ["--dry_run"]
    remedy = "its arguments come from recipe:digits, and --model.student_args null removes them."
    assert main([command, *other, *rest]) == 1
    assert remedy in capsys.readouterr().err
    assert main([command, *other, *rest, "--model.student_args", "{depth: 3}"]) == 1
    said = capsys.readouterr().err
    assert "depth=3" in said and "come from" not in said
    if command == "expand":
        assert main([command, *other, *rest, "--model.student_args", "null"]) == 0


def test_data_of_ones_own_have_their_own_defaults(mine: Path) -> None:
    Path("folder.yaml").write_text("data: {batch_size: 64, image_size: 8}")
    Path("squares.yaml").write_text("data: {class_path: mine.Squares}")
    for options, batch_size in (
        (["--data", "mine.Squares"], 16),
        (["-c", "squares.yaml"], 16),
        (["-c", "squares.yaml", "--data.batch_size", "4"], 4),
        (["-c", "folder.yaml", "--data", "mine.Squares"], 64),  # as it was set by hand
    ):
        output = StringIO()
        with redirect_stdout(output):
            assert main(["fit", "--model.student", "mine.Net", *options, "--print_config"]) == 0
        data = yaml.safe_load(output.getvalue())["data"]
        assert data == {"class_path": "mine.Squares", "init_args": {"batch_size": batch_size}}


TOLD = """
from gpd_cli.data import ImageSpec
from mine import Squares

class Told(Squares):
    image_spec = ImageSpec(size=(16, 16), channels=1, mean=(0.5,), std=(0.25,))
"""


@pytest.mark.slow
def test_data_of_ones_own_may_say_how_images_are_prepared(mine: Path) -> None:
    (mine / "told.py").write_text(TOLD)
    options = ["--model.student", "mine.Net", "--model.num_classes", "4", "--data", "told.Told"]
    assert main(["fit", *options, "--trainer.max_steps", "1", *CPU]) == 0
    Image.new("RGB", (40, 30), "teal").save("picture.png")
    assert main(["predict", "--ckpt_path", LAST, "--images", "picture.png", *CPU]) == 0
    _, (file, label, *_) = csv.reader(Path("predictions.csv").read_text().splitlines())
    assert (file, label) == ("picture.png", "")
    assert main(["extract", "--ckpt_path", LAST, "--output", "s.pt2", "--preprocess"]) == 0


@pytest.mark.parametrize("name", ["test_own_code.Fixed", "test_own_code.build"])
def test_classes_and_functions_build_networks(name: str) -> None:
    spec = ModelSpec(name, model_args={"width": 6})
    network = spec.build()
    assert isinstance(network, Fixed) and network.head.in_features == 6
    known = spec.resolve(network)
    assert known.num_classes == 5
    assert isinstance(ModelSpec.from_dict(known.to_dict()).build(), Fixed)
    with pytest.raises(ModelError, match=r"5 classes and not 7.*--model\.num_classes 5"):
        ModelSpec(name, 7, {"width": 6}).resolve(network)


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("test_own_code.Missing", "no attribute 'Missing'.*PYTHONPATH"),
        ("no_such_module.Net", "no_such_module.*PYTHONPATH"),
        ("test_own_code.unannotated", "annotated"),
        ("os.system", "neither a subclass of torch.nn.Module"),  # nothing else is ever called
        ("torch.optim.SGD", "neither a subclass of torch.nn.Module"),
    ],
)
def test_what_builds_no_network_is_refused(name: str, naming: str) -> None:
    with pytest.raises(ModelError, match=naming):
        create_model(name, model_args={"width": 4})


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Net(torch.nn.Module:", r"SyntaxError: .*\(faulty.py, line 2\)"),
        ("raise KeyError('width')", "KeyError: 'width'"),
        ("import sys; sys.exit('usage: faulty.py DATA')", "SystemExit: usage: faulty.py DATA"),
        ("import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_in_a_sentence(
    mine: Path, capsys: pytest.CaptureFixture[str], code: str, said: str
) -> None:
    (mine / "faulty.py").write_text(f"import torch\n{code}\n")
    sys.modules.pop("faulty", None)
    assert main(["expand", "--model.student", "faulty.Net", "--output", "w.safetensors"]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"The network faulty.Net cannot be imported: .*{said}", error)
    assert "not foreseen" not in error


def test_published_weights_of_a_network_that_has_none_are_refused() -> None:
    name = f"{Fixed.__module__}.Fixed"
    with pytest.raises(ModelError, match=f"{name} has no published weights.*remove 'pretrained'"):
        create_model(name, model_args={"pretrained": True})


def test_an_annotation_that_means_nothing_is_none(mine: Path) -> None:
    code = "from __future__ import annotations\nfrom torch import nn\n"
    (mine / "vague.py").write_text(f"{code}def net() -> nn.Modul: ...\n")
    with pytest.raises(ModelError, match="annotated"):
        create_model("vague.net")


class Shuffled(nn.Module):
    """A network with numbers of its own making, which no state dict has."""

    pretrained_cfg: ClassVar = {"input_size": (3, 16, 16)}

    def __init__(self, how: str = "attribute") -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        order = torch.arange(8) if how == "fixed" else torch.randperm(8)
        self.last = torch.zeros(1)
        if how in ("attribute", "fixed"):
            self.order = order
        else:
            self.register_buffer("order", order, persistent=how == "saved")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.last = self.body(images).relu().mean(dim=(2, 3))
        return self.head(self.last[:, self.order])


@pytest.mark.parametrize("how", ["attribute", "buffer"])
def test_numbers_that_no_checkpoint_has_and_no_build_repeats_are_refused(
    tmp_path: Path, how: str
) -> None:
    """The extracted network would have others than were trained."""
    with pytest.raises(ModelError, match=r"gets another tensor 'order' each time .*buffer"):
        expand_command(
            tmp_path / "w.safetensors",
            student="test_own_code.Shuffled",
            student_args={"how": how},
            branches=1,
        )
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("how", ["saved", "fixed"])
def test_numbers_that_come_back_are_taken(how: str) -> None:
    spec = ModelSpec("test_own_code.Shuffled", model_args={"how": how})
    network = spec.build()
    before = torch.get_rng_state()
    assert spec.resolve(network).num_classes == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_the_stated_channels_precede_those_of_the_first_convolution() -> None:
    name = f"{__name__}.Folding"
    assert input_shape(create_model(name), name) == (3, 8, 8)


def test_the_classifier_is_the_layer_that_runs_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, file = f"{__name__}.Folding", tmp_path / "weights.pth"
    tensors = create_model(name).state_dict()
    torch.save(tensors, file)
    network = create_model(name, num_classes=3, weights=file)
    assert torch.equal(network.get_parameter("two.weight"), tensors["two.weight"])
    assert "the classifier (head) is initialized anew, since the file has 5" in caplog.text
    torch.save({key: tensor for key, tensor in tensors.items() if "two" not in key}, file)
    with pytest.raises(WeightsError, match=r"missing two\.weight, two\.bias"):
        create_model(name, weights=file)
