"""Broken files and options: one sentence that names the thing, for every kind of damage."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from bench.fuzz.cases import SHORT, TRAIN
from bench.fuzz.student import Student
from gpd_cli.__main__ import main
from gpd_cli.cli.yaml_limits import check_limits
from gpd_cli.data.folders import EXTENSIONS
from gpd_cli.data.image_files import image_files
from gpd_cli.errors import DataError
from gpd_cli.training.amx import keep_in_float32
from processes import importable

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The content of a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        assert main(["fit", *TRAIN, *SHORT]) == 0
    return torch.load(folder / "runs/gpd/version_0/checkpoints/last.ckpt", weights_only=True)


def refused(folder: Path, *arguments: str) -> str:
    """The one sentence of a command that fails, and writes nothing."""
    before = files_below(folder)
    with chdir(folder), redirect_stderr(io.StringIO()) as errors:
        assert main(list(arguments)) in (1, 2)
    text = errors.getvalue()
    assert "Traceback" not in text
    (sentence,) = (line for line in text.splitlines() if line.startswith("gpd: error:"))
    assert "not foreseen" not in sentence
    assert len(sentence) < 800
    assert files_below(folder) == before
    return sentence


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def set_to(value: Any, *path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def without(*path: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


def weight(ending: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(content: dict[str, Any]) -> None:
        state = content["state_dict"]
        name = next(name for name in state if name.endswith(ending))
        state[name] = new(state[name].clone())

    return change


PLAN = ("gpd", "plan")
LONG = [[0, 1, 4, 10**6]]  # ten to the 6 copies of each channel
MOMENTUM = ("optimizer_states", 0, "state", 0, "momentum_buffer")

EXTRACTED: dict[str, tuple[Change, str]] = {
    "format": (set_to(7, "gpd", "format"), "has the format 7, but .* reads the format 1"),
    "no format": (set_to([], "gpd"), "has the format None"),
    "part missing": (without("gpd", "branches"), "the description lacks branches"),
    "part empty": (set_to({}, "gpd", "student"), "the description, student lacks name"),
    "other type": (set_to("mixed", "gpd", "shape"), "shape is 'mixed' and not a list"),
    "state no mapping": (set_to(3, "state_dict"), "state_dict is 3 and not a mapping"),
    "state empty": (set_to({}, "state_dict"), "the file does not have|do not fit"),
    "no tensor": (set_to("x", "state_dict", "network.x"), "network.x is 'x' and not Tensor"),
    "index": (set_to([[0, 1, 4, 1], [10**6, 0, 1, 1]], *PLAN, "maps", 0, "index"), "index that"),
    "copies": (set_to(LONG, *PLAN, "maps", 0, "index"), "the width plan"),
    "not onto": (set_to([[0, 0, 8, 1]], *PLAN, "maps", 0, "index"), "channels of .* without a"),
    "narrow": (set_to(10**9, *PLAN, "maps", 0, "narrow"), "the width plan"),
    "ratio": (set_to(1e9, *PLAN, "ratio"), "the ratio 1e.09"),
    "ratio of text": (set_to("two", *PLAN, "ratio"), "ratio is 'two' and not a finite number"),
    "storage": (set_to("large", "gpd", "storage"), "storage is 'large' and not one of mixed"),
    "branch width": (set_to("wide", "gpd", "branch_width"), "branch_width is 'wide' and not a fin"),
    "branch width of 0": (set_to(0.0, "gpd", "branch_width"), "branch_width is 0.0 and not above"),
    "branch": (set_to(["7x7"], "gpd", "branches"), "'7x7' and not one of"),
    "attribute": (set_to({"x": 1}, *PLAN, "attributes", "conv1"), "AttributeError"),
    "width": (set_to({"width": 10**5}, "gpd", "student", "model_args"), "much larger network"),
    "classes": (set_to(10**9, "gpd", "student", "num_classes"), "much larger network"),
    "infinite statistics": (
        weight("running_mean", lambda t: t.fill_(float("inf"))),
        "running_mean has values that are NaN or infinite",
    ),
    "negative variance": (weight("running_var", lambda t: t - 9), "has a negative variance"),
    "NaN in a weight": (weight("bn1.weight", lambda t: t * float("nan")), "NaN or infinite"),
    "complex": (weight("bn1.weight", lambda t: t.to(torch.complex64)), "tensor of torch.complex64"),
    "whole numbers": (weight("bn1.weight", lambda t: t.int()), "is of torch.int32 and not of"),
    "shape": (weight("bn1.weight", lambda t: t.repeat(2)), r"and the file has \[16\]"),
}

RESUMED: dict[str, tuple[Change, str]] = {
    "weights only": (without("optimizer_states"), "saved with save_weights_only.*give last.ckpt"),
    "no loops": (without("loops"), "the checkpoint lacks loops"),
    "loops of another type": (set_to([], "loops", "fit_loop"), "fit_loop is .* not a mapping"),
    "no version": (without("pytorch-lightning_version"), "lacks pytorch-lightning_version"),
    "no settings": (without("hyper_parameters"), "lacks hyper_parameters"),
    "counter": (set_to(-3, "global_step"), "global_step is -3 and not a whole number from 0"),
    "momentum": (set_to(torch.ones(2, 2, 2, 2), *MOMENTUM), r"has the shape \[2, 2, 2, 2\]"),
    "momentum of NaN": (set_to(torch.tensor(float("nan")), *MOMENTUM), "complex, NaN or infinite"),
    "rate": (set_to("half", "schedule", "rate_factor"), "rate_factor is 'half' and not a finite"),
    "groups": (set_to([], "optimizer_states", 0, "param_groups"), "cannot be used"),
    "generators": (set_to([{"python": 1}], "random_states"), "random_states"),
    "generator": (without("random_states", 0, "torch"), "random_states, 0 lacks torch"),
    "words": (
        set_to(torch.zeros(5056, dtype=torch.uint8), "random_states", 0, "torch"),
        "random_states, 0, torch is no state of a random generator",
    ),
    "rows": (set_to("many", "epoch_state", "rows"), "rows is 'many' and not a list"),
    "callback": (set_to({"x": 1}, "callbacks", "GapHistory"), "KeyError: 'epochs'"),
}


def damaged_copy(trained: dict[str, Any], folder: Path, change: Change) -> str:
    file = io.BytesIO()
    torch.save(trained, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, folder / "damaged.ckpt")
    return "damaged.ckpt"


@pytest.mark.parametrize("name", EXTRACTED)
def test_a_checkpoint_that_cannot_be_right_is_refused(
    trained: dict[str, Any], tmp_path: Path, name: str
) -> None:
    change, said = EXTRACTED[name]
    path = damaged_copy(trained, tmp_path, change)
    sentence = refused(tmp_path, "extract", "--ckpt_path", path, "--output", "student.pth")
    assert_said(said, sentence)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_does_not_go_on_from_a_damaged_state(
    trained: dict[str, Any], tmp_path: Path, name: str
) -> None:
    change, said = RESUMED[name]
    path = damaged_copy(trained, tmp_path, change)
    longer = ["--trainer.max_steps", "9", "--trainer.max_epochs", "9", "--ckpt_path", path]
    assert_said(said, refused(tmp_path, "fit", *TRAIN, *SHORT, *longer))


@pytest.mark.parametrize(
    ("name", "new", "said"),
    [
        (
            "bn1.running_mean",
            lambda t: t * float("inf"),
            "bn1.running_mean has values that are NaN",
        ),
        ("bn1.running_var", lambda t: t - 9, "bn1.running_var has a negative variance"),
        ("conv1.weight", lambda t: t.int(), "conv1.weight is of torch.int32"),
        ("head.bias", lambda t: t.to(torch.complex64), "head.bias is of torch.complex64"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, name: str, new: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    state = Student().state_dict()
    state[name] = new(state[name] + 1)
    torch.save(state, tmp_path / "student.pth")
    student = ["--model.student", "bench.fuzz.student.Student", "--model.num_classes", "10"]
    weights = ["--model.student_weights", "student.pth", "--output", "wide.safetensors"]
    assert_said(said, refused(tmp_path, "expand", *student, *weights))


def assert_said(said: str, sentence: str) -> None:
    assert re.search(said, sentence), sentence


def bomb(levels: int) -> str:
    lines = ["x0: &x0 [a]"]
    lines += [f"x{k}: &x{k} [{', '.join([f'*x{k - 1}'] * 10)}]" for k in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(9), "aliases stand for more than 100,000 values"),
        (f"model: {'[' * 20_000}", "more than 60 levels"),
        ("\n".join(" " * k + "a:" for k in range(500)), "more than 60 levels"),
        ("model: &m\n  student_args: *m\n", r"alias \*m stands for the value that contains it"),
        ("a" * 5_000_000, "5,000,000 characters"),
        ("model: {0x10: resnet18}\n", "model has the option 16, which YAML does not read as text"),
    ],
    ids=["aliases", "brackets", "indents", "itself", "long", "name"],
)
def test_limits_of_yaml(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    assert_said(said, refused(tmp_path, "fit", "-c", "bomb.yaml"))


def test_ordinary_aliases_are_no_bomb() -> None:
    lines = [f"e{number}: 1" for number in range(1000)]
    check_limits("\n".join(["a: &a {b: [1, 2]}", "c: *a", "d: [*a, *a]", *lines]))
    with pytest.raises(yaml.YAMLError):
        check_limits("a: [")


@pytest.mark.parametrize(
    ("text", "key"),
    [("a: 1\nb: 2\na: 3", "a"), ("x: [{b: 1, b: 2}]", "b"), ("? [a, b]\n: 1\nc: 1\nc: 1", "c")],
)
def test_a_key_that_is_written_twice_is_no_choice(text: str, key: str) -> None:
    """Loaders keep the second value only."""
    with pytest.raises(yaml.YAMLError, match=f"'{key}' is written a second time"):
        check_limits(text)
    check_limits("a: {b: 1, c: a}\nb: {b: 1}\nd: [a, a, b]\ne: {? [x, x] : 1}")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.max_steps=0", "--trainer.max_steps must be 1 or more, or -1 for no limit"),
        ("--trainer.max_epochs=0", "--trainer.max_epochs must be 1 or more, or -1 for no limit"),
        ("--trainer.limit_train_batches=0", "limit_train_batches must be above 0, not 0"),
        ("--trainer.val_check_interval=0", "val_check_interval must be above 0"),
        ("--trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch must be 1 or more"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches must be 1 or more"),
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val must be 0 or more, not -1"),
        ("--trainer.gradient_clip_val=nan", "takes a whole number, a number or null, not nan"),
        ("--trainer.devices=100000", "--trainer.devices must be from 1 to 256"),
        ("--model.ratio=1e9", "At ratio 1e.09 .* GiB, .*lower --model.ratio"),
        ("--model.width_multiple=1000000000", "lower --model.ratio or --model.width_multiple"),
        ("--model.student_args={in_chans: 0}", "Cannot build .*in_chans=0|images of shape"),
        ("--model.nan_steps=-1", "--model.nan_steps must be 0 or more"),
        ("--model.optimizer.momentum=5", "--model.optimizer.momentum must be below 1"),
        ("--model.optimizer.warmup_epochs=-1", "warmup_epochs must be 0 or more"),
        ("--data.num_workers=100000", "--data.num_workers must be from 0 to 512"),
        ("--data.scale=[1, 0.1]", "--data.scale must be two numbers above 0 and at most 1"),
        ("--data.std=[0]", "--data.std must be above 0"),
        ("--data.crop_pct=0.00001", "--data.crop_pct must be from 0.05 to 1"),
        ("--data.aug_repeats=10000000000", "--data.aug_repeats must be from 0 to 64"),
        ("--data.image_size=1000000", "--data.image_size must be from 1 to 16384"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, option: str, said: str) -> None:
    assert_said(said, refused(tmp_path, "fit", *TRAIN, *SHORT, option))


def test_null_for_a_number_in_a_file(tmp_path: Path) -> None:
    """On the command line, jsonargparse refuses it."""
    (tmp_path / "null.yaml").write_text("trainer: {accumulate_grad_batches: null}")
    said = "accumulate_grad_batches must be 1 or more, not null"
    assert_said(said, refused(tmp_path, "fit", *TRAIN, *SHORT, "-c", "null.yaml"))


# Folders


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path)


def test_a_link_loop_is_followed_once(tmp_path: Path) -> None:
    for number in (1, 10, 2):
        picture(tmp_path / "data" / "cat" / f"{number}.png")
    (tmp_path / "data" / "cat" / "loop").symlink_to("..")
    picture(tmp_path / "elsewhere" / "3.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    found = [Path(p).relative_to(tmp_path) for p in image_files(tmp_path / "data", EXTENSIONS)[0]]
    assert [str(path) for path in found] == [
        *("data/cat/1.png", "data/cat/2.png", "data/cat/10.png", "data/dog/3.png")
    ]


def test_pipes_and_folders_are_no_images(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "folder.png").mkdir()
    picture(tmp_path / ".cache" / "2.png")
    assert [Path(path).name for path in image_files(tmp_path, EXTENSIONS)[0]] == ["1.png"]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    scan = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"dog' cannot be read \(Permission denied\)"):
        image_files(tmp_path, EXTENSIONS)
    monkeypatch.undo()
    (tmp_path / "cat" / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone.png' cannot be read \(No such file"):
        image_files(tmp_path, EXTENSIONS)


# Output


@pytest.mark.slow
@pytest.mark.parametrize("how", ["| head -n 1", ">&-", "2>&1 >/dev/full"])
def test_training_goes_on_when_nobody_listens(tmp_path: Path, how: str) -> None:
    command = " ".join(f"'{part}'" for part in [*TRAIN, *SHORT])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m gpd_cli fit {command} {how}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": importable()},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode in (0, 128 + signal.SIGPIPE if "head" in how else 0), done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "runs" / "gpd" / "version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (run / "gap.png").exists()


# Numbers from nowhere


def test_strided_convolutions_of_one_pixel_leave_bfloat16() -> None:
    layer = torch.nn.Conv2d(2, 3, 3, 2, 1)
    assert keep_in_float32(torch.nn.Sequential(layer, torch.nn.Conv2d(2, 2, 3))) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 2, 1, 1)).dtype == torch.float32
        assert layer(torch.ones(1, 2, 4, 4)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            layer(torch.ones(1, 5, 1, 1))
        assert layer(torch.ones(1, 2, 1, 1)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_all_merged_mappings_count() -> None:
    """A merge key may come twice."""
    text = "a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n  z: 3"
    check_limits(text)
    assert yaml.safe_load(text)["c"] == {"x": 1, "y": 2, "z": 3}
