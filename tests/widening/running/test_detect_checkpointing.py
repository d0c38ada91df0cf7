"""Students whose backward pass runs parts of them again (gradient checkpointing)."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from exactness import assert_exact
from gpd_cli import ExpansionError, expand


class Checkpointing(nn.Module):
    def __init__(self, reentrant: bool, always: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.reentrant, self.always = reentrant, always

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.always or self.training:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        else:
            x = self.block(x)
        return self.head(x.mean((2, 3)))


def of_timm(name: str, **options: object) -> nn.Module:
    network = timm.create_model(name, num_classes=5, **options)
    network.set_grad_checkpointing()
    return network


def vit() -> nn.Module:
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
    return of_timm("vit_tiny_patch16_224", **sizes)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5, memory_efficient=True)


@pytest.mark.parametrize(
    "build",
    [
        vit,
        lambda: of_timm("test_resnet"),
        lambda: Checkpointing(False, True),
        lambda: Checkpointing(False, False),
        densenet,
    ],
    ids=["vit", "resnet", "always", "training", "densenet"],
)
def test_parts_that_run_again_expand_exactly(build: Callable[[], nn.Module]) -> None:
    student = build()
    assert expand(student, sample=torch.randn(2, 3, 32, 32)).plan.runs_again
    assert_exact(student, torch.randn(3, 3, 32, 32, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("always", [True, False])
def test_parts_with_a_backward_pass_of_their_own_are_refused(always: bool) -> None:
    with pytest.raises(ExpansionError, match=r"^Checkpointing .*reentrant.*use_reentrant=False.*"):
        expand(Checkpointing(True, always), sample=torch.randn(2, 3, 32, 32))


def test_switched_off_nothing_runs_again() -> None:
    student = vit()
    student.set_grad_checkpointing(False)
    assert not expand(student, sample=torch.randn(2, 3, 32, 32)).plan.runs_again


class Offloading(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return self.head(self.block(self.stem(x)).mean((2, 3)))


def test_activations_that_wait_elsewhere_are_no_checkpointing() -> None:
    assert_exact(Offloading(False, False), torch.randn(3, 3, 16, 16, dtype=torch.float64))
