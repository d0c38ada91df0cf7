import csv
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import ClassVar

import lightning.pytorch  # noqa: F401 - here, or its log keeps a stderr of the first test
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from documentation import python_file
from gpd_cli.__main__ import main
from processes import in_processes

TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
CONFIG = f"""\
model:
  student: resnet18
  student_args: {TINY}
  num_classes: 10
  ratio: 2
  branches: 2
  optimizer:
    lr: 0.01
data:
  dataset: digits
  image_size: 16
  batch_size: 32
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 3
  limit_val_batches: 2
"""
STUDENT = [
    *("--model.student", "resnet18", "--model.num_classes", "10"),
    *("--model.student_args", str(TINY)),
]
FAST = [
    *("--data.image_size", "16", "--data.batch_size", "32", "--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--model.ratio", "1", "--model.branches", "1"),
]
CPU = ["--trainer.accelerator", "cpu"]


def student(classes: int = 10) -> nn.Module:
    return timm.create_model("resnet18", num_classes=classes, **TINY)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `gpd fit -c CONFIG`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(CONFIG)
    with chdir(folder):
        assert main(["fit", "-c", "tiny.yaml"]) == 0
    return folder / "runs" / "tiny" / "version_0"


@pytest.fixture(scope="module")
def last(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that works and return what it prints, without line breaks inside cells."""

    def run_it(*arguments: str) -> str:
        capfd.readouterr()
        code = main(list(arguments))
        output, error = capfd.readouterr()
        assert code == 0, error
        return output

    return run_it


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a command that fails, check how, and return its one sentence."""

    def run_it(*arguments: str, naming: str, code: int = 1) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capfd.readouterr()
        got = main(list(arguments))
        output, error = capfd.readouterr()
        assert got == code, error
        assert "Traceback" not in output + error
        said = [line for line in error.splitlines() if line.startswith("gpd: error:")]
        if code == 1:
            assert len(said) == 1, error
            assert "not foreseen" not in said[0]
        assert re.search(naming, said[0] if said else error), error
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before
        return error

    return run_it


# The program


def test_help_names_every_command(say: Callable[..., str]) -> None:
    text = say("--help")
    assert say("-h") == text
    for command in ("fit", "validate", "test", "predict", "expand", "extract"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)


def test_no_command_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: gpd" in capsys.readouterr().out


def test_version_is_the_packages(say: Callable[..., str]) -> None:
    from importlib.metadata import version

    assert say("--version").strip() == f"gpd {version('gpd-cli')}"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_at_once_without_torch(option: str) -> None:
    code = (
        "import sys; from gpd_cli.__main__ import main; "
        f"code = main(['{option}']); "
        "heavy = {'torch', 'timm', 'lightning', 'torchvision', 'numpy'} & set(sys.modules); "
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    seconds = []
    for _ in range(4):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor: by the clock a busy machine would decide.
        seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        assert result.returncode == 0, result.stderr
    assert min(seconds) < 0.5


def test_module_and_program_are_the_same(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "gpd_cli"]
    program = [str(Path(sys.executable).with_name("gpd"))]
    if not Path(program[0]).exists():
        pytest.skip("the program is not installed beside this interpreter")
    outputs = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in (module, program)
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("usage: gpd")


@pytest.mark.slow
def test_method_of_ones_own_is_found_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "cosine.py").write_text(python_file("docs/own.md", "cosine.py", "class Cosine"))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    torch.save(student().state_dict(), tmp_path / "static.pth")
    static = ["--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(TINY)]
    program = "import sys; from gpd_cli.__main__ import main; sys.exit(main())"
    fit = [sys.executable, "-P", "-c", program, "fit", "-c", "tiny.yaml", *static]
    weights = ["--model.static_teacher.weights", "static.pth"]
    method = ["--model.method", "cosine.Cosine", "--model.method.weight", "2"]
    command = [*fit, *weights, *method, "--trainer.limit_val_batches", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "limit_val_batches=1)" in result.stderr  # and not 1.0, which is all of them
    log = tmp_path / "runs" / "tiny" / "version_0" / "metrics.csv"
    assert "teacher_static" in log.read_text().splitlines()[0]


@pytest.mark.slow
def test_working_directory_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = shlex.join([sys.executable, "-m", "gpd_cli", "report", "a"])
    (result,) = in_processes(tmp_path, ["sh", "-c", f"cd gone; rmdir ../gone; {command}"])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "gpd: error: The working directory no longer exists"
    )
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_configuration_through_a_pipe_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "gpd_cli", "fit", "-c", "tiny.yaml", "--print_config"]
    piped = f"{shlex.join(command)} -c <(echo 'trainer: {{max_epochs: 7}}')"
    (result,) = in_processes(tmp_path, ["bash", "-c", piped])
    assert "max_epochs: 7" in result.stdout, result.stderr


@pytest.mark.slow
def test_error_of_the_process_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gpd_cli", "extract", "--ckpt_path", "no.ckpt", "--output", "a.pth"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "GPD_DEBUG"},
    )
    assert result.returncode == 1
    assert result.stderr.startswith("gpd: error:")
    assert len(result.stderr.splitlines()) == 1
    assert "no.ckpt" in result.stderr


def test_debugging_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPD_DEBUG", "1")
    with pytest.raises(Exception, match=r"no\.ckpt"):
        main(["extract", "--ckpt_path", "no.ckpt", "--output", "a.pth"])


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_fails_in_a_worker_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: type[Exception],
) -> None:
    def fail(images: object, index: int) -> None:
        raise kind("the third bit is missing")

    for place in ("train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / place)
    monkeypatch.setattr("gpd_cli.data.sources._ImageItems.__getitem__", fail)
    data = ["--data.dataset", "folder", "--data.root", str(tmp_path), "--data.in_chans", "1"]
    options = [*STUDENT, "--model.num_classes", "2", *FAST, *data, "--data.num_workers", "1"]
    assert main(["fit", *options]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    named = "RuntimeError: " if kind is RuntimeError else ""
    assert said.startswith(f"gpd: error: {named}the third bit is missing")


# Forms that work


def test_fit_of_a_configuration_leaves_a_run(run: Path) -> None:
    for name in ("config.yaml", "metrics.csv", "gap.png"):
        assert (run / name).exists()
    assert (run / "checkpoints" / "best.ckpt").exists()
    assert (run / "checkpoints" / "last.ckpt").exists()


def test_fit_resumes_from_a_checkpoint(run: Path, last: str, say: Callable[..., str]) -> None:
    config = str(run.parents[2] / "tiny.yaml")
    text = say("fit", "-c", config, "--ckpt_path", last, "--trainer.max_epochs", "2")
    assert "epoch 2/2" in text
    assert "epoch 1/2" not in text
    resumed = torch.load("runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 6


@pytest.mark.slow
def test_fit_runs_again_from_the_configuration_it_saved(
    run: Path, last: str, say: Callable[..., str]
) -> None:
    say("fit", "-c", str(run / "config.yaml"))
    first, second = (
        torch.load(path, weights_only=True)["state_dict"]
        for path in (last, "runs/tiny/version_0/checkpoints/last.ckpt")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_needs_the_checkpoint_only(
    command: str, last: str, say: Callable[..., str]
) -> None:
    text = say(command, "--ckpt_path", last, *CPU)
    stage = "val" if command == "validate" else "test"
    for name in ("student_top1", "teacher_top1", "gap"):
        assert f"{stage}/{name}" in text


@pytest.mark.parametrize("command", ["validate", pytest.param("predict", marks=pytest.mark.slow)])
def test_evaluation_overwrites_no_configuration(
    command: str, last: str, say: Callable[..., str]
) -> None:
    Path("config.yaml").write_text("a user's own")
    say(command, f"--ckpt_path={last}", *CPU)
    assert Path("config.yaml").read_text() == "a user's own"


def test_validation_scores_what_training_logged(
    run: Path, last: str, say: Callable[..., str]
) -> None:
    text = say("validate", "--ckpt_path", last, *CPU, "--trainer.limit_val_batches", "2")
    with (run / "metrics.csv").open() as file:
        logged = [row["val/student_top1"] for row in csv.DictReader(file)]
    expected = float([value for value in logged if value][-1])
    printed = re.search(r"val/student_top1\s+\S?\s*([\d.]+)", text)
    assert printed
    assert float(printed.group(1)) == pytest.approx(expected, abs=1e-3)


def test_evaluation_takes_other_data_settings(last: str, say: Callable[..., str]) -> None:
    text = say("test", "--ckpt_path", last, *CPU, "--data.batch_size", "50")
    assert "test/student_top1" in text


def test_evaluation_takes_the_configuration_of_the_run(
    run: Path, last: str, say: Callable[..., str]
) -> None:
    for config in (run.parents[2] / "tiny.yaml", run / "config.yaml"):
        assert "student_top1" in say("validate", "-c", str(config), "--ckpt_path", last)


def test_evaluation_takes_the_checkpoint_from_a_configuration(
    last: str, say: Callable[..., str]
) -> None:
    Path("evaluate.yaml").write_text(f"ckpt_path: {last}\n")
    assert "student_top1" in say("validate", "-c", "evaluate.yaml", *CPU)


def test_predictions_are_a_row_per_image(last: str, say: Callable[..., str]) -> None:
    text = say("predict", "--ckpt_path", last, *CPU, "--output", "out/table.csv")
    assert "table.csv" in text
    with Path("out/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360  # the test split of the digits
    assert [int(row["file"]) for row in rows] == list(range(360))
    for row in rows:
        for network in ("student", "teacher"):
            assert row[f"{network}_class"] in list("0123456789")
            assert 0.1 <= float(row[f"{network}_probability"]) <= 1


def test_no_predictions_are_an_error(last: str, refuse: Callable[..., str]) -> None:
    none = ["--trainer.limit_predict_batches", "0", "--output", "none.csv"]
    refuse("predict", "--ckpt_path", last, *CPU, *none, naming="no images to predict")


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_no_images_to_score_are_an_error(
    last: str, refuse: Callable[..., str], command: str, stage: str
) -> None:
    none = [f"--trainer.limit_{stage}_batches", "0"]
    naming = f"no image in the split of --data.{stage}_split"
    refuse(command, "--ckpt_path", last, *CPU, *none, naming=naming)


def test_expansion_reports_what_it_did(say: Callable[..., str]) -> None:
    options = ["--model.ratio", "2", "--model.branches", "6", "--output", "wide.safetensors"]
    text = " ".join(say("expand", *STUDENT, *options).split())
    for fact in (
        "parameters",
        "multiply-adds",
        "widened layers",
        "branches",
        "certificate",
        "float64",
        "wide.safetensors",
        "random",
    ):
        assert fact in text
    difference = re.search(r"relative difference (\S+) in float64", text)
    assert difference
    assert float(difference.group(1)) < 1e-12
    assert "agreement 100%" in text
    assert "8.62 k ->" in text
    assert [path.name for path in Path().iterdir()] == ["wide.safetensors"]


@pytest.mark.slow
def test_expansion_of_given_weights_comes_back_by_extraction(say: Callable[..., str]) -> None:
    network = student()
    torch.save(network.state_dict(), "in.pth")
    weights = ["--model.student_weights", "in.pth", "--model.ratio", "1.5"]
    text = say("expand", *STUDENT, *weights, "--model.branches", "3", "--output", "w.safetensors")
    assert "in.pth" in text
    say("extract", "--ckpt_path", "w.safetensors", "--output", "out.safetensors")
    read, given = load_file("out.safetensors"), network.state_dict()
    assert read.keys() == given.keys()
    assert all(torch.equal(read[name], given[name]) for name in given)


def test_expansion_takes_a_configuration_of_fit(run: Path, say: Callable[..., str]) -> None:
    say("expand", "-c", str(run.parents[2] / "tiny.yaml"), "--output", "wide.safetensors")
    assert [path.name for path in Path().iterdir()] == ["wide.safetensors"]


@pytest.mark.parametrize(
    ("optimizer", "storage"), [("adamw", "student"), ("sgd", "mixed"), (None, "mixed")]
)
def test_expansion_stores_weights_as_a_run_by_the_same_configuration(
    optimizer: str | None, storage: str, say: Callable[..., str]
) -> None:
    Path("run.yaml").write_text(f"model: {{optimizer: {{opt: {optimizer}}}}}")
    options = [] if optimizer is None else ["-c", "run.yaml"]
    say("expand", *STUDENT, *options, "--model.branches", "1", "--output", "w.safetensors")
    with safe_open("w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["gpd"])["storage"] == storage


def test_expansion_takes_the_configuration_that_a_run_saved(
    run: Path, say: Callable[..., str]
) -> None:
    say("expand", "-c", str(run / "config.yaml"), "--output", "wide.safetensors")
    assert load_file("wide.safetensors")


@pytest.mark.parametrize(
    ("configurations", "side"),
    [
        ([], 224),
        (["data: {image_size: 16}", "config: size0.yaml"], 16),
        (["data: {image_size: 16}"], 16),
        (["data: {class_path: gpd_cli.data.ImageData, init_args: {image_size: 48}}"], 48),
        (["data: {image_size: 16}", "data: {image_size: 24}", "data: {batch_size: 8}"], 24),
    ],
)
def test_expand_takes_the_image_size_of_the_configuration(
    say: Callable[..., str], configurations: list[str], side: int
) -> None:
    options = []
    for k, text in enumerate(configurations):
        Path(f"size{k}.yaml").write_text(text)
        options += ["-c", f"size{k}.yaml"]
    assert f"images: 1 x {side} x {side}" in say("expand", *STUDENT, *options, "--dry_run")


def test_expand_takes_the_image_size_of_the_command_line(say: Callable[..., str]) -> None:
    Path("size.yaml").write_text("data: {image_size: 16}")
    options = ["-c", "size.yaml", "--data.image_size", "40", "--dry_run"]
    assert "images: 1 x 40 x 40" in say("expand", *STUDENT, *options)


@pytest.mark.parametrize("flag", [["--dry_run"], ["--dry_run", "true"], ["--dry_run=true"]])
def test_dry_run_prints_the_plan_and_writes_nothing(
    flag: list[str], say: Callable[..., str]
) -> None:
    text = say("expand", *flag, *STUDENT, "--model.ratio", "2")
    plan = yaml.safe_load(text)
    assert plan["network"] == "resnet18"
    assert plan["arguments"] == TINY
    assert plan["ratio"] == 2
    assert plan["modules"]["layer4.0.conv2"] == {
        "class": "Conv2d",
        "tensors": {
            "weight": {
                "shape": "8 x 8 x 3 x 3 -> 16 x 16 x 3 x 3",
                "axis 0": "side by side x2",
                "axis 1": "side by side x2, weight divided by 2",
            }
        },
        "attributes": {"in_channels": "8 -> 16", "out_channels": "8 -> 16"},
    }
    assert not list(Path().iterdir())


def test_dry_run_writes_the_plan_where_asked_to(say: Callable[..., str]) -> None:
    text = say(
        "expand", *STUDENT, "--plan", "plans/a.yaml", "--output", "w.safetensors", "--dry_run"
    )
    assert Path("plans/a.yaml").read_text() == text
    assert [str(path) for path in Path().rglob("*") if path.is_file()] == ["plans/a.yaml"]


def test_plan_beside_the_expansion_is_that_of_the_dry_run(say: Callable[..., str]) -> None:
    options = ["--model.branches", "1", "--model.exclude", "layer4.*"]
    planned = say("expand", *STUDENT, *options, "--dry_run")
    outputs = ["--output", "w.safetensors", "--plan", "plan.yaml"]
    assert "plan.yaml" in say("expand", *STUDENT, *options, *outputs)
    assert Path("plan.yaml").read_text() == planned
    entry = yaml.safe_load(planned)
    with safe_open("w.safetensors", framework="pt") as file:
        names = set(json.loads(file.metadata()["gpd"])["plan"]["tensors"])
    described = {
        f"{module}.{name}"
        for module, content in entry["modules"].items()
        for name in content.get("tensors", {})
    }
    assert described == names


@pytest.mark.parametrize(
    "exclude", [["layer4.*"], ["[layer4.*]"], ["[layer4.*, *.conv1]"], ["{config}"]]
)
def test_excluded_layers_keep_their_output_width(
    exclude: list[str], say: Callable[..., str]
) -> None:
    arguments = ["--model.exclude", *exclude]
    if exclude == ["{config}"]:
        Path("c.yaml").write_text("model:\n  exclude: [layer4.*, '*.conv1']\n")
        arguments = ["-c", "c.yaml"]
    modules = yaml.safe_load(say("expand", *arguments, *STUDENT, "--dry_run"))["modules"]
    weight = modules["layer4.0.conv1"]["tensors"]["weight"]
    assert weight["shape"] == "8 x 8 x 3 x 3 -> 8 x 16 x 3 x 3"  # only its input is wide
    assert "layer4.0.conv2" not in modules
    assert "out_channels" in modules["layer3.0.conv2"]["attributes"]
    several = exclude in (["[layer4.*, *.conv1]"], ["{config}"])
    assert ("out_channels" in modules["layer3.0.conv1"]["attributes"]) is not several


def test_widths_are_rounded_up_to_a_multiple(say: Callable[..., str]) -> None:
    options = ["--model.ratio", "1.5", "--model.width_multiple", "8", "--dry_run"]
    modules = yaml.safe_load(say("expand", *STUDENT, *options))["modules"]
    widths = {name: content["attributes"].get("out_channels") for name, content in modules.items()}
    assert widths["conv1"] == "64 -> 96"
    assert widths["layer1.0.conv1"] == "4 -> 8"
    assert widths["layer4.0.conv1"] == "8 -> 16"


def test_branches_start_as_asked_for(say: Callable[..., str]) -> None:
    stored = []
    for start in ("zero", "orepa"):
        options = ["--model.branches", "2", "--model.branch_init", start]
        say("expand", *STUDENT, *options, "--output", f"{start}.safetensors")
        stored.append(load_file(f"{start}.safetensors"))
    gates = [name for name in stored[0] if "gate" in name]
    assert gates
    assert all((stored[0][name] == 0).all() for name in gates)
    assert any((stored[1][name] != 0).any() for name in gates)


def test_kernels_have_one_branch_unless_more_are_asked_for(say: Callable[..., str]) -> None:
    printed = say("expand", *STUDENT, "--model.branch_init", "orepa", "--output", "w.safetensors")
    assert re.search(r"^branches +none; --model.branch_init has no effect *$", printed, re.M)
    assert not any("branches" in name for name in load_file("w.safetensors"))
    printed = say("expand", *STUDENT, "--model.branches", "6", "--output", "w.safetensors")
    assert "up to 6 on each of" in printed
    assert "no effect" not in printed


def test_the_authors_start_is_what_their_branches_merge_to(say: Callable[..., str]) -> None:
    extracted = {}  # both from the student of one seed
    for start in ("zero", "gpd"):
        options = ["--model.branches", "gpd", "--model.branch_init", start]
        options += ["--model.branch_layers", "layer1.*", "--model.storage", "teacher"]
        printed = say("expand", *STUDENT, *options, "--output", "w.safetensors")
        assert "up to 6 on each of 2 kernels" in printed
        say("extract", "--ckpt_path", "w.safetensors", "--output", "out.pth")
        extracted[start] = torch.load("out.pth", weights_only=True)
    for name, tensor in extracted["zero"].items():
        branched = name.startswith("layer1.0.conv")
        assert torch.equal(extracted["gpd"][name], tensor) != branched, name


@pytest.mark.slow
def test_fit_takes_the_options_of_the_expansion(last: str, say: Callable[..., str]) -> None:
    options = ["--model.exclude", "layer4.*", "--model.width_multiple", "8"]
    options += ["--model.branch_init", "orepa", "--model.ratio", "1.5", "--model.branches", "2"]
    say("fit", *STUDENT, *FAST, *options)
    checkpoint = "runs/gpd/version_0/checkpoints/last.ckpt"
    assert "student_top1" in say("validate", "--ckpt_path", checkpoint, *CPU)
    say("extract", "--ckpt_path", checkpoint, "--output", "t.pth", "--which", "teacher")
    wide = torch.load("t.pth", weights_only=True)
    assert len(wide["layer1.0.conv1.weight"]) == 8
    assert len(wide["layer4.0.conv1.weight"]) == 8


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_extraction_reports_what_it_did(run: Path, name: str, say: Callable[..., str]) -> None:
    checkpoint = str(run / "checkpoints" / name)
    text = " ".join(say("extract", "--ckpt_path", checkpoint, "--output", "s.pth").split())
    for fact in ("parameters", "multiply-adds", "bit for bit", "s.pth"):
        assert fact in text
    student().load_state_dict(torch.load("s.pth", weights_only=True), strict=True)


def test_extraction_of_the_teacher(last: str, say: Callable[..., str]) -> None:
    text = say("extract", "--ckpt_path", last, "--output", "t.pth", "--which", "teacher")
    assert "teacher" in text
    wide, narrow = torch.load("t.pth", weights_only=True), student().state_dict()
    assert wide["conv1.weight"].shape[0] == 2 * narrow["conv1.weight"].shape[0]


@pytest.mark.slow
def test_extracted_student_starts_another_run(last: str, say: Callable[..., str]) -> None:
    say("extract", "--ckpt_path", last, "--output", "s.safetensors")
    options = ["--model.student_weights", "s.safetensors", "--model.optimizer.lr", "0"]
    say("fit", *STUDENT, *FAST, *options)
    state = torch.load("runs/gpd/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in load_file("s.safetensors").items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(state[f"network.network.{name}"], tensor)


# Mistakes


def test_unknown_command(refuse: Callable[..., str]) -> None:
    refuse("train", naming="train", code=2)


@pytest.mark.parametrize("command", ["fit", "expand", "extract", "validate"])
def test_unknown_option(command: str, refuse: Callable[..., str]) -> None:
    refuse(command, "--speed", "3", naming="speed|required", code=2)


def test_unknown_option_beside_everything_needed(refuse: Callable[..., str]) -> None:
    refuse("fit", *STUDENT, *FAST, "--model.widen", "3", naming="widen", code=2)


@pytest.mark.parametrize("command", ["fit", "expand"])
def test_missing_student(command: str, refuse: Callable[..., str]) -> None:
    output = ["--output", "w.safetensors"] if command == "expand" else []
    refuse(command, *output, naming="student", code=2)


def test_unknown_model_with_a_suggestion(refuse: Callable[..., str]) -> None:
    arguments = ["--model.student", "resnet81", "--output", "w.safetensors"]
    said = refuse("expand", *arguments, naming="resnet81")
    assert "resnet18" in said
    refuse("fit", "--model.student", "resnet81", *CPU, naming="resnet81")


def test_arguments_the_student_does_not_take(refuse: Callable[..., str]) -> None:
    arguments = ["--model.student", "resnet18", "--model.student_args", "{colour: 3}"]
    refuse("expand", *arguments, "--output", "w.safetensors", naming="colour")


def test_missing_configuration(refuse: Callable[..., str]) -> None:
    refuse("fit", "-c", "nowhere.yaml", naming=r"nowhere\.yaml")


def test_configuration_that_is_no_yaml(refuse: Callable[..., str]) -> None:
    Path("broken.yaml").write_text("model: {student: [")
    refuse("fit", "-c", "broken.yaml", naming=r"broken\.yaml|yaml|pars")


@pytest.mark.parametrize("command", ["fit", "expand"])
@pytest.mark.parametrize("kind", ["missing", "text", "other"])
def test_weights_that_cannot_be_loaded(command: str, kind: str, refuse: Callable[..., str]) -> None:
    path = Path("weights.pth")
    if kind == "text":
        path.write_text("these are no weights")
    elif kind == "other":
        torch.save(nn.Linear(3, 3).state_dict(), path)
    rest = FAST if command == "fit" else ["--output", "w.safetensors"]
    refuse(command, *STUDENT, "--model.student_weights", str(path), *rest, naming=r"weights\.pth")


@pytest.mark.parametrize("command", ["fit", "expand"])
def test_weights_of_other_classes_start_all_but_the_classifier(
    command: str, say: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(student(7).state_dict(), "weights.pth")
    rest = FAST if command == "fit" else ["--output", "w.safetensors"]
    say(command, *STUDENT, "--model.student_weights", "weights.pth", *rest)
    assert (
        "the classifier (fc) is initialized anew, since the file has 7 classes and not 10"
        in caplog.text
    )


def test_classes_of_data_and_student_differ(refuse: Callable[..., str]) -> None:
    said = refuse("fit", *STUDENT, *FAST, "--model.num_classes", "7", naming="10 classes")
    assert "--model.num_classes 10" in said


def static(args: dict[str, object], classes: int = 10) -> list[str]:
    network = timm.create_model("resnet18", num_classes=classes, **args)
    torch.save(network.state_dict(), "static.pth")
    return [
        *("--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(args)),
        *("--model.static_teacher.weights", "static.pth"),
    ]


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "taught"])
def test_channels_of_data_and_student_differ(refuse: Callable[..., str], taught: bool) -> None:
    teacher = static(TINY) if taught else []
    options = [*STUDENT, *FAST, *teacher, "--data.in_chans", "3"]
    said = refuse("fit", *options, naming="The images have 3 channels")
    assert "or set --data.in_chans 1." in said


class Seven(nn.Module):
    """A network of seven classes, whatever number is asked for."""

    pretrained_cfg: ClassVar = {"input_size": (1, 16, 16)}

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 16, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def test_classes_of_static_teacher_differ(refuse: Callable[..., str]) -> None:
    naming = r"fc\.weight .*7"
    refuse("fit", *STUDENT, *FAST, *static(TINY, classes=7), naming=naming)
    torch.save(Seven().state_dict(), "static.pth")
    own = ["--model.static_teacher.name", "test_cli.Seven"]
    own += ["--model.static_teacher.weights", "static.pth"]
    naming = r"test_cli\.Seven has 7 classes but the student has 10; give one"
    refuse("fit", *STUDENT, *FAST, *own, naming=naming)


def test_channels_of_static_teacher_differ(refuse: Callable[..., str]) -> None:
    naming = "resnet18 takes images of 3 channels but the student takes 1; give one"
    refuse("fit", *STUDENT, *FAST, *static(TINY | {"in_chans": 3}), naming=naming)


def test_networks_of_one_image_size_name_it(refuse: Callable[..., str]) -> None:
    small = {"in_chans": 1, "img_size": 48, "depth": 1, "embed_dim": 24}
    vit = ["--model.student", "vit_tiny_patch16_224", "--model.student_args", str(small)]
    refuse("fit", *vit, "--model.num_classes", "10", *FAST, naming=r"student_args '{img_size: 16}'")
    torch.save(
        timm.create_model("vit_tiny_patch16_224", num_classes=10, **small).state_dict(), "v.pth"
    )
    teacher = ["--model.static_teacher.name", "vit_tiny_patch16_224"]
    teacher += [
        "--model.static_teacher.args",
        str(small),
        "--model.static_teacher.weights",
        "v.pth",
    ]
    refuse("fit", *STUDENT, *teacher, *FAST, naming=r"static_teacher\.args '{img_size: 16}'")


def test_static_teacher_without_weights_teaches_nothing(refuse: Callable[..., str]) -> None:
    options = ["--model.static_teacher.name", "resnet18", "--model.static_teacher.args", str(TINY)]
    refuse("fit", *STUDENT, *FAST, *options, naming=r"static_teacher\.weights")


def test_weights_of_no_static_teacher(refuse: Callable[..., str]) -> None:
    options = ["--model.static_teacher.weights", "static.pth"]
    refuse("fit", *STUDENT, *FAST, *options, naming=r"--model\.static_teacher\.name NAME")


def test_unknown_setting_of_the_method(refuse: Callable[..., str]) -> None:
    options = [*static(TINY), "--model.method.tau", "2"]
    refuse(
        "fit", *STUDENT, *FAST, *options, naming="'tau'.* gpd fit --model.method.help KD", code=2
    )


def test_unknown_method(refuse: Callable[..., str]) -> None:
    refuse("fit", *STUDENT, *FAST, "--model.method", "crdd", naming="crdd")


def test_unknown_optimizer_and_schedule(refuse: Callable[..., str]) -> None:
    for option, typed, meant in (("opt", "sgdd", "sgd"), ("sched", "cosines", r"cosine\?")):
        naming = rf"'{typed}' \(did you mean {meant}.*--model.optimizer.{option} takes"
        refuse("fit", *STUDENT, *FAST, f"--model.optimizer.{option}", typed, naming=naming)


def test_runs_below_a_file(refuse: Callable[..., str]) -> None:
    Path("taken").touch()
    options = ["--trainer.default_root_dir", "taken"]
    refuse("fit", *STUDENT, *FAST, *options, naming="taken' is a file, not a folder; choose")


def test_unknown_data_of_torchvision(refuse: Callable[..., str]) -> None:
    options = ["--data.dataset", "torch/cifar1000", "--data.root", "images"]
    said = refuse("fit", *STUDENT, *FAST, *options, naming=r"did you mean torch/cifar100\?")
    assert "download" not in said


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the machine has a GPU")
def test_no_gpu(refuse: Callable[..., str]) -> None:
    options = ["--trainer.accelerator", "gpu"]
    refuse("fit", *STUDENT, *FAST, *options, naming="no GPU .* --trainer.accelerator cpu")


def unusual(pretrained: bool = False, num_classes: int = 10, **_: object) -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LocalResponseNorm(3))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))


def test_layer_that_cannot_be_expanded(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "unusual", unusual)
    arguments = ["--model.student", "unusual", "--output", "w.safetensors"]
    refuse("expand", *arguments, naming=r"0\.1.*LocalResponseNorm")


def test_run_without_log(refuse: Callable[..., str]) -> None:
    barebones = ["--trainer.barebones", "true"]
    refuse("fit", *STUDENT, *FAST, *barebones, naming="leave out --trainer.barebones")


@pytest.mark.parametrize("ratio", ["0.5", "0", "-2"])
def test_ratio_below_one(ratio: str, refuse: Callable[..., str]) -> None:
    refuse(
        "expand", *STUDENT, f"--model.ratio={ratio}", "--output", "w.safetensors", naming="ratio"
    )


@pytest.mark.parametrize("ratio", [".nan", ".inf"])
def test_ratio_that_is_no_number(ratio: str, refuse: Callable[..., str]) -> None:
    refuse(
        "expand", *STUDENT, f"--model.ratio={ratio}", "--output", "w.safetensors", naming="ratio"
    )


@pytest.mark.parametrize("branches", ["0", "7", "[1x1, 9x9]", "[1x1, 1x1]"])
def test_branches_there_are_not(branches: str, refuse: Callable[..., str]) -> None:
    options = [f"--model.branches={branches}", "--output", "w.safetensors"]
    refuse("expand", *STUDENT, *options, naming="branch")


def test_branches_that_are_no_list(refuse: Callable[..., str]) -> None:
    options = ["--model.branches={a: 1}", "--output", "w.safetensors"]
    refuse("expand", *STUDENT, *options, naming="no branch")


def test_output_below_a_file(last: str, refuse: Callable[..., str]) -> None:
    Path("file").write_text("")
    refuse("expand", *STUDENT, "--output", "file/w.safetensors", naming="file")
    refuse("extract", "--ckpt_path", last, "--output", "file/s.pth", naming="file")
    refuse("predict", "--ckpt_path", last, *CPU, "--output", "file/p.csv", naming="file")


def test_output_with_a_wrong_ending(last: str, refuse: Callable[..., str]) -> None:
    said = refuse("expand", *STUDENT, "--output", "wide.pth", naming=r"wide\.pth")
    assert ".safetensors" in said
    refuse("extract", "--ckpt_path", last, "--output", "s.zip", naming=r"s\.zip")


def test_plan_that_cannot_be_written(refuse: Callable[..., str]) -> None:
    Path("file").write_text("")
    for rest in (["--dry_run"], ["--output", "w.safetensors"]):
        refuse("expand", *STUDENT, "--plan", "file/plan.yaml", *rest, naming=r"file/plan\.yaml")
    same = ["--plan", "w.safetensors", "--output", "w.safetensors"]
    refuse("expand", *STUDENT, *same, naming=r"plan.*w\.safetensors")


def test_excluded_layers_there_are_not(refuse: Callable[..., str]) -> None:
    options = ["--model.exclude", "blocks.*"]
    refuse("expand", *STUDENT, *options, "--dry_run", naming=r"blocks\.\*")
    refuse("expand", *STUDENT, *options, "--output", "w.safetensors", naming=r"blocks\.\*")


@pytest.mark.parametrize("multiple", ["0", "-8"])
def test_width_multiple_below_one(multiple: str, refuse: Callable[..., str]) -> None:
    options = [f"--model.width_multiple={multiple}", "--dry_run"]
    refuse("expand", *STUDENT, *options, naming="multiple")


def test_unknown_start_of_branches(refuse: Callable[..., str]) -> None:
    options = ["--model.branch_init", "ones", "--dry_run"]
    refuse("expand", *STUDENT, *options, naming="branch_init", code=2)


def test_layers_without_branches(refuse: Callable[..., str]) -> None:
    options = ["--model.branches", "6", "--model.branch_layers", "blocks.*"]
    refuse("expand", *STUDENT, *options, "--output", "w.safetensors", naming=r"blocks\.\*")


def test_branches_that_do_not_suit_their_start(refuse: Callable[..., str]) -> None:
    options = ["--model.branches", "dbb", "--model.branch_init", "gpd", "--dry_run"]
    refuse("expand", *STUDENT, *options, naming="branch_init gpd")


def test_resuming_with_other_layers_excluded(last: str, refuse: Callable[..., str]) -> None:
    config = Path(last).parents[4] / "tiny.yaml"
    other = ["-c", str(config), "--model.exclude", "layer4.*", "--trainer.max_epochs", "2"]
    refuse("fit", *other, "--ckpt_path", last, naming=r"--model\.exclude")


def test_missing_output(last: str, refuse: Callable[..., str]) -> None:
    refuse("expand", *STUDENT, naming="output", code=2)
    refuse("extract", "--ckpt_path", last, naming="output", code=2)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "extract"])
@pytest.mark.parametrize("kind", ["missing", "text"])
def test_checkpoint_that_cannot_be_read(
    command: str, kind: str, refuse: Callable[..., str]
) -> None:
    if kind == "text":
        Path("last.ckpt").write_text("these are no weights")
    rest = {"fit": [*STUDENT, *FAST], "extract": ["--output", "s.pth"]}.get(command, CPU)
    refuse(command, "--ckpt_path", "last.ckpt", *rest, naming=r"last\.ckpt")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_without_checkpoint_asks_for_one(
    command: str, refuse: Callable[..., str]
) -> None:
    refuse(command, *CPU, naming="--ckpt_path", code=2)


def test_resuming_with_another_network(last: str, refuse: Callable[..., str]) -> None:
    other = [*STUDENT, *FAST, "--model.ratio", "3", "--trainer.max_epochs", "2"]
    refuse("fit", *other, "--ckpt_path", last, naming=r"last\.ckpt|checkpoint")


def test_missing_data(refuse: Callable[..., str]) -> None:
    data = ["--data.dataset", "folder", "--data.root", "nowhere"]
    refuse("fit", *STUDENT, *FAST, *data, naming="nowhere")


def test_unknown_data(refuse: Callable[..., str]) -> None:
    refuse("fit", *STUDENT, *FAST, "--data.dataset", "torch/cifar12", naming="cifar12")


def test_student_of_wrong_type(refuse: Callable[..., str]) -> None:
    refuse("fit", *STUDENT, *FAST, "--trainer.max_epochs", "many", naming="max_epochs", code=2)


@pytest.mark.parametrize("command", [["--help"], ["recipes"], ["recipes", "digits"]])
def test_output_that_nobody_reads_any_longer_is_no_error(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        result = subprocess.run(
            [sys.executable, "-m", "gpd_cli", *command],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert result.returncode == 128 + signal.SIGPIPE
    assert result.stderr == ""
