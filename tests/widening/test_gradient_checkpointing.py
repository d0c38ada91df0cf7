"""Students whose backward pass runs parts of them again: refused, with the way to switch it off."""

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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of reentrant ones
@pytest.mark.parametrize(
    ("build", "part"),
    [
        (vit, r"blocks\.\d \(Block\)"),
        (lambda: of_timm("test_resnet"), r"layer\d\.\d \(BasicBlock\)"),
        (lambda: Checkpointing(False, True), r"block \(Sequential\)"),
        (lambda: Checkpointing(False, False), r"block \(Sequential\)"),
        (lambda: Checkpointing(True, True), r"the student \(Checkpointing\)"),
        (lambda: Checkpointing(True, False), r"the student \(Checkpointing\)"),
        (
            lambda: torchvision.models.DenseNet(
                8, (2, 2), 16, num_classes=5, memory_efficient=True
            ),
            r"features\.denseblock\d\.denselayer\d\.norm1 \(BatchNorm2d\)",
        ),
    ],
    ids=["vit", "resnet", "always", "training", "reentrant", "reentrant_training", "densenet"],
)
def test_the_refusal_says_how_to_switch_it_off(build: Callable[[], nn.Module], part: str) -> None:
    sentence = rf"^{part} .*gradient checkpointing.*set_grad_checkpointing\(False\).*\.$"
    with pytest.raises(ExpansionError, match=sentence):
        expand(build(), sample=torch.randn(2, 3, 32, 32))


def test_switched_off_it_expands() -> None:
    student = vit()
    student.set_grad_checkpointing(False)
    assert_exact(student, torch.randn(3, 3, 32, 32, dtype=torch.float64))


class Offloading(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return self.head(self.block(self.stem(x)).mean((2, 3)))


def test_activations_that_wait_elsewhere_are_no_checkpointing() -> None:
    assert_exact(Offloading(False, False), torch.randn(3, 3, 16, 16, dtype=torch.float64))
