"""Both networks with weights, or norms, of their own."""

import copy
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct, EvoNorm2dB0, RmsNorm2d
from torch import Tensor, nn

from gpd_cli import expand
from gpd_cli.__main__ import main
from gpd_cli.errors import WeightsError
from gpd_cli.models import ModelSpec
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.checkpoint import load_networks
from gpd_cli.teacher.description import check_same_network, describe_run
from gpd_cli.teacher.unshared import Unshared, without_sharing
from gpd_cli.widening.running.randomize import randomize

IMAGES = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


class Tied(nn.Module):
    """A convolution, a norm and a classifier; two modules have a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.stem = nn.Sequential(self.conv, self.bn)
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


def unshared(network: nn.Module, branches: int = 3, *, only_norms: bool = False) -> Unshared:
    pair = expand(network, sample=IMAGES, branches=branches)
    return Unshared.of(pair, only_norms=only_norms).train()


def step(network: nn.Module, loss: Tensor) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("only_norms", [False, True], ids=["all", "norms"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_both_networks_start_as_the_student(mode: str, only_norms: bool) -> None:
    network = student()
    pair = unshared(network, only_norms=only_norms)
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


def test_norms_of_its_own_are_trained_by_the_students_loss_only() -> None:
    pair = unshared(student(), only_norms=True)
    own = {name for name, _ in pair.narrow.named_parameters()}
    assert own == {"bn.weight", "bn.bias"}
    narrow, wide = pair(IMAGES)
    F.cross_entropy(wide, LABELS).backward()
    assert all(pair.narrow.get_parameter(name).grad is None for name in own)
    narrow, wide = pair(IMAGES)
    pair.zero_grad()
    F.cross_entropy(narrow, LABELS).backward()
    assert all(pair.narrow.get_parameter(name).grad.abs().max() > 0 for name in own)  # type: ignore[union-attr]
    assert pair.teacher.bn.weight.grad is None
    # The kernels are shared, so the student's loss moves those of the teacher.
    shared = pair.teacher.conv.parametrizations.weight.original.grad
    assert shared.abs().max() > 0


def test_norms_are_found_by_what_they_do_not_by_their_base_class() -> None:
    class NormedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.normalize(x), F.normalize(self.weight))

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = ConvNormAct(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.evo = EvoNorm2dB0(4)
            self.rms, self.cosine = RmsNorm2d(4), NormedLinear()

        def forward(self, x: Tensor) -> Tensor:
            return self.cosine(self.rms(self.last(self.evo(self.conv(x)))).mean((2, 3)))

    pair = Unshared.of(expand(Normed(), sample=IMAGES.float(), noise=0.0), only_norms=True)
    owners = {name.rpartition(".")[0] for name, _ in pair.narrow.named_parameters()}
    assert owners == {"conv.bn", "evo", "rms"}


def test_a_student_without_norms_has_none_of_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    pair = expand(network.double(), sample=IMAGES)
    assert without_sharing(pair, shared=True, shared_norms=False) is pair


@pytest.mark.parametrize("only_norms", [False, True], ids=["all", "norms"])
def test_a_run_without_gradients_leaves_the_students_weights_as_they_are(only_norms: bool) -> None:
    pair = unshared(student(), only_norms=only_norms)
    before = dict(pair.narrow.named_parameters())
    with torch.no_grad():
        pair(IMAGES), pair.student(IMAGES)
    after = dict(pair.narrow.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("own", ["nothing", "norms", "weights"])
def test_checkpoints_of_the_time_before_norms_of_its_own_are_accepted(own: str) -> None:
    pair = without_sharing(
        expand(student(), sample=IMAGES), shared=own != "weights", shared_norms=own == "nothing"
    )
    spec = ModelSpec("tests.Tied", 5, {})
    entry = describe_run(pair, spec, (3, 8, 8), (), ("all",), "mixed")
    old = {name: value for name, value in entry.items() if name != "shared_norms"}
    if own == "norms":
        with pytest.raises(WeightsError, match="with norms of its own"):
            check_same_network(old, entry)
    else:
        check_same_network(old, entry)


@pytest.mark.parametrize("only_norms", [False, True], ids=["all", "norms"])
def test_both_networks_are_extracted_as_they_were_trained(only_norms: bool) -> None:
    pair = unshared(student(), only_norms=only_norms)
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
@pytest.mark.parametrize("own", ["weights", "norms"])
def test_a_run_is_trained_resumed_tested_and_extracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    last = "runs/gpd/version_0/checkpoints/last.ckpt"
    option = ("--model.shared" if own == "weights" else "--model.shared_norms", "false")
    assert fit(tmp_path, *option, "--trainer.max_epochs", "1") == 0
    network, description = load_networks(tmp_path / last)
    assert isinstance(network, Unshared) and network.only_norms == (own == "norms")
    assert (description.shared, description.shared_norms) == (own == "norms", own == "weights")
    resumed = ("--trainer.max_epochs", "2", "--ckpt_path", last)
    assert fit(tmp_path, *resumed, *option) == 0
    with chdir(tmp_path):
        assert main(["test", "--ckpt_path", last, "--trainer.accelerator", "cpu"]) == 0
        assert main(["extract", "--ckpt_path", last, "--output", "student.pth"]) == 0
    capsys.readouterr()
    assert fit(tmp_path, *resumed) == 1
    assert f"with {own} of its own" in capsys.readouterr().err
