"""Commands, configurations and checkpoints of before methods and static teachers were classes."""

from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from gpd_cli.__main__ import main
from gpd_cli.cli.old_forms import current_arguments, current_settings
from gpd_cli.errors import MethodError

TINY = {"in_chans": 1, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
CONFIG = f"""
model:
  student: resnet18
  student_args: {TINY}
  num_classes: 10
  branches: 1
data: {{image_size: 16, batch_size: 32}}
trainer: {{accelerator: cpu, max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1}}
"""
PAIR = """
model.static_teacher: resnet18
model.static_teacher_stages: [layer1]
data.batch_size: 16
"""
METHOD = """
model.method: fitnets
model.method_args: {stage: 1, weight: 2.0}
model.stages: [layer1]
"""
OPTIONS = ["--model.static_teacher_args", str(TINY), "--model.static_teacher_weights", "static.pth"]
LAST = ["--ckpt_path", "runs/tiny_pair_method/version_0/checkpoints/last.ckpt"]
OLD_RUN = ["-c", "tiny.yaml", "-c", "pair.yaml", "-c", "method.yaml", *OPTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run that was configured in old forms."""
    folder = tmp_path_factory.mktemp("old")
    with chdir(folder):
        for name, text in (("tiny", CONFIG), ("pair", PAIR), ("method", METHOD)):
            Path(f"{name}.yaml").write_text(text)
        torch.manual_seed(0)
        torch.save(timm.create_model("resnet18", num_classes=10, **TINY).state_dict(), "static.pth")
        assert main(["fit", *OLD_RUN]) == 0
        yield folder


def printed(*arguments: str) -> dict[str, Any]:
    output = StringIO()
    with redirect_stdout(output):
        assert main(["fit", *arguments, "--print_config"]) == 0
    return yaml.safe_load(output.getvalue())


def test_old_configurations_and_options_mean_what_they_did(folder: Path) -> None:
    config = printed(*OLD_RUN)
    model = config["model"]
    assert model["static_teacher"] == {
        "name": "resnet18",
        "weights": "static.pth",
        "args": TINY,
        "stages": ["layer1"],
    }
    assert model["method"] == {
        "class_path": "gpd_cli.distill.methods.FitNets",
        "init_args": {"stage": 1, "weight": 2.0},
    }
    assert config["data"]["init_args"]["batch_size"] == 16
    assert config["data"]["init_args"]["image_size"] == 16
    assert model["branches"] == 1


def test_options_of_the_readme_before() -> None:
    old = "fit --model.static_teacher resnet34 --model.static_teacher_weights w.pth --model.method"
    new = "fit --model.static_teacher.name resnet34 --model.static_teacher.weights w.pth"
    assert current_arguments([*old.split(), "dkd"]) == [*new.split(), "--model.method", "DKD"]
    for before, now in (
        ("--model.method_args.beta=4", "--model.method.beta=4"),
        ("--model.static_teacher=null", "--model.static_teacher.name=null"),
        ("--model.static_teacher_stages+=layer1", "--model.static_teacher.stages+=layer1"),
        ("--model.static_teacher_args.in_chans=1", "--model.static_teacher.args.in_chans=1"),
        ("--model.method=mine.Cosine", "--model.method=mine.Cosine"),
        ("--model.static_weight=2", "--model.static_weight=2"),
    ):
        assert current_arguments(["fit", before]) == ["fit", now]
        assert current_arguments(["fit", now]) == ["fit", now]


def test_settings_that_stood_alone_are_refused_with_their_new_form(folder: Path) -> None:
    for arguments in (["--model.method_args", "{beta: 2}"], ["--model.method_args={beta: 2}"]):
        with pytest.raises(MethodError, match=r"write --model\.method\.beta 2"):
            current_arguments(["fit", *arguments])
    with pytest.raises(MethodError, match=r"class_path and init_args"):
        current_settings({"model.method_args": {"beta": 2}})


def test_refusals_of_old_forms_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("alone.yaml").write_text("model: {method_args: {beta: 2}}")
    for arguments in (["-c", "alone.yaml"], ["--model.method_args", "{beta: 2}"]):
        assert main(["fit", "-c", "tiny.yaml", *arguments]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert (
            said.startswith("gpd: error: The option method_args no longer")
            and said.count("\n") == 0
        )


@pytest.fixture
def old(folder: Path) -> list[str]:
    """The run's last checkpoint, with settings as they were stored before."""
    content = torch.load(LAST[1], weights_only=True)
    settings = content["hyper_parameters"]
    static = settings.pop("static_teacher")
    settings["static_teacher"] = static["name"]
    settings |= {f"static_teacher_{part}": static[part] for part in ("weights", "args", "stages")}
    settings |= {"method": "fitnets", "method_args": settings["method"]["init_args"]}
    del content["datamodule_hyper_parameters"]["_class_path"]
    torch.save(content, "old.ckpt")
    return ["--ckpt_path", "old.ckpt"]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_old_checkpoints_are_evaluated(folder: Path, old: list[str], command: str) -> None:
    limit = f"--trainer.limit_{'val' if command == 'validate' else command}_batches"
    Path("static.pth").rename("away.pth")
    try:
        assert main([command, *old, limit, "1", "--trainer.accelerator", "cpu"]) == 0
    finally:
        Path("away.pth").rename("static.pth")


def test_old_checkpoints_are_extracted(folder: Path, old: list[str]) -> None:
    assert main(["extract", *old, "--output", "student.pth"]) == 0
    state = torch.load("student.pth", weights_only=True)
    timm.create_model("resnet18", num_classes=10, **TINY).load_state_dict(state)


def test_old_checkpoints_are_gone_on_from(
    folder: Path, old: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ["--trainer.max_epochs", "2"]
    assert main(["fit", *OLD_RUN, *old, *longer]) == 0
    assert "epoch 2/2" in capsys.readouterr().out
    # With other parts of the method both are named.
    assert main(["fit", *OLD_RUN, *old, *longer, "--model.method", "kd"]) == 1
    assert "(fitnets) than that of this run (KD)" in capsys.readouterr().err


def test_code_imports_expansion_and_its_rules_from_their_earlier_path() -> None:
    import gpd_cli
    from gpd_cli import expansion

    assert all(getattr(expansion, name) is getattr(gpd_cli, name) for name in expansion.__all__)
