import copy
import itertools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gpd_cli
from gpd_cli.branches import (
    AUTHORS_BRANCHES,
    BRANCH_SETS,
    EXTRA_BRANCHES,
    MAIN_GATE,
    PAPER_BRANCHES,
    BranchBank,
    accepted_branches,
    branch_kernel,
    branch_names,
    branched_layers,
    frequency_filters,
    identity_channels,
    merge,
)
from gpd_cli.errors import ExpansionError, GpdError
from gpd_cli.models.cifar_resnet import cifar_resnet8

CONV_BRANCHES = tuple(name for name in EXTRA_BRANCHES if name != "linear")

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


def tensors_of(bank: BranchBank, name: str) -> dict[str, Tensor]:
    if name == "identity":
        return {"channels": bank.channels}
    return dict(bank.weights[name].named_parameters())


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


def run_branch(name, tensors, x, kernel_size, groups, stride, padding, dilation, out_channels):
    """One branch run as it is described, one layer after the other."""
    last = (stride, padding, dilation)
    in_channels, kh, kw = x.shape[1], *kernel_size
    fan = in_channels // groups
    if name == "identity":
        ones = torch.ones(in_channels, 1, 1, 1, dtype=x.dtype)
        kept = run_smaller(x, ones, kernel_size, in_channels, *last)
        group = torch.arange(out_channels) // (out_channels // groups)
        return kept[:, group * fan + torch.arange(out_channels) % fan]
    weight = tensors["weight"]
    if name == "kxk_2":
        return F.conv2d(x, weight, None, *last, groups)
    if name in ("1x1", "1xk", "kx1"):
        return run_smaller(x, weight, kernel_size, groups, *last)
    if name == "1x1_kxk":
        each = F.conv2d(x, tensors["deviation"], groups=groups)
        copies = each.unflatten(1, (groups, -1, fan)) + x.unflatten(1, (groups, 1, fan))
        return F.conv2d(copies.flatten(1, 3), weight, None, *last, groups)
    if name == "1x1_avg":
        return run_average(F.conv2d(x, weight, groups=groups), kernel_size, *last)
    if name == "frequency":
        inner = F.conv2d(x, weight, groups=groups)
        filters = frequency_filters(weight.shape[0], kernel_size, dtype=x.dtype)
        return F.conv2d(inner, filters[:, None], None, *last, weight.shape[0])
    if name == "expandnet":
        inner = F.conv2d(x, tensors["first"], groups=groups)
        inner = F.conv2d(inner, tensors["middle"], None, *last, groups)
        return F.conv2d(inner, weight, groups=groups)
    if name == "do_conv":  # the feature composition: D on each channel's window, then W on all
        windows = F.unfold(x, kernel_size, dilation, padding, stride)
        windows = windows.unflatten(1, (in_channels, kh * kw))
        depthwise = tensors["deviation"].flatten(2) + torch.eye(kh * kw, dtype=x.dtype)
        inner = torch.einsum("ims,bisl->biml", depthwise, windows)
        inner = inner.unflatten(1, (groups, fan))
        outputs = torch.einsum(
            "goim,bgiml->bgol", weight.reshape(groups, -1, fan, kh * kw), inner
        ).flatten(1, 2)
        height = (x.shape[2] + 2 * padding - dilation[0] * (kh - 1) - 1) // stride + 1
        return outputs.unflatten(2, (height, -1))
    assert name == "depthwise_separable"
    depthwise = tensors["depthwise"].flatten(0, 1)[:, None]
    inner = F.conv2d(x, depthwise, None, *last, x.shape[1])
    return F.conv2d(inner, weight, groups=groups)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CONV_BRANCHES)
def test_kernel_convolves_like_the_branch_run_as_written(name: str, layer: str) -> None:
    torch.manual_seed(0)
    in_channels, out_channels, groups = LAYERS[layer]
    x = torch.randn(2, in_channels, 13, 12, dtype=torch.float64)
    for kernel_size, (stride, padding, dilation) in itertools.product(KERNEL_SIZES, STRIDES):
        dilation = pair(dilation)
        shape = (out_channels, in_channels // groups, *kernel_size)
        tensors = tensors_of(random_bank(shape, groups, (name,)), name)
        kernel = branch_kernel(name, tensors, shape, groups).to(x)
        assert kernel.shape == shape
        merged = F.conv2d(x, kernel, None, stride, padding, dilation, groups)
        last = (stride, padding, dilation, out_channels)
        written = run_branch(name, tensors, x, kernel_size, groups, *last)
        size = written.abs().max().item()
        torch.testing.assert_close(merged, written, rtol=0, atol=1e-12 * max(1, size))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("widths", [(6, 8), (8, 6), (6, 6)])
def test_linear_branch_is_two_layers_in_a_row(widths: tuple[int, int], groups: int) -> None:
    torch.manual_seed(0)
    in_channels, out_channels = widths
    fan, out = in_channels // groups, out_channels // groups
    side = min(fan, out)
    for shape in [(out_channels, fan, 1, 1), (out_channels, fan)][: 3 - groups]:
        tensors = tensors_of(random_bank(shape, groups, ("linear",)), "linear")
        kernel = branch_kernel("linear", tensors, shape, groups)
        assert kernel.shape == shape
        x = torch.randn(5, in_channels, dtype=torch.float64)
        square = tensors["deviation"].view(groups, side, side) + torch.eye(side)
        factors = [tensors["weight"].view(groups, out, fan), square]
        inner = x.view(5, groups, fan, 1)
        for factor in factors if out < fan else reversed(factors):
            inner = factor @ inner
        merged = F.conv2d(x[:, :, None, None], kernel.view(out_channels, fan, 1, 1), groups=groups)
        torch.testing.assert_close(merged.flatten(1), inner.flatten(1), rtol=0, atol=1e-12)


def test_even_kernels_put_the_1x1_at_the_lower_middle() -> None:
    weight = torch.tensor([[[[7.0]]]])
    kernel = branch_kernel("1x1", {"weight": weight}, (1, 1, 4, 3))
    assert kernel[0, 0, 1, 1] == 7
    assert kernel.abs().sum() == 7


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
def test_merge_adds_gate_times_branch(layer: str, kernel_size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    in_channels, out_channels, groups = LAYERS[layer]
    shape = (out_channels, in_channels // groups, *kernel_size)
    kernel = torch.randn(shape, dtype=torch.float64)
    every = [(name,) for name in CONV_BRANCHES] + [PAPER_BRANCHES[1:], CONV_BRANCHES[::-1]]
    for names in every:
        bank = random_bank(shape, groups, names)
        expected = kernel.clone()
        for name in names:
            branch = branch_kernel(name, tensors_of(bank, name), shape, groups).double()
            for channel, gate in enumerate(bank.gates[name]):
                expected[channel] += gate * branch[channel]
        torch.testing.assert_close(bank(kernel), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_fresh_bank_leaves_the_kernel_to_the_last_bit(layer: str, dtype: torch.dtype) -> None:
    in_channels, out_channels, groups = LAYERS[layer]
    kernel = torch.randn(out_channels, in_channels // groups, 3, 3).to(dtype)
    bank = BranchBank(kernel.shape, groups, CONV_BRANCHES, dtype=dtype)
    assert torch.equal(bank(kernel), kernel)
    for gate in bank.gates.values():
        nn.init.ones_(gate)
    moved = (bank(kernel) - kernel).abs().flatten(1).amax(1)
    assert (moved > 0).all()  # it was the gates that kept it


def test_autocast_rounds_branches_but_not_the_main_kernel() -> None:
    kernel = torch.randn(8, 6, 3, 3)
    bank = BranchBank(kernel.shape, 1, CONV_BRANCHES)
    with torch.autocast("cpu", torch.bfloat16):
        merged = bank(kernel)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, kernel)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CONV_BRANCHES)
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
    bank = BranchBank(kernel.shape, groups, CONV_BRANCHES)
    for name, gradient in gradients(bank, kernel).items():
        assert gradient.any() == name.startswith("gates."), name
        assert gradient.all() == name.startswith("gates."), name
    for gate in bank.gates.values():
        nn.init.ones_(gate)
    for name, gradient in gradients(bank, kernel).items():
        # No output channel is left out, whatever its frequency filter.
        assert gradient.flatten(1).any(1).all() if gradient.ndim > 1 else gradient.all(), name


MERGED = {
    "plain": ((3, 2, 3, 4), 1, CONV_BRANCHES),
    "grouped": ((2, 2, 3, 4), 2, CONV_BRANCHES),
    "depthwise": ((2, 1, 3, 4), 2, CONV_BRANCHES),
    "main_gate": ((3, 2, 3, 3), 1, branch_names("gpd", "gpd")),
    "linear": ((4, 3), 1, ("linear",)),
}


def merge_gradients(
    bank: BranchBank, kernel: Tensor, upstream: Tensor, groups: int, in_bfloat16: bool = False
) -> dict[str, Tensor]:
    """Gradients of the merge, by parameter, for a gradient of the merged kernel."""
    bank.zero_grad()
    kernel = kernel.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
        bank(kernel).backward(upstream)
    return {"kernel": kernel.grad} | {n: p.grad for n, p in bank.named_parameters()}


@pytest.mark.parametrize("layer", MERGED)
def test_merge_gradients_are_right(layer: str) -> None:
    torch.manual_seed(0)
    shape, groups, names = MERGED[layer]
    bank = random_bank(shape, groups, names)
    kernel = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gates = dict(bank.gates.items())
    parameters = {name: tensors_of(bank, name) for name in bank.names if name != MAIN_GATE}
    trained = [
        (name, key) for name in bank.weights for key, _ in bank.weights[name].named_parameters()
    ]
    inputs = [kernel, *gates.values(), *(parameters[name][key] for name, key in trained)]

    def run(kernel: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(gates, rest, strict=False))
        tensors = {name: dict(one) for name, one in parameters.items()}
        for (name, key), tensor in zip(trained, rest[len(gates) :], strict=True):
            tensors[name][key] = tensor
        return merge(kernel, given, tensors, bank.filters, groups)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("layer", ["plain", "grouped", "depthwise", "main_gate"])
def test_merge_gradients_do_not_depend_on_the_memory_format(layer: str) -> None:
    torch.manual_seed(0)
    shape, groups, names = MERGED[layer]
    bank = random_bank(shape, groups, names)
    kernel, upstream = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    expected = merge_gradients(bank, kernel, upstream, groups)
    for formats in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        pair = (t.to(memory_format=f) for t, f in zip((kernel, upstream), formats, strict=True))
        for name, gradient in merge_gradients(bank, *pair, groups).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("layer", MERGED)
def test_merge_gradients_in_bfloat16_are_those_in_float32_but_for_rounding(layer: str) -> None:
    torch.manual_seed(0)
    shape, groups, names = MERGED[layer]
    bank = random_bank(shape, groups, names).float()
    kernel, upstream = (torch.randn(shape) for _ in range(2))
    expected = merge_gradients(bank, kernel, upstream, groups)
    rounded = merge_gradients(bank, kernel, upstream, groups, in_bfloat16=True)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, name


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
    bank = BranchBank((64, 32, 3, 3), 2, CONV_BRANCHES)
    x = torch.randn(4, 64, 16, 16)
    own = nn.Conv2d(64, 64, 3, groups=2, bias=False)(x).std().item()
    for name in bank.weights:
        if name != "identity":
            kernel = branch_kernel(name, tensors_of(bank, name), (64, 32, 3, 3), 2)
            output = F.conv2d(x, kernel, groups=2)
            assert 0.25 < output.std().item() / own < 1.5, name


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("name", ["1x1_kxk", "do_conv", "linear"])
def test_identity_halves_are_stored_as_nothing(name: str, groups: int) -> None:
    # What weight decay pulls to zero is the distance from the identity, not the branch.
    shape = (16, 16 // groups, *((1, 1) if name == "linear" else (3, 3)))
    bank = BranchBank(shape, groups, [name], dtype=torch.float64)
    tensors = tensors_of(bank, name)
    assert not tensors["deviation"].any()
    kernel = branch_kernel(name, tensors, shape, groups)
    weight = tensors["weight"].view(16, -1, *shape[1:]).sum(1)  # over copies of the identity
    torch.testing.assert_close(kernel, weight, rtol=0, atol=1e-15)


def test_orepa_starts_with_its_gates_and_weights() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(64, 32, 3, 3, dtype=torch.float64)
    names = branch_names("orepa")
    bank = BranchBank(kernel.shape, 1, names, init="orepa", dtype=torch.float64)
    gates = dict(zip(names, (1.0, 0.5, 0.25, 0.0, 0.5), strict=True))
    for name, gate in gates.items():
        assert (bank.gates[name] == gate).all(), name
        weight = bank.weights[name].weight
        fan_in = weight[0].numel()
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name
    stored = bank.absorb(kernel)
    assert (stored - kernel).abs().max() > 0.1
    torch.testing.assert_close(bank(stored), kernel, rtol=0, atol=1e-14)


def test_the_authors_block_starts_as_in_their_code() -> None:
    torch.manual_seed(0)
    names = branch_names(6, "gpd")
    assert names == AUTHORS_BRANCHES
    bank = BranchBank((64, 32, 3, 3), 1, names, init="gpd", dtype=torch.float64)
    gates = dict(zip(AUTHORS_BRANCHES, (0.25, 0.25, 0.0, 0.5, 0.05, 0.5), strict=True))
    for name, gate in gates.items():
        assert (bank.gates[name] == gate).all(), name
    for name, weights in bank.weights.items():
        weight = weights.weight
        expected = (2 / weight[0].numel()) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
    kernel = torch.randn(64, 32, 3, 3, dtype=torch.float64)
    rest = bank(torch.zeros_like(kernel))
    torch.testing.assert_close(bank(kernel) - rest, kernel / 4, rtol=0, atol=1e-15)
    # As many inner channels as inputs, also in depthwise layers, where OREPA has twice as many.
    depthwise = BranchBank((8, 1, 3, 3), 8, names, init="gpd")
    assert depthwise.weights["1x1_kxk"].weight.shape == (8, 1, 3, 3)
    # Their frequencies grow from channel to channel, and every sixth filter is zero.
    dead = bank.filters[names.index("frequency") - 1].abs().flatten(1).amax(1) < 1e-9
    assert dead.tolist() == [c % 6 == 2 for c in range(32)] * 2


@pytest.mark.parametrize("layer", LAYERS)
def test_the_authors_block_for_fine_tuning_leaves_the_kernel_to_the_last_bit(layer: str) -> None:
    in_channels, out_channels, groups = LAYERS[layer]
    kernel = torch.randn(out_channels, in_channels // groups, 3, 3)
    bank = BranchBank(kernel.shape, groups, branch_names("gpd"))
    assert bank.is_silent()
    assert torch.equal(bank(kernel), kernel)
    nn.init.constant_(bank.gates[MAIN_GATE], 0.5)
    assert not bank.is_silent()


@pytest.mark.parametrize(
    ("spec", "init", "named"),
    [
        ("paper", "gpd", "main_gate"),
        (["1x1_avg"], "gpd", "main_gate"),
        (["main_gate", "1xk"], "gpd", "1xk"),
        (["gpd", "acnet"], None, "1xk"),
        ("gpd", "orepa", "zero"),
    ],
)
def test_blocks_and_starts_that_do_not_go_together(spec, init, named: str) -> None:
    with pytest.raises(GpdError, match=named) as error:
        branch_names(spec, init)
    assert "\n" not in str(error.value)


def test_identity_follows_the_copies() -> None:
    # Copies side by side, handed on from copies end to end; groups; fewer inputs than outputs.
    assert identity_channels([0, 0, 1, 1], [0, 1, 0, 1], 2).tolist() == [0, 2, 1, 3]
    grouped = identity_channels([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1], 2)
    assert grouped.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert identity_channels([0, 0, 0, 1], [0, 1], 2).tolist() == [0, 0, 0, 1]


def test_a_generator_decides_the_start() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return BranchBank((4, 4, 3, 3), 1, CONV_BRANCHES, generator=generator).state_dict()

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
        f"{prefix}.weights.1x1_kxk.deviation",
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
    assert branch_names(["acnet", "repvgg", "1x1"]) == ("1xk", "kx1", "1x1", "identity")
    assert all(branch_names(name) for name in BRANCH_SETS)
    assert branch_names("paper") == branch_names("orepa") == branch_names(6)


@pytest.mark.parametrize(
    "spec", [0, 7, -1, True, None, 2.5, ["1x1", "3x3"], "conv", ["1x1", "1x1"]]
)
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

    def accepts(layer: nn.Module) -> set[str]:
        return set(accepted_branches(layer, EXTRA_BRANCHES))

    every = set(CONV_BRANCHES)
    assert accepts(nn.Conv2d(4, 4, 3)) == every
    assert accepts(nn.Conv2d(4, 4, (3, 5), stride=2, dilation=2)) == every
    assert accepts(nn.Conv2d(4, 4, 7, groups=4)) == every
    assert accepts(Standardized(4, 4, 4)) == every
    assert accepts(nn.Conv2d(4, 8, 3)) == every - {"identity"}
    for layer in (nn.Linear(4, 8), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1, groups=2)):
        assert accepts(layer) == {"linear"}
    refused = [
        nn.Conv2d(4, 4, 1, groups=4),
        nn.Conv2d(4, 4, 2),
        nn.Conv2d(4, 4, (1, 5)),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Embedding(4, 4),
    ]
    assert not any(map(accepts, refused))
    for layer in (nn.Linear(4, 4), nn.Conv2d(4, 4, 1)):  # the paper's six leave them alone
        assert accepted_branches(layer, branch_names(6)) == ()


class TinyConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(16, 12, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        )


def tiny_transformer() -> nn.Module:
    return VisionTransformer(
        img_size=12, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=5
    )


NETWORKS = {"conv": TinyConvNet, "transformer": tiny_transformer}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("init", ["zero", "orepa", "gpd"])
@pytest.mark.parametrize("name", [*EXTRA_BRANCHES, *BRANCH_SETS])
def test_expansion_with_each_branch_is_exact(name: str, init: str, network: str) -> None:
    if init != "zero" and (name == "gpd") != (init == "gpd"):
        pytest.skip("no such start")
    torch.manual_seed(0)
    student = NETWORKS[network]()
    x, target = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
    pair = gpd_cli.expand(student, sample=x, branches=[name], branch_init=init)
    assert pair.certificate.difference < 1e-9
    extracted = pair.extract().state_dict()
    for key, tensor in student.state_dict().items():
        if init == "zero":
            assert torch.equal(extracted[key], tensor), key
        elif init == "orepa":
            torch.testing.assert_close(extracted[key], tensor, rtol=0, atol=2e-6)
    banks = {n: m for n, m in pair.named_modules() if isinstance(m, BranchBank)}
    suits = any(accepted_branches(module, branch_names(name)) for module in student.modules())
    assert bool(banks) == suits
    optimizer = torch.optim.SGD(pair.parameters(), 0.05)
    pair.train()
    for _ in range(2):
        optimizer.zero_grad()
        sum(F.cross_entropy(logits, target) for logits in pair(x)).backward()
        optimizer.step()
    for key, parameter in pair.named_parameters():
        assert parameter.grad.any() or ".branches." not in key, key
    pair.eval()
    with torch.no_grad():
        assert torch.equal(pair.extract().eval()(x), pair(x)[0])


@pytest.mark.parametrize("init", ["zero", "orepa"])
@pytest.mark.parametrize("width", [0.25, 0.6, 2])
def test_the_product_of_another_width_is_exact_and_learns(width: float, init: str) -> None:
    torch.manual_seed(0)
    student, x = TinyConvNet(), torch.randn(4, 3, 12, 12)
    options = {"branches": ["1x1_kxk"], "branch_init": init, "branch_width": width}
    pair = gpd_cli.expand(student, sample=x, **options)
    assert pair.certificate.difference < 1e-9
    bank = pair.teacher.get_submodule("3").parametrizations.weight[-1].branches
    inner = max(1, round(16 * width))
    assert bank.weights["1x1_kxk"].first.shape == (inner, 16, 1, 1)
    assert bank.weights["1x1_kxk"].weight.shape == (16, inner, 3, 3)
    for gate in bank.gates.values():
        nn.init.normal_(gate)
    pair.train()(x)[1].square().sum().backward()
    assert all(parameter.grad.any() for parameter in bank.parameters())
    pair.eval()
    with torch.no_grad():
        assert torch.equal(pair.extract().eval()(x), pair(x)[0])


@pytest.mark.parametrize("width", [0, -1, float("inf"), float("nan"), "wide"])
def test_widths_that_are_none_are_refused(width: object) -> None:
    with pytest.raises(ExpansionError, match="branch_width must be above 0"):
        gpd_cli.expand(ThreeConvs(), sample=torch.zeros(2, 3, 9, 9), branch_width=width)


@pytest.mark.parametrize(("branches", "init"), [(6, "gpd"), ("gpd", "gpd"), ("gpd", "zero")])
def test_the_authors_block_has_the_papers_width(branches: int | str, init: str) -> None:
    options = {"branches": branches, "branch_init": init, "branch_width": 0.5}
    with pytest.raises(ExpansionError, match="must be 1"):
        gpd_cli.expand(ThreeConvs(), sample=torch.zeros(2, 3, 9, 9), **options)


class ThreeConvs(nn.Sequential):
    """A strided stem, plain and depthwise 3 x 3, and a 5 x 5."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)),
            nn.Conv2d(8, 8, 5),
        )


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("all",), {"0", "1.0", "1.1", "2"}),
        (("3x3_stride1",), {"1.0", "1.1"}),
        (("1.*",), {"1.0", "1.1"}),
        (("1",), {"1.0", "1.1"}),
        (("1.0", "2"), {"1.0", "2"}),
        (("3x3_stride1", "2"), {"1.0", "1.1", "2"}),
    ],
)
def test_a_choice_of_layers_gets_the_branches(layers: tuple[str, ...], expected: set[str]) -> None:
    network = ThreeConvs()
    found = branched_layers(network, branch_names(3), layers)
    assert found.keys() == expected
    assert {*found.values()} == {branch_names(3)}
    assert branched_layers(network, (), layers) == {}


def test_layers_that_cannot_be_chosen_are_named() -> None:
    for network, entry in ((ThreeConvs(), "conv*"), (tiny_transformer(), "blocks.*")):
        with pytest.raises(GpdError, match=f"'{re.escape(entry)}'.*3x3_stride1"):
            branched_layers(network, branch_names(6), [entry])
    with pytest.raises(ExpansionError, match="branch_layers must be a pattern"):
        gpd_cli.expand(ThreeConvs(), sample=torch.zeros(2, 3, 9, 9), branch_layers=3)


def test_the_papers_layers_are_13_of_resnet18s_and_9_of_mobilenet_v1s() -> None:
    for name, count in (("resnet18", 13), ("mobilenetv1_100", 9)):
        network = timm.create_model(name)
        layers = branched_layers(network, branch_names(6), ["3x3_stride1"])
        assert len(layers) == count
        assert not {"conv1", "conv_stem"} & layers.keys()


def test_a_stem_of_stride_1_is_none_of_the_papers_layers() -> None:
    layers = branched_layers(cifar_resnet8(), branch_names(6), ["3x3_stride1"])
    # Each of three blocks has two 3 x 3 convolutions, and two of them begin with a strided one.
    assert layers.keys() == {
        "layer1.0.conv1",
        *(f"layer{stage}.0.conv2" for stage in (1, 2, 3)),
    }


def test_averaging_of_weights_leaves_constants_alone() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(64, 64, 3, 3)
    bank = BranchBank(kernel.shape, 1, CONV_BRANCHES, init="orepa")
    nn.init.ones_(bank.gates["identity"])
    averaged = AveragedModel(bank, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(bank)
    torch.testing.assert_close(averaged(kernel), bank(kernel))


def test_the_students_identity_is_the_identity() -> None:
    torch.manual_seed(0)
    student = TinyConvNet()
    pair = gpd_cli.expand(student, sample=torch.randn(2, 3, 12, 12), ratio=3, branches="identity")
    for name, parameter in pair.named_parameters():
        if name.endswith("gates.identity"):
            nn.init.ones_(parameter)
    x = torch.randn(2, 8, 6, 6)
    extracted = pair.extract()
    for index in (3, 4):
        layer = student[index]
        handed_on = x[:, :, :: layer.stride[0], :: layer.stride[1]]
        torch.testing.assert_close(extracted[index](x), layer(x) + handed_on)
    assert torch.equal(extracted[6].weight, student[6].weight)  # not square
