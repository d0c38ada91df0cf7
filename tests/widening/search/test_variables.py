"""What the wide network becomes under the option of a variable."""

import pytest
import torch
from torch import Tensor, nn

from gpd_cli.widening.layout import Scale, Segment
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.plan import TensorPlan, spread
from gpd_cli.widening.search.trials import Trials
from gpd_cli.widening.search.variables import (
    SIDE_BY_SIDE,
    STAYS_NARROW,
    LayoutVariable,
    NumberVariable,
    TensorVariable,
)
from gpd_cli.widening.search.widening_run import WideningRun


class Code(nn.Module):
    """A container with an attribute and a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.token = nn.Parameter(torch.randn(1, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.token


@pytest.fixture
def run() -> WideningRun:
    return WideningRun(nn.Sequential(Code()), Recording(), Scale(2), (), False, Trials())


def test_a_number_is_set_unless_it_stays(run: WideningRun) -> None:
    heads = NumberVariable(("0.heads",), {STAYS_NARROW: None, "count": 4}, STAYS_NARROW)
    heads.apply(run, STAYS_NARROW)
    assert run.wide.plan.attributes == {}
    heads.apply(run, "count")
    assert run.wide.plan.attributes == {"0": {"heads": 4}}
    assert run.wide.network.get_submodule("0").heads == 4


def test_a_tensor_widens_unless_it_stays(run: WideningRun) -> None:
    plan = TensorPlan((None, spread(6, 12)))
    token = TensorVariable(("0.token",), {STAYS_NARROW: None, "axis 1": plan}, STAYS_NARROW)
    token.apply(run, STAYS_NARROW)
    assert run.wide.plan.tensors == {}
    token.apply(run, "axis 1")
    assert run.wide.plan.tensors == {"0.token": plan}
    assert run.wide.tensor("0.token").shape == (1, 12)


def test_a_layout_is_settled_unless_it_is_the_usual_one(run: WideningRun) -> None:
    narrow = (Segment(6, grows=False),)
    options = {SIDE_BY_SIDE: (Segment(6),), STAYS_NARROW: narrow}
    layout = LayoutVariable(("0.a", "0.b"), options, SIDE_BY_SIDE)
    layout.apply(run, SIDE_BY_SIDE)
    assert run.state.layouts == {}
    layout.apply(run, STAYS_NARROW)
    assert run.state.layouts == {"0.a": narrow, "0.b": narrow}
