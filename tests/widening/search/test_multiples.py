"""Activations that are multiples of copies: norms and sums over channels, taken in code."""

import json
from collections.abc import Callable
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import assert_exact
from gpd_cli import Pair, WidthPlan, expand
from gpd_cli.branches import AUTHORS_BRANCHES
from gpd_cli.widening.describe import describe_plan
from gpd_cli.widening.match import match_multiple
from gpd_cli.widening.plan import IndexMap, spread
from gpd_cli.widening.plan_check import check_plan_values
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.tensors import Storage

WIDTH = 6


def conv() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


class Code(nn.Module):
    """A function of the channels, as code of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Added(nn.Module):
    """A layer's output is added to channels of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.project, self.out = (conv() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query = F.normalize(self.query(x), dim=1)
        return self.out(self.project(query * query.mean((2, 3), keepdim=True)) + query)


def network(*inside: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.Sequential(*inside), nn.BatchNorm2d(WIDTH)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3)),
    )


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def times_sum(x: Tensor) -> Tensor:
    return x * x.sum(1, keepdim=True)


def exact(student: nn.Module, **options: object) -> Pair:
    return assert_exact(student, torch.randn(4, 3, 8, 8, dtype=torch.float64), **options)


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize(("function", "power"), [(normalized, -0.5), (times_sum, 1)])
def test_a_layer_takes_up_the_multiple_of_its_input(
    function: Callable[[Tensor], Tensor], power: float, ratio: int
) -> None:
    pair = exact(network(Code(function), conv()), ratio=ratio)
    assert not pair.plan.kept_narrow
    weight = pair.plan.tensors["1.1.weight"]
    assert weight.extra_divisor == pytest.approx(ratio**power, rel=1e-12)
    assert [None if axis is None else len(axis) for axis in weight.axes[:2]] == [ratio * WIDTH] * 2


def test_a_layer_gives_the_multiple_of_what_its_output_is_added_to() -> None:
    pair = exact(network(Added()))
    assert not pair.plan.kept_narrow
    assert pair.plan.trials == 3  # two of them in the search for plain copies
    shares = {name.removeprefix("1.0."): plan.extra_divisor for name, plan in pair.plan}
    assert shares["query.weight"] == shares["query.bias"] == shares["out.bias"] == 1
    assert shares["project.weight"] == pytest.approx(2**0.5 / 2)
    assert shares["project.bias"] == pytest.approx(2**0.5)
    assert shares["out.weight"] == pytest.approx(2**-0.5)


@pytest.mark.parametrize("storage", get_args(Storage))
def test_every_storage_keeps_multiples(storage: Storage) -> None:
    exact(network(Added()), storage=storage, branches=4)


@pytest.mark.parametrize("storage", get_args(Storage))
def test_the_authors_block_keeps_multiples(storage: Storage) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    student = network(Added()).double()
    pair = expand(student, sample=x, storage=storage, branches=AUTHORS_BRANCHES, branch_init="gpd")
    narrow, wide = pair(x)
    torch.testing.assert_close(wide, narrow, rtol=1e-9, atol=1e-9)
    (narrow.sum() + wide.square().sum()).backward()
    gradient = pair.teacher.get_submodule("1.0.project").parametrizations.weight.original.grad
    assert gradient is not None
    assert bool(gradient.any())


class SpatialAttention(nn.Module):
    """Weights each pixel by a convolution of its energy, a tensor of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weigh(x.pow(2).sum(1, keepdim=True)))


@pytest.mark.parametrize("init", ["zero", "orepa"])
@pytest.mark.parametrize("storage", get_args(Storage))
def test_a_kernel_without_wide_axes_keeps_the_students_scale(storage: Storage, init: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    student = network(SpatialAttention()).double()
    pair = expand(student, sample=x, storage=storage, branches=["1x1", "linear"], branch_init=init)
    assert pair.plan.tensors["1.0.weigh.weight"].extra_divisor == 2
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            if ".gates." in name and not parameter.any():
                parameter.fill_(1e-300)  # the kernels of silent branches are not merged
        for training in (False, True):
            expected = student.train(training)(x)
            torch.testing.assert_close(pair.train(training)(x)[0], expected, rtol=1e-9, atol=1e-9)
        for name, tensor in pair.extract().named_parameters():
            torch.testing.assert_close(tensor, student.get_parameter(name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("storage", ["mixed", "student"])
def test_the_student_comes_back_bit_for_bit(storage: Storage) -> None:
    student = network(Added()).float()
    pair = expand(student, sample=torch.randn(2, 3, 8, 8), storage=storage, branches=1)
    for name, tensor in pair.extract().named_parameters():
        assert torch.equal(tensor, student.get_parameter(name))


def test_a_norm_of_a_multiple_stays_narrow_with_the_reason() -> None:
    pair = exact(
        network(conv(), nn.Sequential(conv(), Code(normalized), nn.BatchNorm2d(WIDTH)), conv())
    )
    assert list(pair.plan.kept_narrow) == ["1.1"]
    assert "its input is the student's input times 0.707" in pair.plan.kept_narrow["1.1"]


@pytest.mark.parametrize(
    ("activation", "narrow"), [(nn.ReLU(), []), (nn.GELU(), ["1"]), (nn.Hardswish(), ["1"])]
)
def test_multiples_end_at_functions_that_do_not_keep_them(
    activation: nn.Module, narrow: list[str]
) -> None:
    pair = exact(network(conv(), Code(normalized), activation, conv()))
    assert list(pair.plan.kept_narrow) == narrow


def test_a_plan_with_multiples_is_written_and_described() -> None:
    student = network(Added())
    plan = find_plan(student, torch.randn(2, 3, 8, 8), 2)
    data = json.loads(json.dumps(plan.to_dict()))
    check_plan_values(data, {"1.0.query.weight": (12, 12, 1, 1)})
    assert WidthPlan.from_dict(data) == plan
    described = describe_plan(plan, student)["modules"]["1.0.project"]["tensors"]
    assert described["weight"]["axis 1"] == "side by side x2, weight divided by 1.41421"
    assert described["bias"] == "6 -> 12, side by side x2, divided by 1.41421"


def test_multiples_are_roots_of_simple_fractions() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    wide = x[:, spread(5, 15).tensor]
    for factor in (1.0, 3**0.5, 1 / 3, 1 / 3**0.5):
        found = match_multiple(x, factor * wide)
        assert found is not None
        assert found[0] == (None, spread(5, 15), None)
        assert found[1] == pytest.approx(factor, rel=1e-14)
    assert match_multiple(x, 1.2345 * wide) is None
    assert match_multiple(x, 0 * wide) is None
    assert match_multiple(x, torch.randn_like(wide)) is None
    uneven = IndexMap(5, (0, 0, 1, 2, 3, 4))
    assert match_multiple(x, x[:, uneven.tensor]) == ((None, uneven, None), 1.0)


def test_swiftformer_keeps_nothing_narrow() -> None:
    student = timm.create_model("swiftformer_xs", num_classes=5)
    plan = find_plan(student, torch.zeros(2, 3, 64, 64), 2, is_certified=True)
    assert not plan.kept_narrow
    assert plan.trials <= 20


def test_edgenext_keeps_the_stage_narrow_that_cuts_its_channels_into_thirds() -> None:
    student = timm.create_model("edgenext_xx_small", num_classes=5)
    plan = find_plan(student, torch.zeros(2, 3, 64, 64), 2, is_certified=True)
    assert list(plan.kept_narrow) == ["stages.2"]
    # Copies in unequal numbers would fit, and the layer norms of the stage do not allow them.
    cut = "it cuts its channels into 59 x 59 x 58, and their copies take 60 x 60 x 56"
    assert plan.kept_narrow["stages.2"] == f"in stages.2.blocks.5, {cut}"
    assert plan.trials <= 35  # a third of them after a confirming run has shown a guess to be wrong
