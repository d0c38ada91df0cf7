import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpd_cli.branches import (
    EXTRA_BRANCHES,
    PAPER_BRANCHES,
    BranchBank,
    accepts_branches,
    branch_kernel,
    branch_names,
    frequency_filters,
    merge,
)
from gpd_cli.errors import GpdError

KERNEL_SIZES = [(3, 3), (5, 5), (3, 5), (4, 4)]
LAYERS = {"plain": (6, 8, 1), "grouped": (6, 8, 2), "depthwise": (6, 6, 6), "multiplier": (3, 6, 3)}
STRIDES = [  # stride, padding, dilation
    (1, 0, 1),
    (1, 1, 1),
    (2, 1, 1),
    (2, 2, 2),
    (1, 2, (1, 2)),
]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def random_bank(shape: tuple[int, ...], groups: int, names: tuple[str, ...]) -> BranchBank:
    """A bank in float64 with every parameter, gates included, at random."""
    bank = BranchBank(shape, groups, names, dtype=torch.float64)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def taps(x: Tensor, size: int, inner: int, dim: int, stride: int, padding: int, dilation: int):
    """What the centred ``inner`` taps of a kernel of ``size`` see of an axis."""
    x = F.pad(x, (0, 0, padding, padding) if dim == 2 else (padding, padding))
    outputs = (x.shape[dim] - dilation * (size - 1) - 1) // stride + 1
    start = (size - inner) // 2 * dilation
    return x.narrow(dim, start, (outputs - 1) * stride + dilation * (inner - 1) + 1)


def run_smaller(x, weight, kernel_size, groups, stride, padding, dilation):
    """A kernel with sides of 1, as a convolution of its own on a cropped input."""
    for dim in (2, 3):
        size, inner = kernel_size[dim - 2], weight.shape[dim]
        x = taps(x, size, inner, dim, stride, padding, dilation[dim - 2])
    return F.conv2d(x, weight, None, stride, 0, dilation, groups)


def run_average(x, kernel_size, stride, padding, dilation):
    if dilation == (1, 1):
        return F.avg_pool2d(
            F.pad(x, (padding,) * 4), kernel_size, stride, 0, count_include_pad=True
        )
    windows = F.unfold(x, kernel_size, dilation, padding, stride)
    kh, kw = kernel_size
    height = (x.shape[2] + 2 * padding - dilation[0] * (kh - 1) - 1) // stride + 1
    mean = windows.unflatten(1, (x.shape[1], kh * kw)).mean(2)
    return mean.unflatten(2, (height, -1))


def run_branch(name, tensors, x, kernel_size, groups, stride, padding, dilation):
    """One branch run as it is described, one layer after the other."""
    weight = tensors["weight"]
    last = (stride, padding, dilation)
    if name in ("1x1", "1xk", "kx1"):
        return run_smaller(x, weight, kernel_size, groups, *last)
    if name == "1x1_kxk":
        inner = F.conv2d(x, tensors["pointwise"], groups=groups)
        return F.conv2d(inner, weight, None, *last, groups)
    if name == "1x1_avg":
        return run_average(F.conv2d(x, weight, groups=groups), kernel_size, *last)
    if name == "frequency":
        inner = F.conv2d(x, weight, groups=groups)
        filters = frequency_filters(weight.shape[0], kernel_size, dtype=x.dtype)
        return F.conv2d(inner, filters[:, None], None, *last, weight.shape[0])
    assert name == "depthwise_separable"
    depthwise = tensors["depthwise"].flatten(0, 1)[:, None]
    inner = F.conv2d(x, depthwise, None, *last, x.shape[1])
    return F.conv2d(inner, weight, groups=groups)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", EXTRA_BRANCHES)
def test_kernel_convolves_like_the_branch_run_as_written(name: str, layer: str) -> None:
    torch.manual_seed(0)
    in_channels, out_channels, groups = LAYERS[layer]
    x = torch.randn(2, in_channels, 13, 12, dtype=torch.float64)
    for kernel_size, (stride, padding, dilation) in itertools.product(KERNEL_SIZES, STRIDES):
        dilation = pair(dilation)
        shape = (out_channels, in_channels // groups, *kernel_size)
        tensors = dict(random_bank(shape, groups, (name,)).weights[name].named_parameters())
        kernel = branch_kernel(name, tensors, kernel_size, groups)
        assert kernel.shape == shape
        merged = F.conv2d(x, kernel, None, stride, padding, dilation, groups)
        written = run_branch(name, tensors, x, kernel_size, groups, stride, padding, dilation)
        torch.testing.assert_close(merged, written, rtol=0, atol=1e-10)


def test_even_kernels_put_the_1x1_at_the_lower_middle() -> None:
    weight = torch.tensor([[[[7.0]]]])
    kernel = branch_kernel("1x1", {"weight": weight}, (4, 3))
    assert kernel[0, 0, 1, 1] == 7
    assert kernel.abs().sum() == 7


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_merge_adds_gate_times_branch(layer: str, kernel_size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    in_channels, out_channels, groups = LAYERS[layer]
    shape = (out_channels, in_channels // groups, *kernel_size)
    kernel = torch.randn(shape, dtype=torch.float64)
    every = [(name,) for name in EXTRA_BRANCHES] + [PAPER_BRANCHES[1:], EXTRA_BRANCHES[::-1]]
    for names in every:
        bank = random_bank(shape, groups, names)
        expected = kernel.clone()
        for name in names:
            tensors = dict(bank.weights[name].named_parameters())
            branch = branch_kernel(name, tensors, kernel_size, groups)
            for channel, gate in enumerate(bank.gates[name]):
                expected[channel] += gate * branch[channel]
        torch.testing.assert_close(bank(kernel), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_fresh_bank_leaves_the_kernel_to_the_last_bit(layer: str, dtype: torch.dtype) -> None:
    in_channels, out_channels, groups = LAYERS[layer]
    kernel = torch.randn(out_channels, in_channels // groups, 3, 3).to(dtype)
    bank = BranchBank(kernel.shape, groups, EXTRA_BRANCHES, dtype=dtype)
    assert torch.equal(bank(kernel), kernel)
    for gate in bank.gates.values():
        nn.init.ones_(gate)
    moved = (bank(kernel) - kernel).abs().flatten(1).amax(1)
    assert (moved > 0).all()  # it was the gates that kept it


def test_autocast_rounds_branches_but_not_the_main_kernel() -> None:
    kernel = torch.randn(8, 6, 3, 3)
    bank = BranchBank(kernel.shape, 1, EXTRA_BRANCHES)
    with torch.autocast("cpu", torch.bfloat16):
        merged = bank(kernel)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, kernel)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", EXTRA_BRANCHES)
def test_memory_layout_is_the_main_kernels(name: str, layer: str) -> None:
    in_channels, out_channels, groups = LAYERS[layer]
    kernel = torch.randn(out_channels, in_channels // groups, 3, 5)
    bank = BranchBank(kernel.shape, groups, [name])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        stored = kernel.contiguous(memory_format=memory_format)
        merged = bank.to(memory_format=memory_format)(stored)
        assert merged.stride() == stored.stride()


def gradients(bank: BranchBank, kernel: Tensor) -> dict[str, Tensor]:
    bank.zero_grad()
    bank(kernel).square().sum().backward()
    return {name: parameter.grad for name, parameter in bank.named_parameters()}


@pytest.mark.parametrize("layer", LAYERS)
def test_gates_learn_first_then_the_branches(layer: str) -> None:
    torch.manual_seed(0)
    in_channels, out_channels, groups = LAYERS[layer]
    kernel = torch.randn(out_channels, in_channels // groups, 3, 3)
    bank = BranchBank(kernel.shape, groups, EXTRA_BRANCHES)
    for name, gradient in gradients(bank, kernel).items():
        assert gradient.any() == name.startswith("gates."), name
        assert gradient.all() == name.startswith("gates."), name
    for gate in bank.gates.values():
        nn.init.ones_(gate)
    for name, gradient in gradients(bank, kernel).items():
        # No output channel is left out, whatever its frequency filter.
        assert gradient.flatten(1).any(1).all() if gradient.ndim > 1 else gradient.all(), name


@pytest.mark.parametrize("layer", [(2, 3, 1), (4, 2, 2), (2, 2, 2)])
def test_merge_gradients_are_right(layer: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    in_channels, out_channels, groups = layer
    bank = random_bank((out_channels, in_channels // groups, 3, 4), groups, EXTRA_BRANCHES)
    kernel = torch.randn(out_channels, in_channels // groups, 3, 4, dtype=torch.float64)
    keys = [(name, key) for name in bank.names for key, _ in bank.weights[name].named_parameters()]
    inputs = [kernel.requires_grad_(), *(bank.gates[name] for name in bank.names)]
    inputs += [getattr(bank.weights[name], key) for name, key in keys]

    def run(kernel: Tensor, *rest: Tensor) -> Tensor:
        gates = dict(zip(bank.names, rest, strict=False))
        parameters: dict[str, dict[str, Tensor]] = {name: {} for name in bank.names}
        for (name, key), tensor in zip(keys, rest[len(gates) :], strict=True):
            parameters[name][key] = tensor
        return merge(kernel, gates, parameters, bank.filters, groups)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_frequency_filters_are_none_of_them_dead() -> None:
    filters = frequency_filters(12, (3, 4), dtype=torch.float64)
    assert (filters.abs().flatten(1).amax(1) > 0.1).all()
    torch.testing.assert_close(filters[:6].std(2), torch.zeros(6, 3, dtype=torch.float64))
    torch.testing.assert_close(filters[6:].std(1), torch.zeros(6, 4, dtype=torch.float64))
    vertical = filters[:3, :, 0]  # one full cycle: an orthogonal basis
    gram = vertical @ vertical.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()))


def test_bank_starts_like_convolutions_of_its_own() -> None:
    torch.manual_seed(0)
    bank = BranchBank((64, 32, 3, 3), 2, EXTRA_BRANCHES)
    x = torch.randn(4, 64, 16, 16)
    own = nn.Conv2d(64, 64, 3, groups=2, bias=False)(x).std().item()
    for name in EXTRA_BRANCHES:
        tensors = dict(bank.weights[name].named_parameters())
        output = F.conv2d(x, branch_kernel(name, tensors, (3, 3), 2), groups=2)
        assert 0.25 < output.std().item() / own < 1.5, name
    first = bank.weights["1x1_kxk"].pointwise
    assert torch.equal(F.conv2d(x, first, groups=2), x)


def test_a_generator_decides_the_start() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return BranchBank((4, 4, 3, 3), 1, EXTRA_BRANCHES, generator=generator).state_dict()

    before = torch.get_rng_state()
    one, same, other = state(1), state(1), state(2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_bank_as_a_parametrization() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    plain = copy.deepcopy(conv)
    parametrize.register_parametrization(
        conv, "weight", BranchBank(conv.weight.shape, 1, branch_names(6))
    )
    x = torch.randn(2, 6, 7, 7)
    assert torch.equal(conv(x), plain(x))
    prefix = "parametrizations.weight.0"
    assert {key for key in conv.state_dict() if prefix in key} == {
        *(f"{prefix}.gates.{name}" for name in branch_names(6)),
        *(f"{prefix}.weights.{name}.weight" for name in branch_names(6)),
        f"{prefix}.weights.1x1_kxk.pointwise",
        f"{prefix}.weights.depthwise_separable.depthwise",
    }
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    twin = copy.deepcopy(conv).double()
    assert twin(x.double()).dtype == torch.float64
    torch.testing.assert_close(twin(x.double()).float(), conv(x), rtol=1e-4, atol=1e-3)
    twin.load_state_dict(conv.double().state_dict())
    assert torch.equal(twin.weight, conv.weight)
    merged = conv(x.double())
    parametrize.remove_parametrizations(conv, "weight")
    assert torch.equal(conv(x.double()), merged)


def test_without_names_the_bank_is_nothing() -> None:
    kernel = torch.randn(4, 4, 3, 3)
    bank = BranchBank(kernel.shape, 1, ())
    assert torch.equal(bank(kernel), kernel)
    assert not bank.state_dict()


def test_branch_names() -> None:
    assert branch_names(1) == ()
    assert branch_names(2) == ("1x1",)
    assert branch_names(6) == (
        "1x1",
        "1x1_kxk",
        "1x1_avg",
        "frequency",
        "depthwise_separable",
    )
    assert branch_names(["frequency", "kxk", "1x1"]) == ("frequency", "1x1")
    assert branch_names("1x1_avg") == ("1x1_avg",)
    assert branch_names([]) == ()


@pytest.mark.parametrize("spec", [0, 7, -1, True, ["1x1", "3x3"], "conv", ["1x1", "1x1"]])
def test_wrong_branches_are_named(spec: object) -> None:
    with pytest.raises(GpdError) as error:
        branch_names(spec)  # type: ignore[arg-type]
    message = str(error.value)
    if spec == ["1x1", "1x1"]:
        assert "'1x1'" in message
    else:
        assert all(name in message for name in ("kxk", *EXTRA_BRANCHES))
    with pytest.raises(GpdError):
        BranchBank((4, 4, 3, 3), 1, ["3x3"])


def test_which_layers_get_branches() -> None:
    class Standardized(nn.Conv2d):
        pass

    accepted = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (3, 5), stride=2, dilation=2),
        nn.Conv2d(4, 4, 7, groups=4),
        Standardized(4, 4, 4),
    ]
    refused = [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, (1, 5)),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Linear(4, 4),
    ]
    assert all(map(accepts_branches, accepted))
    assert not any(map(accepts_branches, refused))
