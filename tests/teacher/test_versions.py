"""Networks whose modules load no state of an unknown version (torchvision's MNASNet)."""

from contextlib import chdir
from pathlib import Path

import pytest
import torch
import torchvision

import runs
from gpd_cli.__main__ import main
from gpd_cli.commands.expand import expand_command
from gpd_cli.commands.extract import extract_command
from gpd_cli.models import ModelSpec, create_model

NAME = "torchvision/mnasnet0_5"


def test_what_was_expanded_is_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide, weights = tmp_path / "wide.safetensors", tmp_path / "student.pth"
    student = ModelSpec(NAME, 3).build()
    torch.save(student.state_dict(), weights)
    expand_command(
        wide, student=NAME, student_weights=str(weights), num_classes=3, image_size=32, branches=1
    )
    extract_command(wide, str(tmp_path / "again.pth"))
    again = torchvision.models.mnasnet0_5(num_classes=3)
    again.load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True))
    for name, tensor in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert "_metadata" not in capsys.readouterr().out
    extract_command(wide, str(tmp_path / "again.safetensors"))
    remedy = "state._metadata = network.state_dict()._metadata"
    assert remedy in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("average", [[], ["--trainer.callbacks+=gpd_cli.EMA"]])
def test_a_run_is_scored_resumed_and_extracted(tmp_path: Path, average: list[str]) -> None:
    student = ["--model.student", NAME, "--model.student_args", "null", "--data.in_chans", "3"]
    options = [*student, *runs.ALONE, *average, "--data.image_size", "32"]
    options += ["--model.optimizer.lr", "1e-6"]  # its running statistics hardly move
    assert runs.fit(tmp_path, *options) == 0
    with chdir(tmp_path):
        last = "runs/gpd/version_0/checkpoints/last.ckpt"
        assert main(["validate", "--ckpt_path", last, "--trainer.accelerator", "cpu"]) == 0
        assert main(["extract", "--ckpt_path", last, "--output", "s.safetensors"]) == 0
    assert runs.fit(tmp_path, *options, "--ckpt_path", last, epochs=2) == 0


def test_weights_of_such_a_network_within_another_one(tmp_path: Path) -> None:
    name, args = f"simkd/{NAME}", {"features": 8}
    student = create_model(name, num_classes=3, model_args=args)
    torch.save(student.state_dict(), tmp_path / "s.pth")
    again = create_model(name, num_classes=3, model_args=args, weights=tmp_path / "s.pth")
    assert torch.equal(again.classifier.weight, student.classifier.weight)
