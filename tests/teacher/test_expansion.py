import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import Tensor, nn

from gpd_cli import ExpansionError, GpdError, Pair, expand
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.certification import certify
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.widening.plan import IndexMap, TensorPlan, WidthPlan
from gpd_cli.widening.running.randomize import randomize
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.tensors import Storage

IMAGE = (4, 3, 8, 8)


# Small networks, one for each way in which channels are wired


class Head(nn.Module):
    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)) if x.ndim == 4 else x.mean(1))


class Patches(nn.Module):
    """Images to tokens: ``[B, 3, 8, 8] -> [B, 4, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).mT


def conv_bn(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.05),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, stride)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(self.conv1(x))) + self.shortcut(x))


class Dense(nn.Module):
    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + k * growth),
                nn.ReLU(),
                nn.Conv2d(width + k * growth, growth, 3, padding=1),
            )
            for k in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Shuffle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = conv_bn(width // 2, width // 2)
        self.after = conv_bn(width, width, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.after(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 2, 1)
        self.expand = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.channels = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind())
        return x + self.proj(y.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

        q, k, v = self.q_norm(split(self.q(x))), split(self.k(x)), split(self.v(x))
        weights = (q @ k.mT * self.head_dim**-0.5).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))


class OneModuleBlock(nn.Module):
    """A transformer block that holds attention and MLP as direct children."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind())
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TorchAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm over the last axis, and a scale of the block's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = LayerScale(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        return x + y.permute(0, 3, 1, 2) * self.gamma


class Tokens(nn.Module):
    """Class token, register tokens and position embeddings; the class token is read out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = Patches(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.registers = nn.Parameter(torch.zeros(1, 2, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.block = Attention(width, 2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], 1)
        return self.head(self.norm(self.block(x))[:, 0])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(3, 6, 2)
        self.head, self.head_dist = Head(6), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return (self.head(x) + self.head_dist(x).amax((2, 3))) / 2


@dataclass(frozen=True)
class Case:
    """A network, and the parameters of it that keep their size (those behind the last layers)."""

    build: Callable[[], nn.Module]
    same: set[str] = field(default_factory=lambda: {"head.fc.bias"})


def network(*layers: nn.Module, head: nn.Module) -> nn.Sequential:
    named = {f"layer{k}": layer for k, layer in enumerate(layers)}
    return nn.Sequential(OrderedDict(**named, head=head))


def body() -> nn.Sequential:
    return nn.Sequential(conv_bn(3, 6), Residual(6, 8, 2), Residual(8, 8, 1))


CASES = {
    "residual": Case(
        lambda: network(conv_bn(3, 6), Residual(6, 8, 2), Residual(8, 8, 1), head=Head(8))
    ),
    "grouped": Case(
        lambda: network(conv_bn(3, 8), conv_bn(8, 12, groups=4), conv_bn(12, 8), head=Head(8))
    ),
    "depthwise": Case(
        lambda: network(conv_bn(3, 6), conv_bn(6, 18, groups=6), nn.Conv2d(18, 8, 1), head=Head(8))
    ),
    "dense": Case(lambda: network(conv_bn(3, 6), Dense(6, 4, 3), conv_bn(18, 6), head=Head(6))),
    "shuffle": Case(lambda: network(conv_bn(3, 8), Shuffle(8), Shuffle(8), head=Head(8))),
    "squeeze-excite": Case(lambda: network(conv_bn(3, 8), SqueezeExcite(8), head=Head(8))),
    "flatten": Case(
        lambda: network(
            conv_bn(3, 6, 2), nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), head=nn.Linear(10, 5)
        ),
        {"head.bias"},
    ),
    "mixer": Case(
        lambda: network(Patches(6), MixerBlock(4, 6), MixerBlock(4, 6), head=Head(6)),
        {"head.fc.bias"}
        | {f"layer{k}.tokens.{j}.{p}" for k in (1, 2) for j in (0, 2) for p in ("weight", "bias")},
    ),
    "attention": Case(lambda: network(Patches(8), Attention(8, 2), head=Head(8))),
    "separate attention": Case(
        lambda: network(Patches(8), SeparateAttention(8, 2), head=Head(8)),
        {"head.fc.bias", "layer1.q_norm.weight", "layer1.q_norm.bias"},
    ),
    "torch attention": Case(lambda: network(Patches(8), TorchAttention(8, 2), head=Head(8))),
    "torch encoder": Case(
        lambda: network(
            Patches(8),
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True),
            nn.TransformerEncoderLayer(8, 4, 16, 0.0, "gelu", batch_first=True),
            head=Head(8),
        )
    ),
    "one-module blocks": Case(
        lambda: network(Patches(8), *(OneModuleBlock(8, 2) for _ in range(8)), head=Head(8))
    ),
    "convnext": Case(lambda: network(nn.Conv2d(3, 6, 2, 2), ConvNeXt(6), head=Head(6))),
    "group norm": Case(
        lambda: network(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), head=Head(6)
        )
    ),
    "one group": Case(
        lambda: network(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.GELU(), head=Head(8))
    ),
    "prelu": Case(
        lambda: network(
            nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 8, 3), nn.PReLU(), head=Head(8)
        ),
        {"head.fc.bias", "layer3.weight"},
    ),
    "tokens": Case(lambda: Tokens(8), {"head.bias"}),
    "features": Case(
        body,
        {f"{k}.bn2.{p}" for k in (1, 2) for p in ("weight", "bias")}
        | {f"1.shortcut.1.{p}" for p in ("weight", "bias")},
    ),
    "convolutional head": Case(
        lambda: network(
            conv_bn(3, 6),
            conv_bn(6, 8),
            head=nn.Sequential(
                nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            ),
        ),
        {"head.0.bias"},
    ),
    "two heads": Case(TwoHeads, {"head.fc.bias", "head_dist.bias"}),
}
UNEVEN = ("residual", "depthwise", "dense", "squeeze-excite", "flatten", "prelu", "features")
"""Networks without a layer that needs all channels to have equally many copies."""

RUNS = [(name, r) for name in CASES for r in (2, 3)] + [(name, 1.5) for name in UNEVEN]


def randomized(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    student = CASES[name].build().to(dtype)
    randomize(student, torch.Generator().manual_seed(1))
    return student


@cache
def plan_of(name: str, ratio: float) -> WidthPlan:
    """A network's plan, by which several tests expand it, since the search takes most time."""
    return find_plan(randomized(name, torch.float32), torch.randn(IMAGE), ratio)


# Exactness


@pytest.mark.parametrize(("name", "ratio"), RUNS)
def test_teacher_and_student_compute_the_same(name: str, ratio: float) -> None:
    student = randomized(name)
    pair = expand(student, sample=torch.randn(2, *IMAGE[1:]), ratio=ratio, branches=3)
    images = torch.randn(IMAGE, dtype=torch.float64)
    for training in (False, True):
        pair.train(training)
        student.train(training)
        with torch.no_grad():
            expected, (narrow, wide) = student(images), pair(images)
        assert relative_difference(wide, expected) < 1e-9
        assert torch.equal(narrow, expected)
    # Statistics gathered in train mode are copies as well.
    pair.eval()
    student.eval()
    with torch.no_grad():
        assert relative_difference(pair(images)[1], student(images)) < 1e-9


@pytest.mark.parametrize(("name", "ratio"), RUNS)
def test_every_layer_widens_but_the_last(name: str, ratio: float) -> None:
    student = randomized(name)
    pair = expand(student, sample=torch.randn(IMAGE), plan=plan_of(name, ratio))
    wide = dict(merged_teacher(pair).named_parameters())
    narrow = dict(student.named_parameters())
    assert wide.keys() == narrow.keys()
    same = {key for key in narrow if wide[key].shape == narrow[key].shape}
    assert same == CASES[name].same
    for key in narrow.keys() - same:
        assert wide[key].numel() >= ratio * narrow[key].numel()


@pytest.mark.parametrize("name", ["residual", "tokens"])
def test_exactness_does_not_depend_on_the_size_of_the_noise(name: str) -> None:
    student, images = randomized(name), torch.randn(IMAGE, dtype=torch.float64)
    for noise in (0.0, 1.0, 100.0):
        pair = expand(student, sample=images, branches=1, noise=noise)
        with torch.no_grad():
            narrow, wide = pair(images)
        assert relative_difference(wide, narrow) < 1e-9


def test_the_certificate_tells_how_well_the_two_agree() -> None:
    student = randomized("residual", torch.float32)
    pair = expand(student, sample=torch.randn(IMAGE), ratio=3, branches=6)
    certificate = pair.certificate
    assert certificate is not None
    assert certificate.difference < 1e-12
    assert certificate.agreement == 1
    assert certificate.images == 4
    assert pair.training


# The student given stays as it is, and comes back


def test_the_given_network_is_left_untouched() -> None:
    student = randomized("residual", torch.float32)
    student.get_submodule("layer1.bn2").eval()
    student.get_submodule("layer0.0").weight.requires_grad_(False)
    student.get_submodule("head").register_forward_hook(lambda *_: None)
    student(torch.randn(IMAGE)).sum().backward()

    def snapshot() -> dict[str, object]:
        modules, parameters = dict(student.named_modules()), dict(student.named_parameters())
        return {
            "state": {k: v.clone() for k, v in student.state_dict().items()},
            "modes": {k: m.training for k, m in modules.items()},
            "grads": {k: p.grad for k, p in parameters.items() if p.grad is not None},
            "trainable": {k: p.requires_grad for k, p in parameters.items()},
            "identities": [id(t) for t in (*modules.values(), *parameters.values())],
            "classes": [type(m) for m in modules.values()],
            "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
            "hooks": {
                k: (list(m._forward_pre_hooks), list(m._forward_hooks)) for k, m in modules.items()
            },
            "rng": torch.get_rng_state(),
            "python rng": random.getstate(),
        }

    sample = torch.randn(IMAGE)
    before, given = snapshot(), sample.clone()
    pair = expand(student, sample=sample, ratio=2, branches=6)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.zero_()
    after = snapshot()
    tensors = ("state", "grads")
    for key in tensors:
        torch.testing.assert_close(after.pop(key), before.pop(key), rtol=0, atol=0)
    assert torch.equal(after.pop("rng"), before.pop("rng"))
    assert after == before
    assert torch.equal(sample, given) and not sample.requires_grad


DRAWS: dict[str, Callable[[], float]] = {
    "python": lambda: random.random(),
    "numpy": lambda: float(np.random.random()),
    "torch": lambda: float(torch.rand(())),
}


class Noisy(nn.Linear):
    """Draws numbers whenever it runs."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(4, 4)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        noise = self.draw() - 0.5
        return super().forward(x * (1 + noise if self.training else 1))


@pytest.mark.parametrize("name", DRAWS)
def test_a_network_that_draws_numbers_leaves_the_generators_alone(name: str) -> None:
    student = nn.Sequential(nn.Linear(3, 4), Noisy(DRAWS[name]), nn.Linear(4, 2))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = DRAWS[name]()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    pair = expand(student, sample=torch.zeros(2, 3))
    assert pair.certificate is not None and pair.certificate.in_training is None
    assert DRAWS[name]() == first


def test_nothing_is_left_behind_when_expansion_fails() -> None:
    student = network(conv_bn(3, 4), nn.LocalResponseNorm(3), conv_bn(4, 4), head=Head(4))
    state = torch.get_rng_state()
    with pytest.raises(ExpansionError):
        expand(student, sample=torch.randn(IMAGE, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def assert_extracts(student: nn.Module, fresh: nn.Module, pair: Pair) -> None:
    """The student comes back bit for bit, and loads into a fresh network."""
    extracted = pair.extract()
    assert type(extracted) is type(student)
    state, expected = extracted.state_dict(), student.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
        assert state[key].dtype == tensor.dtype
    assert fresh.load_state_dict(state, strict=True)
    flags = {key: p.requires_grad for key, p in student.named_parameters()}
    assert {key: p.requires_grad for key, p in extracted.named_parameters()} == flags
    mine = {p.data_ptr() for p in (*pair.parameters(), *pair.buffers())}
    assert not mine & {p.data_ptr() for p in (*extracted.parameters(), *extracted.buffers())}


@pytest.mark.parametrize(("name", "ratio"), RUNS)
def test_the_student_comes_back_bit_for_bit(name: str, ratio: float) -> None:
    student, sample = randomized(name, torch.float32), torch.randn(IMAGE)
    for storage in get_args(Storage):
        if storage == "teacher" and ratio not in (2, 4):
            continue  # divided by another number than a power of two, and multiplied again
        plan = plan_of(name, ratio)
        pair = expand(student, sample=sample, branches=6, storage=storage, plan=plan)
        assert_extracts(student, CASES[name].build(), pair)


@pytest.mark.parametrize("branches", [1, 6])
@pytest.mark.parametrize("name", CASES)
def test_the_student_comes_back_at_ratio_1(name: str, branches: int) -> None:
    student = randomized(name, torch.float32)
    next(student.parameters()).requires_grad_(False)
    pair = expand(student, sample=torch.randn(IMAGE), ratio=1, branches=branches)
    assert_extracts(student, CASES[name].build(), pair)
    images = torch.randn(IMAGE)
    with torch.no_grad():
        narrow, wide = pair.eval()(images)
        assert torch.equal(narrow, student.eval()(images))
        assert torch.equal(wide, narrow)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_student_comes_back_in_its_own_type(dtype: torch.dtype) -> None:
    student = randomized("depthwise", dtype)
    pair = expand(student, sample=torch.randn(IMAGE), ratio=3, branches=6)
    assert_extracts(student, CASES["depthwise"].build().to(dtype), pair)
    assert {p.dtype for p in pair.parameters()} == {dtype}


@pytest.mark.parametrize("training", [False, True])
def test_the_pair_is_in_the_mode_of_the_student(training: bool) -> None:
    student = randomized("residual").train(training)
    pair = expand(student, sample=torch.randn(IMAGE), branches=6)
    for module in (pair, pair.extract()):
        assert {m.training for m in module.modules()} == {training}


def test_the_same_call_gives_the_same_pair() -> None:
    student, sample = randomized("residual", torch.float32), torch.randn(IMAGE)
    first = expand(student, sample=sample, branches=6)
    torch.manual_seed(1)
    second = expand(student, sample=torch.zeros_like(sample), branches=6)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


# Weights that are shared inside the student


class Shared(nn.Module):
    """One convolution under two names, or two that hold one weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.first, self.head = conv_bn(3, 6), nn.Conv2d(6, 6, 3, padding=1), Head(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1) if tied else self.first
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(self.stem(x))))))


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["module", "weight"])
def test_shared_weights_stay_shared(tied: bool, ratio: int, branches: int) -> None:
    student = Shared(tied).double()
    randomize(student, torch.Generator().manual_seed(1))
    images = torch.randn(IMAGE, dtype=torch.float64)
    pair = expand(student, sample=images, ratio=ratio, branches=branches)
    optimizer = torch.optim.SGD(pair.parameters(), 0.01)
    for _ in range(2):
        narrow, wide = pair(images)
        optimizer.zero_grad()
        (narrow.square().mean() + wide.square().mean()).backward()
        optimizer.step()
    extracted = pair.extract()
    assert sum(p.numel() for p in extracted.parameters()) == sum(
        p.numel() for p in student.parameters()
    )
    assert extracted.second.weight is extracted.first.weight
    assert torch.equal(pair.eval().student(images), extracted.eval()(images))
    teacher = merged_teacher(pair)
    assert teacher.second.weight is teacher.first.weight
    assert torch.equal(teacher(images), pair(images)[1])
    twin = copy.deepcopy(pair)
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in pair.parameters())


# Errors


def rejected(student: nn.Module, match: str, shape: tuple[int, ...] = IMAGE, **kwargs) -> None:
    with pytest.raises(ExpansionError, match=match) as error:
        expand(student, **({"sample": torch.randn(shape), "branches": 1} | kwargs))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("ratio", [1, 2])
def test_a_sample_of_another_shape_is_an_error(ratio: int) -> None:
    rejected(randomized("residual"), r"\[2, 4, 8, 8\]", (2, 4, 8, 8), ratio=ratio)
    rejected(randomized("flatten"), r"\[2, 3, 9, 9\]", (2, 3, 9, 9), ratio=ratio)


@pytest.mark.parametrize(
    "sample",
    [
        *(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 3, 8, 8)),
        *(torch.zeros(8), (2, 3, 8, 8)),
    ],
)
def test_a_sample_that_is_no_batch_is_an_error(sample: object) -> None:
    rejected(randomized("residual"), "sample", sample=sample)


@pytest.mark.parametrize("ratio", [0.5, 0, -2, float("nan"), float("inf")])
def test_a_ratio_below_1_is_an_error(ratio: float) -> None:
    rejected(randomized("residual"), "ratio must be 1 or more", ratio=ratio)


def test_layers_without_noise_have_to_exist() -> None:
    rejected(randomized("residual"), "has no layer 'nowhere'", without_noise="nowhere")


def test_layers_named_in_without_noise_get_none() -> None:
    student, images = randomized("residual"), torch.zeros(2, *IMAGE[1:])
    name = [n for n, module in student.named_modules() if isinstance(module, nn.Conv2d)][-1]
    plain, noisy = (
        expand(student, sample=images, branches=1, without_noise=names).teacher.get_submodule(name)
        for names in (name, [])
    )
    assert not torch.equal(plain.weight, noisy.weight)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), "much", None])
def test_negative_noise_is_an_error(noise: float) -> None:
    rejected(randomized("residual"), "noise", noise=noise)


@pytest.mark.parametrize("wrong", [{"exclude": 3}, {"exclude": [3]}, {"plan": {"ratio": 2}}])
def test_an_argument_of_another_type_is_an_error(wrong: dict[str, Any]) -> None:
    rejected(randomized("residual"), next(iter(wrong)), **wrong)
    with pytest.raises(ExpansionError, match="student must be a module, not str"):
        expand("resnet18", sample=torch.zeros(2, 3, 8, 8))


def test_a_single_pattern_may_be_excluded() -> None:
    student = randomized("residual")
    name = next(n for n, m in student.named_modules() if isinstance(m, nn.Conv2d))
    pairs = [
        expand(student, sample=torch.zeros(2, *IMAGE[1:]), branches=1, exclude=exclude)
        for exclude in (name, [name])
    ]
    one, other = (pair.plan for pair in pairs)
    assert one == other and f"{name}.bias" not in one.tensors


def test_an_unknown_storage_is_an_error() -> None:
    rejected(randomized("residual"), "storage", storage="wide")


@pytest.mark.parametrize("branches", [0, 99, ["5x5"]])
def test_unknown_branches_are_an_error(branches: object) -> None:
    with pytest.raises(GpdError):
        expand(randomized("residual"), sample=torch.randn(IMAGE), branches=branches)


class MatrixProduct(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.matrix)


class Returns(nn.Module):
    """Returns something besides logits."""

    def __init__(self, what: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layers, self.what = network(conv_bn(3, 4), head=Head(4)), what

    def forward(self, x: Tensor) -> object:
        return self.what(self.layers(x))


def test_an_unsupported_layer_is_named() -> None:
    standardized = network(conv_bn(3, 4), StdConv2d(4, 4, 3), head=Head(4))
    rejected(standardized, r"layer1 \(StdConv2d\).*standardizes its kernel")


def test_a_layer_that_is_not_known_is_named() -> None:
    unknown = network(conv_bn(3, 4), MatrixProduct(4, 6), conv_bn(6, 4), head=Head(4))
    rejected(unknown, r"layer1 \(MatrixProduct\)")


def test_norms_over_uneven_copies_are_named() -> None:
    rejected(CASES["convnext"].build(), r"norm \(LayerNorm\).*equally often", ratio=1.5)
    rejected(CASES["one group"].build(), r"layer1 \(GroupNorm\).*equally many", ratio=1.25)


def test_ratios_that_do_not_fit_heads_are_named() -> None:
    rejected(
        network(Patches(8), nn.TransformerEncoderLayer(8, 4, batch_first=True), head=Head(8)),
        r"self_attn \(MultiheadAttention\).*whole number of heads",
        ratio=1.125,
    )


class EfficientChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(1) * torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None, None]


@pytest.mark.parametrize("mixing", [nn.LocalResponseNorm(3), Flip()])
def test_what_mixes_channels_by_position_is_an_error(mixing: nn.Module) -> None:
    student = network(conv_bn(3, 8), mixing, nn.Conv2d(8, 4, 1), head=Head(4))
    rejected(student, rf"layer1 \({type(mixing).__name__}\) .* mixes or cuts channels")
    assert expand(student, sample=torch.randn(IMAGE), ratio=1, branches=1)


@pytest.mark.parametrize(
    ("layer", "after"),
    [
        (EfficientChannelAttention(), 8),
        (nn.PixelShuffle(2), 2),
        (nn.ConvTranspose2d(8, 6, 2, 2), 6),
        (nn.ConvTranspose2d(8, 8, 2, 2, groups=8), 8),
    ],
    ids=["channel attention", "pixel shuffle", "transposed", "depthwise transposed"],
)
@pytest.mark.parametrize("ratio", [2, 3])
def test_layers_that_need_a_way_of_their_own(layer: nn.Module, after: int, ratio: int) -> None:
    student = network(conv_bn(3, 8), layer, nn.Conv2d(after, 4, 1), head=Head(4)).double()
    randomize(student, torch.Generator().manual_seed(3))
    pair = expand(student, sample=torch.randn(IMAGE), ratio=ratio, branches=1)
    x = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    for training in (False, True):
        narrow, wide = pair.train(training)(x)
        assert relative_difference(wide, narrow) < 1e-9
    assert pair.teacher.get_submodule("head.fc").weight.shape[1] == 4 * ratio
    assert not pair.plan.kept_narrow


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize(
    "what",
    [lambda y: (y, y), lambda y: {"logits": y}, lambda y: y.argmax(1)],
    ids=["tuple", "dictionary", "classes"],
)
def test_a_network_that_does_not_return_logits_is_an_error(what, ratio: int) -> None:
    rejected(Returns(what), "logits", ratio=ratio)


def test_a_network_without_weights_or_of_mixed_types_is_an_error() -> None:
    rejected(nn.Flatten(), "no weights")
    rejected(network(conv_bn(3, 4).double(), head=Head(4)), "mixes the types")
    with torch.device("meta"):
        on_meta = network(conv_bn(3, 4), head=Head(4))
    rejected(on_meta, "meta device")


def wrong_plan(student: nn.Module) -> WidthPlan:
    """A plan in which one layer takes its inputs for other channels than they are."""
    plan = find_plan(student, torch.randn(IMAGE), 2)
    name = "layer1.conv2.weight"
    out, into, *rest = plan.tensors[name].axes
    assert into is not None
    rolled = IndexMap(into.narrow_size, into.index[2:] + into.index[:2])
    plan.tensors[name] = TensorPlan((out, rolled, *rest), 1)
    return plan


def test_an_expansion_that_is_not_exact_is_not_certified() -> None:
    student = randomized("residual")
    rejected(student, "differs from the student by", plan=wrong_plan(student))


@pytest.mark.parametrize("damage", [1e-6, float("nan")])
def test_the_certificate_fails_on_a_damaged_teacher(damage: float) -> None:
    sample = torch.randn(IMAGE)
    pair = expand(randomized("residual"), sample=sample, branches=6).eval()
    certify(pair, sample)
    with torch.no_grad():
        pair.teacher.get_submodule("layer1.bn2").bias[1] += damage
    with pytest.raises(ExpansionError, match="differs from the student by"):
        certify(pair, sample)
    assert not pair.training


def test_a_plan_of_another_network_is_an_error() -> None:
    plan = find_plan(randomized("residual"), torch.randn(IMAGE), 2)
    rejected(randomized("dense"), "plan", plan=plan)
    smaller = network(conv_bn(3, 6), Residual(6, 4, 2), Residual(4, 4, 1), head=Head(4))
    rejected(smaller, "plan", plan=plan)


def test_a_layer_that_runs_in_training_only_is_not_overlooked() -> None:
    student = Auxiliary().double()
    try:
        pair = expand(student, sample=torch.randn(IMAGE), branches=1).train()
    except ExpansionError:
        return
    narrow, wide = pair(torch.randn(IMAGE, dtype=torch.float64))
    assert relative_difference(wide, narrow) < 1e-9


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = conv_bn(3, 6), Head(6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x) + 0.3 * self.auxiliary(x) if self.training else self.head(x)


# Modes, and what cannot be expanded for another reason


def test_each_module_keeps_its_mode() -> None:
    student = randomized("residual").train()
    frozen = [name for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)][:2]
    for name in frozen:
        student.get_submodule(name).eval()
    expected = {name: m.training for name, m in student.named_modules()}
    pair = expand(student, sample=torch.randn(IMAGE), branches=6)
    for network in (pair.narrow, pair.extract()):
        assert {name: m.training for name, m in network.named_modules()} == expected
    teacher = {name: m.training for name, m in pair.teacher.named_modules()}
    assert {name: teacher[name] for name in expected} == expected


def test_a_network_without_anything_to_widen_is_refused() -> None:
    class OnlyClassifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    rejected(OnlyClassifier(), "Nothing in OnlyClassifier can be widened")
    expand(OnlyClassifier(), sample=torch.randn(IMAGE), ratio=1, branches=1)


def test_a_ratio_that_adds_no_channel_is_named() -> None:
    rejected(
        randomized("residual"), "ratio 1.01 adds less than one channel .*; raise the", ratio=1.01
    )
    sample = torch.randn(IMAGE)
    assert not expand(randomized("residual"), sample=sample, ratio=1, width_multiple=8).plan.tensors


def test_weights_that_are_not_numbers_are_named() -> None:
    student = randomized("residual")
    next(student.parameters()).data[0] = torch.nan
    rejected(student, "check its weights")


def test_a_layer_without_tensor_input_runs_in_eval_mode_too() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(1))

        def forward(self) -> Tensor:
            return self.value

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale, self.head = conv_bn(3, 6), Scale(), Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x) * self.scale())

    student = Scaled().double()
    randomize(student, torch.Generator().manual_seed(1))
    pair = expand(student, sample=torch.randn(IMAGE), branches=1)
    narrow, wide = pair.eval()(torch.randn(IMAGE, dtype=torch.float64))
    assert relative_difference(wide, narrow) < 1e-9
