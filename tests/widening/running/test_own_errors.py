"""Errors of this package's own code are never taken for those of a network that cannot widen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.errors import ExpansionError
from gpd_cli.teacher.expansion import expand
from gpd_cli.widening.running.own_errors import original_errors, own_errors
from gpd_cli.widening.search.find import find_plan

SAMPLE = torch.zeros(2, 3, 8, 8)


class Inner(nn.Module):
    """Code that reads numbers, a parameter and a buffer, and calls a linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.linear = 6, nn.Conv2d(6, 6, 1)
        self.gain, self.weight = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.ones(6, 6))
        self.register_buffer("shift", torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * (2 * self.gain) + self.shift
        x = F.linear(x.transpose(1, 3), self.weight).transpose(1, 3)
        return x.reshape(len(x), self.width, *x.shape[2:])


def network() -> nn.Sequential:
    inside = nn.Sequential(Inner(), nn.BatchNorm2d(6))
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3), inside, pool, nn.Flatten(), nn.Linear(6, 4))


class Broken:
    """A function of this package with an error."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise ZeroDivisionError("an error of gpd")


@pytest.mark.parametrize(
    "function",
    [
        "observe.record._Recorder._copy",
        "observe.record.remember",
        "observe.record.splits_of",
        "observe.record.last_layers",
        "observe.record.runs_again",
        "observe.constants.Constants.add",
        "running.randomize.refresh",
        "search.find.calibrate",
        "search.wide_network.expand_tensor",
        "search.wide_network.WideNetwork.forget",
        "search.wide_network.WideNetwork.is_tensor",
        "search.wide_network.WideNetwork.read",
        "search.state.State.copy",
        "search.follow.Following.prepare",
        "search.follow.Following.read",
        "search.follow.Following.settle",
        "search.widen_layers.plan_layer",
        "search.widen_layers.linear_tensors",
        "search.widen_layers.first_tensor",
        "search.widen.remember",
        "search.containers.counts_in",
    ],
)
def test_an_error_of_gpd_is_raised_as_it_is(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"gpd_cli.widening.{function}", Broken())
    with pytest.raises(ZeroDivisionError, match="an error of gpd"):
        expand(network(), sample=SAMPLE, branches=1)


class Thirds(nn.Module):
    """Code whose pieces are of unequal sizes, so that layouts are looked for by runs of it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([piece.relu() for piece in x.chunk(3, 1)], 1)


@pytest.mark.parametrize("function", ["_resized", "channel_axis", "tensors_in"])
def test_an_error_of_gpd_in_a_run_on_stand_ins_is_raised(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = nn.Sequential(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7), Thirds())
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(nn.Conv2d(3, 6, 3), inside, pool, nn.Flatten(), nn.Linear(7, 4))
    monkeypatch.setattr(f"gpd_cli.widening.search.cut_layouts.{function}", Broken())
    with pytest.raises(ZeroDivisionError, match="an error of gpd"):
        find_plan(student, SAMPLE, 2)


class Forward(torch.autograd.Function):
    """A function without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("no backward pass")


class ThirdsForward(Thirds):
    """Pieces of unequal sizes, through which no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(Forward.apply(x))
        return result


def test_an_error_in_a_backward_pass_of_the_network_leaves_its_layers_narrow() -> None:
    inside = nn.Sequential(nn.Conv2d(6, 7, 1), nn.BatchNorm2d(7), ThirdsForward())
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(nn.Conv2d(3, 6, 3), inside, pool, nn.Flatten(), nn.Linear(7, 4))
    assert find_plan(student, SAMPLE, 2).kept_narrow.keys() == {"1"}


class NoMode(nn.Conv2d):
    """A layer that cannot change its mode."""

    def train(self, mode: bool = True) -> NoMode:
        raise ArithmeticError("no mode")


def test_an_error_in_a_network_s_train_is_named() -> None:
    student = nn.Sequential(NoMode(3, 6, 3), nn.Flatten(), nn.Linear(216, 4))
    with pytest.raises(
        ExpansionError, match=r"train\(\) of Sequential, .*ArithmeticError: no mode"
    ):
        find_plan(student, SAMPLE, 2)


class OneWidth(nn.Module):
    """Code that runs in the student only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 6:
            raise ArithmeticError("only 6 channels")
        return x


def test_an_error_of_the_network_is_a_reason_to_refuse() -> None:
    inside = nn.Sequential(OneWidth(), nn.BatchNorm2d(6))
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(nn.Conv2d(3, 6, 3), inside, pool, nn.Flatten(), nn.Linear(6, 4))
    with pytest.raises(ExpansionError, match=r"does not run \(ArithmeticError: only 6 channels\)"):
        find_plan(student, SAMPLE, 2)
    with pytest.raises(
        ExpansionError, match=r"1\.0 \(OneWidth\): ArithmeticError: only 6 channels"
    ):
        find_plan(student[1:], SAMPLE, 2)


class PlainKernel(nn.Module):
    """Code with a tensor that is no buffer, and so keeps its type."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.randn(6, 6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel)


class Strict(nn.Module):
    """Code that takes no subclass of numbers."""

    times = 2

    def forward(self, x: Tensor) -> Tensor:
        if type(self.times) is not int:
            raise ArithmeticError("no int")
        return x * self.times


@pytest.mark.parametrize("inside", [PlainKernel, Strict])
def test_a_network_that_does_not_run_as_we_run_it_is_told_so(inside: type[nn.Module]) -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(nn.Conv2d(3, 6, 3), inside(), pool, nn.Flatten(), nn.Linear(6, 4))
    told = rf"Sequential runs on a sample.*1 \({inside.__name__}\).*register_buffer"
    with pytest.raises(ExpansionError, match=told):
        find_plan(student, SAMPLE, 2)


def test_an_error_of_ours_is_not_its_own_cause() -> None:
    with pytest.raises(ArithmeticError, match="ours") as found, original_errors(), own_errors():
        raise ArithmeticError("ours")
    error: BaseException | None = found.value
    causes = []
    while error is not None:
        assert error not in causes
        causes.append(error)
        error = error.__cause__ or error.__context__
