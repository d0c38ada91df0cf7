"""Layers that compute in float32 whatever comes: in float64 while probing and certifying only."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNormFp32, RmsNormFp32
from torch import Tensor, nn

from exactness import assert_exact
from gpd_cli import Pair, expand
from gpd_cli.widening.running.double import in_double

SAMPLE = torch.zeros(2, 3, 16, 16)


class Float32Norm(nn.Module):
    """An RMS norm as language models have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    """Softmax in float32, and rotations by angles that are made in float32."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("inv_freq", 1 / 100 ** torch.linspace(0, 1, width // heads // 2))

    def rotated(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[2])
        angles = places[:, None].float() @ self.inv_freq[None].float()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.rotated(q) @ self.rotated(k).mT * self.head_dim**-0.5
        y = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(v) @ v
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, width, 4, 4), norm(width)
        self.attention, self.head = Attention(width, 2), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        return self.head(self.attention(self.norm(x)).mean(1))


@pytest.mark.parametrize("norm", [LayerNormFp32, RmsNormFp32, Float32Norm])
def test_layers_in_float32_expand_exactly(norm: Callable[[int], nn.Module]) -> None:
    pair = assert_exact(Transformer(norm), torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert pair.teacher.attention.proj.weight.shape == (32, 32)
    assert not pair.plan.kept_narrow


@pytest.mark.parametrize("norm", [LayerNormFp32, RmsNormFp32])
def test_timm_networks_with_norms_in_float32_expand_exactly(norm: type[nn.Module]) -> None:
    student = timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 32, "num_classes": 5, "depth": 1, "embed_dim": 48, "num_heads": 3},
        norm_layer=norm,
    )
    pair = assert_exact(student, torch.randn(3, 3, 32, 32, dtype=torch.float64))
    assert not pair.plan.kept_narrow


def test_in_training_such_layers_compute_in_float32() -> None:
    pair = expand(Transformer(LayerNormFp32).double(), sample=SAMPLE)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        as_written = pair.student(x)
        with in_double():
            in_float64 = pair.student(x)
    assert 1e-12 < float((as_written - in_float64).abs().max()) < 1e-5


def test_what_is_asked_for_in_float32_is_in_float64() -> None:
    x = torch.randn(3, dtype=torch.float64)
    other = torch.zeros(3)
    with in_double():
        assert x.float() is x  # as in float32 training, where nothing is copied
        results = [
            *(x.to(torch.float32), x.to(dtype=torch.float), x.type(torch.float32)),
            *(torch.arange(3).float(), torch.zeros(3), torch.ones(3, dtype=torch.float32)),
            *(x.softmax(0, dtype=torch.float32), other.float(), torch.tensor(0.5)),
        ]
        assert [y.dtype for y in results] == [torch.float64] * len(results)
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
        assert torch.zeros(2, dtype=torch.int32).view(torch.float32).shape == (2,)
    assert (x.float().dtype, torch.zeros(3).dtype) == (torch.float32, torch.float32)


def test_errors_leave_the_default_type_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), in_double():
        _ = 1 / 0
    assert torch.get_default_dtype() == torch.float32


class Averages(nn.Module):
    """A student whose own code makes a matrix, without saying of which type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().flatten(2)
        return self.head((x @ torch.full((x.shape[2], 1), 1 / x.shape[2])).squeeze(2))


def test_tensors_that_forward_makes_are_of_the_type_that_it_runs_in() -> None:
    pair = expand(Averages(), sample=SAMPLE)
    assert pair.teacher.get_submodule("conv").out_channels == 16


class Caches(nn.Module):
    """A student that keeps a table it has made, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.table = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return self.head((x * self.table).relu().mean((2, 3)))


def test_tables_that_forward_keeps_are_made_anew_in_the_type_of_training() -> None:
    pair: Pair = expand(Caches(), sample=SAMPLE)
    student, teacher = pair(torch.randn(2, 3, 16, 16))
    assert student.dtype == teacher.dtype == torch.float32
