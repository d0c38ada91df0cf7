"""Both networks with weights of their own: what the method is without sharing."""

import copy
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli import expand
from gpd_cli.__main__ import main
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.checkpoint import load_networks
from gpd_cli.teacher.unshared import Unshared
from gpd_cli.widening.running.randomize import randomize

IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


class Tied(nn.Module):
    """A convolution, a norm and a classifier, and a linear layer that is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(self.again(F.gelu(self.mix(x))))


def student() -> nn.Module:
    network = Tied().double()
    randomize(network, torch.Generator().manual_seed(2))
    return network.train()


def unshared(network: nn.Module, branches: int = 3) -> Unshared:
    return Unshared.of(expand(network, sample=IMAGES, branches=branches)).train()


def step(network: nn.Module, loss: Tensor) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_both_networks_start_as_the_student(mode: str) -> None:
    network = student()
    pair = unshared(network)
    for module in (network, pair):
        module.train(mode == "train")
    expected = network(IMAGES)
    narrow, wide = pair(IMAGES)
    assert torch.equal(narrow, expected)
    assert (wide - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_student_moves_as_it_would_alone() -> None:
    alone = student()
    pair = unshared(alone)
    for _ in range(3):
        step(alone, F.cross_entropy(alone(IMAGES), LABELS))
        narrow, wide = pair(IMAGES)
        step(pair, F.cross_entropy(narrow, LABELS) + F.cross_entropy(wide, LABELS))
    found = pair.extract().state_dict()
    assert all(torch.equal(found[name], value) for name, value in alone.state_dict().items())


def test_neither_network_moves_the_other() -> None:
    pair = unshared(student())
    before = copy.deepcopy(pair.state_dict())
    step_of_student = torch.optim.SGD(pair.parameters(), lr=0.1)
    F.cross_entropy(pair(IMAGES)[0], LABELS).backward()
    step_of_student.step()
    moved = {n for n, value in pair.state_dict().items() if not torch.equal(value, before[n])}
    parameters = {name for name, _ in pair.named_parameters()}
    assert moved & parameters and all(n.startswith("narrow.") for n in moved & parameters)


def test_both_networks_are_extracted_as_they_were_trained() -> None:
    pair = unshared(student())
    narrow, wide = pair(IMAGES)
    step(pair, F.cross_entropy(narrow, LABELS) + F.cross_entropy(wide, LABELS))
    pair.eval()
    narrow, wide = pair(IMAGES)
    extracted, teacher = pair.extract(), merged_teacher(pair)
    assert torch.equal(extracted(IMAGES), narrow)
    assert (teacher(IMAGES) - wide).abs().max() < 1e-12 * wide.abs().max()
    assert extracted.again is extracted.mix


def fit(folder: Path, *options: str) -> int:
    tiny = "{in_chans: 1, layers: [1, 1, 1, 1], channels: [4, 4, 8, 8]}"
    with chdir(folder):
        return main(
            [
                *("fit", "--model.student", "resnet18", "--model.num_classes", "10"),
                *("--model.student_args", tiny, "--model.branches", "2"),
                *("--data.image_size", "16", "--data.batch_size", "32"),
                *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "3"),
                *("--trainer.limit_val_batches", "1", *options),
            ]
        )


@pytest.mark.slow
def test_a_run_is_trained_resumed_tested_and_extracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = "runs/gpd/version_0/checkpoints/last.ckpt"
    assert fit(tmp_path, "--model.shared", "false", "--trainer.max_epochs", "1") == 0
    network, description = load_networks(tmp_path / last)
    assert isinstance(network, Unshared) and not description.shared
    resumed = ("--trainer.max_epochs", "2", "--ckpt_path", last)
    assert fit(tmp_path, *resumed, "--model.shared", "false") == 0
    with chdir(tmp_path):
        assert main(["test", "--ckpt_path", last, "--trainer.accelerator", "cpu"]) == 0
        assert main(["extract", "--ckpt_path", last, "--output", "student.pth"]) == 0
    capsys.readouterr()
    assert fit(tmp_path, *resumed) == 1
    assert "with weights of its own" in capsys.readouterr().err
