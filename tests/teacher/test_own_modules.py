"""Networks with code as users write it, beyond what the libraries' networks contain."""

import math
from collections import defaultdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import assert_exact
from gpd_cli import ExpansionError, expand
from gpd_cli.teacher.compare import relative_difference
from gpd_cli.widening.layers import is_leaf


def images(side: int = 16) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0)).double()


def around(module: nn.Module, width: int = 8) -> nn.Sequential:
    """A network with a module between convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        module,
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


class Tokens(nn.Module):
    """A network of one block of tokens, whose residual path is multiplied by a learned factor."""

    def __init__(self, block: nn.Module, width: int = 16, factor: float = 1.0) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, width, 4, 4), block
        self.factor, self.head = nn.Parameter(torch.tensor(factor)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        return self.head((x + self.factor * self.block(x)).mean(1))


class Rotary(nn.Module):
    """Attention whose rotary positions are complex numbers."""

    def __init__(self, width: int = 16, heads: int = 2, tokens: int = 16) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        pairs = width // heads // 2
        angles = torch.outer(torch.arange(tokens), 0.1 ** (torch.arange(pairs) / pairs))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (self.turned(q) @ self.turned(k).mT * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, -1))


class WidthScaled(nn.Module):
    """Attention that divides by the root of the whole width, which must not grow with it."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.heads, self.width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(self.width)).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, self.width))


class Tied(nn.Module):
    """Attention whose output projection has the weight of the values, in another layout."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.o.weight = self.v.weight

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = (
            layer(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attention = (q @ k.mT * (width // self.num_heads) ** -0.5).softmax(-1)
        return self.o((attention @ v).transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Attention without a softmax, whose sums are kept from zero by a small constant."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.n_head = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = (layer(x).view(b, n, self.n_head, -1) for layer in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        products = torch.einsum("bnhd,bnhe->bhde", k, v)
        scale = 1 / (torch.einsum("bnhd,bhd->bnh", q, k.sum(1)) + 1e-5)
        return self.o(torch.einsum("bnhd,bhde,bnh->bnhe", q, products, scale).reshape(b, n, width))


class ScaledConv(nn.Conv2d):
    """A convolution with a factor for each output channel."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.alpha = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.alpha


class LowRank(nn.Linear):
    """A linear layer with an update of low rank."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__(width, width)
        self.down = nn.Parameter(torch.randn(rank, width))
        self.up = nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Warm(nn.Conv2d):
    """A convolution with a single factor of its own."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


class Gate(nn.Module):
    """Two branches, weighted by a gate with two outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.small = nn.Conv2d(width, width, 3, padding=1)
        self.large = nn.Conv2d(width, width, 5, padding=2)
        self.gate = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x.mean((2, 3))).softmax(1)[:, :, None, None, None]
        return weights[:, 0] * self.small(x) + weights[:, 1] * self.large(x)


class Recurrent(nn.Module):
    """A recurrence by hand, whose state starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.now = nn.Conv2d(width, width, 3, padding=1)
        self.before = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(3):
            state = torch.tanh(self.now(x) + self.before(state))
        return state


class ChannelAttention(nn.Module):
    """Efficient channel attention that takes the channels as a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()


class InPlace(nn.Module):
    """Changes of the images in place, in every mode or in training alone."""

    def __init__(self, in_training_only: bool) -> None:
        super().__init__()
        self.in_training_only = in_training_only

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_training_only:
            return x.sub_(0.5).div_(0.25)
        if self.training:
            x += 0.1 * torch.randn_like(x)
        return x


class Normalized(nn.Module):
    """A function that holds a buffer, which does not widen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        mean = self.mean
        self.normalize = lambda x: (x - mean) / 0.25
        self.body = around(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.normalize(x))


class TiedInVain(nn.Module):
    """A layer that does not run has the weight of one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.rests = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.rests.weight = self.runs.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.runs(x)


class Concatenated(nn.Module):
    """Two outputs side by side, beside code that mixes channels by position."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mixed = nn.Conv2d(width, 6, 1)
        self.one, self.two = nn.Conv2d(6, width // 2, 1), nn.Conv2d(6, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(self.mixed(x), dim=1).real
        return torch.cat([self.one(x), self.two(x)], 1)


class Bound(nn.Module):
    """A residual path that is scaled by functions which refer to the network."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.alpha, self.head = nn.Parameter(torch.tensor(0.5)), nn.Linear(8, 5)
        self.scale = lambda x: self.alpha * x
        self.more = [lambda x, by=2.0: by * self.alpha * x, torch.relu]

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        for function in self.more:
            x = function(x)
        return self.head((x + self.scale(self.two(x).relu())).mean((2, 3)))


class Indirect(nn.Module):
    """Factors from functions that refer to the network by other functions, defaults and lists."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.alpha, self.head = nn.Parameter(torch.tensor(0.5)), nn.Linear(8, 5)
        modules, seen, method = [self], {}, self.times_alpha
        self.seen = seen
        shared = defaultdict(list, {"network": self})
        shared["itself"] = shared  # as functions that call each other by a table of them do

        def scale(x: Tensor, times: int = 1) -> Tensor:
            return scale(x, times - 1) if times else self.alpha * x

        self.functions = [
            lambda x: scale(x),
            lambda x, network=self: network.alpha * x,
            partial(lambda network, x: network.alpha * x, self),
            lambda x: modules[0].alpha * x,
            lambda x: method(x),
            lambda x: shared["itself"]["network"].alpha * x + len(shared["nothing"]),
        ]
        self.two.register_forward_hook(lambda module, args, output: seen.update(output=output))

    def times_alpha(self, x: Tensor) -> Tensor:
        return self.alpha * x

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        for function in self.functions:
            x = function(x)
        return self.head((x + self.two(x) * self.seen["output"].relu()).mean((2, 3)))


class Grouped(nn.Module):
    """A depthwise convolution by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.width = nn.Parameter(torch.randn(width, 1, 3, 3)), width

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=self.width)


class LastHalfFirst(nn.Module):
    """Code that counts a position from the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        half = self.width // 2
        return torch.cat([x.narrow(1, -half, half), x.narrow(1, 0, half)], 1)


class OwnNorm(nn.Module):
    """A batch norm by torch's function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)


EXACT = {
    "rotary": lambda: Tokens(Rotary()),
    "linear attention": lambda: Tokens(LinearAttention()),
    "scaled convolution": lambda: around(ScaledConv(8, 8, 3)),
    "low rank": lambda: Tokens(LowRank(16)),
    "one factor": lambda: around(Warm(8, 8, 3)),
    "gate": lambda: around(Gate(8)),
    "recurrent": lambda: around(Recurrent(8)),
    "circular": lambda: around(ChannelAttention()),
    "functions": Bound,
    "functions of functions": Indirect,
    "depthwise by hand": lambda: around(Grouped(8)),
    "position from the end": lambda: around(LastHalfFirst(8)),
    "batch norm by hand": lambda: around(OwnNorm(8)),
    "buffer in a function": Normalized,
}
NARROW = {"gate": ["2"]}  # its gate takes channels by their position


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("ratio", [2, 3])
def test_they_expand_exactly(name: str, ratio: int) -> None:
    pair = assert_exact(EXACT[name](), images(), ratio=ratio)
    assert list(pair.plan.kept_narrow) == NARROW.get(name, [])


def test_complex_tensors_stay_complex_in_single_precision() -> None:
    student = Tokens(Rotary())
    sample = images().float()
    pair = expand(student, sample=sample, ratio=2, branches=1).eval()
    extracted = pair.extract().eval()
    assert torch.equal(extracted.block.turns, student.block.turns)  # of the same type, too
    with torch.no_grad():
        assert torch.equal(pair.student(sample), student.eval()(sample))


@pytest.mark.parametrize("where", ["residual path", "head"])
def test_what_the_student_multiplies_by_zero_is_exact_as_well(where: str) -> None:
    student = Tokens(WidthScaled(), factor=0.0 if where == "residual path" else 1.0).double()
    if where == "head":
        nn.init.zeros_(student.head.weight)
    pair = expand(student, sample=images(32), ratio=2, branches=1).eval()
    with torch.no_grad():
        pair.teacher.factor.fill_(1.0)  # both networks share it
        pair.teacher.head.weight.normal_()
        blocks = []
        for network in (pair.teacher, pair.narrow):
            network.block.register_forward_hook(lambda m, args, output: blocks.append(output))
        pair(images(32))
        wide, narrow = blocks
        assert (
            relative_difference(wide[..., :16], narrow) < 1e-9
            or relative_difference(wide[..., ::2], narrow) < 1e-9
        )


@pytest.mark.parametrize("is_zero", [True, False])
def test_one_weight_that_would_have_to_widen_in_two_ways_is_refused(is_zero: bool) -> None:
    student = Tokens(Tied())
    if is_zero:
        nn.init.zeros_(student.head.weight)
    with pytest.raises(ExpansionError, match=r"block\.v\.weight and block\.o\.weight are one weig"):
        expand(student, sample=images().float(), ratio=2)


@pytest.mark.parametrize("in_training_only", [False, True])
def test_images_that_are_changed_in_place_are_told(in_training_only: bool) -> None:
    student = nn.Sequential(InPlace(in_training_only), *around(nn.Identity()))
    with pytest.raises(ExpansionError, match=r"changes its images in place.*x = x - mean"):
        expand(student, sample=images().float(), ratio=2)


@pytest.mark.parametrize("network", [Bound, Indirect])
def test_functions_refer_to_the_network_that_they_are_copied_with(
    network: type[Bound | Indirect],
) -> None:
    student, sample = network(), images().float()
    pair = expand(student, sample=sample, ratio=2, branches=1)
    narrow, wide = pair(sample)
    (narrow.sum() + wide.sum()).backward()
    assert student.alpha.grad is None and pair.teacher.alpha.grad is not None
    extracted = pair.extract()
    expected = extracted(sample)
    with torch.no_grad():
        student.alpha.fill_(3.0)
    assert torch.equal(extracted(sample), expected)


def test_a_tied_layer_that_does_not_run_is_no_obstacle() -> None:
    student, x = around(TiedInVain()).double(), images()
    pair = expand(student, sample=x, ratio=2, branches=1).eval()
    with torch.no_grad():
        assert relative_difference(pair(x)[1], student.eval()(x)) < 1e-9


def test_outputs_that_are_concatenated_widen_though_what_is_inside_stays_narrow() -> None:
    student = around(Concatenated())
    plan = expand(student, sample=images().float(), ratio=2, branches=1).plan
    assert list(plan.kept_narrow) == ["2"]
    assert {"2.one.weight", "2.two.weight", "3.weight"} <= plan.tensors.keys()


def test_a_function_that_holds_a_weight_itself_is_refused() -> None:
    student = Bound()
    alpha = student.alpha
    student.more = [torch.relu, lambda x: alpha * x]
    with pytest.raises(
        ExpansionError, match=r"keeps alpha in another attribute .*\(more\).*self\.NAME"
    ):
        expand(student, sample=images().float(), ratio=2)


def test_hooks_may_change_the_output_of_a_block() -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    block.register_forward_hook(lambda module, args, output: args[0] + 1.37 * output)
    assert_exact(around(block), images(), ratio=2)


@pytest.mark.parametrize("kind", ["list", "dictionary", "partial"])
def test_a_weight_that_is_kept_a_second_time_is_refused(kind: str) -> None:
    student = Bound()
    held = {
        "list": [student.alpha],
        "dictionary": {"alpha": student.alpha},
        "partial": partial(torch.mul, student.alpha),
    }
    student.held = held[kind]
    with pytest.raises(ExpansionError, match=r"keeps alpha in another attribute as well \(held\)"):
        expand(student, sample=images().float(), ratio=2)


def test_layers_with_tensors_by_channel_are_followed_and_others_are_planned_as_a_whole() -> None:
    assert not is_leaf(ScaledConv(4, 4, 3)) and not is_leaf(LowRank(4))
    assert is_leaf(Warm(4, 4, 3)) and is_leaf(nn.Conv2d(4, 4, 3)) and is_leaf(nn.LayerNorm(4))


def test_groups_of_a_transposed_convolution_may_stay_narrow() -> None:
    layer = nn.ConvTranspose2d(8, 8, 2, 2, groups=4)
    pair = assert_exact(around(layer), images(), ratio=2, exclude="0")
    assert "2.weight" not in pair.plan.tensors
