"""Real architectures, as timm and torchvision build them."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from gpd_cli import Pair, expand
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.widening.running.randomize import randomize

LIGHT = ("regnety_002", "convnext_atto", "test_nfnet", "torchvision/mobilenet_v3_small")
HEAVY = (
    "resnet18",
    "resnet50",
    "mobilenetv1_100",
    "mobilenetv2_100",
    "efficientnet_b0",
    "densenet121",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "levit_128s",
    "efficientvit_m0",
    "shvit_s1",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/vit",
)
SMALL = {
    "image_size": 64,
    "patch_size": 16,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 48,
    "mlp_dim": 96,
}
RANDOM_RATES = ("p", "drop_prob", "dropout", "drop_rate")


MODELS = [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in HEAVY)]


def build(name: str) -> nn.Module:
    """The architecture with random weights, dropout and stochastic depth switched off."""
    library, _, model = name.rpartition("/")
    make = torchvision.models.get_model if library == "torchvision" else timm.create_model
    network = make(model) if name != "torchvision/vit" else VisionTransformer(**SMALL)
    for module in network.modules():
        for rate in RANDOM_RATES:
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    randomize(network, torch.Generator().manual_seed(1))
    return network


def images(name: str, dtype: torch.dtype) -> Tensor:
    size = (
        224 if any(part in name for part in ("vit_tiny", "levit", "efficientvit", "swin")) else 64
    )
    batch = 2 if size == 224 else 4
    return torch.randn(batch, 3, size, size, dtype=dtype)


def assert_exact(pair: Pair, student: nn.Module, x: Tensor) -> None:
    for training in (False, True):
        pair.train(training)
        student.train(training)
        with torch.no_grad():
            narrow, wide = pair(x)
            assert relative_difference(wide, narrow) < 1e-9
            assert relative_difference(narrow, student(x)) < 1e-12


def train(pair: Pair, x: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(pair.train().parameters(), 1e-3)
    for _ in range(steps):
        narrow, wide = pair(x)
        target = wide.detach().softmax(1)
        loss = F.cross_entropy(narrow, target) + F.cross_entropy(wide, target.argmax(1))
        optimizer.zero_grad()
        loss.backward()
        del narrow, wide, loss
        optimizer.step()
    pair.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_a_real_architecture_expands_trains_and_comes_back(name: str) -> None:
    student = build(name).double()
    x = images(name, torch.float64)
    pair = expand(student, sample=x[:2], ratio=2, branches=3)
    before = sum(p.numel() for p in student.parameters())
    assert sum(p.numel() for p in pair.parameters()) > 2.4 * before
    assert_exact(pair, student, x)

    pair.float()
    student.float()
    x = x.float()
    train(pair, x)
    assert all(p.isfinite().all() for p in pair.parameters())
    extracted = pair.eval().extract()
    for a, b in zip(extracted.parameters(), student.parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b)
    student.load_state_dict(extracted.state_dict(), strict=True)
    del extracted
    with torch.no_grad():
        expected = student.eval()(x)
        assert torch.equal(pair.student(x), expected)
        assert torch.equal(pair(x)[0], expected)
