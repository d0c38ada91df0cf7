"""Calls of a container's code, and what is solved for once the code has run."""

import pytest
import torch
from torch import Tensor, nn

from gpd_cli.widening.mismatch import Mismatch
from gpd_cli.widening.numbers.arithmetic import Attribute
from gpd_cli.widening.numbers.calls import Call
from gpd_cli.widening.numbers.solve import Equation
from gpd_cli.widening.observe.events import Event
from gpd_cli.widening.plan import TensorPlan, spread
from gpd_cli.widening.rules import Rule
from gpd_cli.widening.search.follow import Following, Frame
from gpd_cli.widening.search.wide_network import WideNetwork

MAP = spread(6, 12)


class Code(nn.Module):
    """A container with attributes and a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sizes = 2, [2, 3]
        self.token = nn.Parameter(torch.randn(1, 6, dtype=torch.float64))


@pytest.fixture
def wide() -> WideNetwork:
    return WideNetwork(nn.Sequential(Code()), 2)


def test_equations_are_solved_for_attributes_and_their_entries(wide: WideNetwork) -> None:
    heads, size = Attribute("0", "heads"), Attribute("0", "sizes", 1)
    frame = Frame("0", equations=[Equation(heads, 4, 2), Equation(size, 6, 3)])
    following = Following(wide)
    assert following.settle(frame, Rule())
    assert wide.plan.attributes == {"0": {"heads": 4, "sizes": [2, 6]}}
    code = wide.network.get_submodule("0")
    assert (code.heads, code.sizes) == (4, [2, 6])
    assert not following.settle(frame, Rule())  # nothing is left to change


def test_attributes_that_a_rule_keeps_do_not_change(wide: WideNetwork) -> None:
    frame = Frame("0", equations=[Equation(Attribute("0", "heads"), 4, 2)])
    with pytest.raises(Mismatch, match="heads = 2 would have to be 4"):
        Following(wide).settle(frame, Rule(keep=("heads",)))


def test_a_tensor_widens_in_one_way(wide: WideNetwork) -> None:
    following = Following(wide)
    assert following.settle(Frame("0", maps={"0.token": {1: MAP}}), Rule())
    assert wide.plan.tensors == {"0.token": TensorPlan((None, MAP))}
    assert not following.settle(Frame("0", maps={"0.token": {1: MAP}}), Rule())
    with pytest.raises(Mismatch, match=r"0\.token would have to widen in two ways"):
        following.settle(Frame("0", maps={"0.token": {1: spread(6, 9)}}), Rule())


def test_a_constant_follows_the_activation_that_it_is_added_to(wide: WideNetwork) -> None:
    token, x = wide.source("0.token"), torch.randn(3, 6, dtype=torch.float64)
    frame = Frame("0", events=[Event(torch.add, [x, token], (3, 6))])
    following = Following(wide)
    following.read("0.token", token)
    with torch.no_grad():
        call = following.prepare(frame, Call(torch.add, (x[:, MAP.tensor], token)))
    assert torch.equal(call.args[1], token[:, MAP.tensor])
    assert frame.maps == {"0.token": {1: MAP}}


def test_sources_of_a_constant_are_noted_in_one_order() -> None:
    code = nn.Module()
    code.q, code.k, code.v = (nn.Parameter(torch.randn(6, dtype=torch.float64)) for _ in range(3))
    frame = Frame("0")
    following = Following(WideNetwork(nn.Sequential(code), 2))
    following.note_sources(frame, code.q + code.k + code.v, ["0.q", "0.k", "0.v"], 0, MAP)
    assert list(frame.maps.items()) == [(f"0.{name}", {0: MAP}) for name in "kqv"]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [Event(torch.sub, [torch.zeros(3, 6), torch.zeros(1, 6)], (3, 6))],
        [Event(torch.add, [torch.zeros(3, 6)] * 3, (3, 6))],
    ],
)
def test_other_calls_than_the_student_s_are_another_path(
    wide: WideNetwork, events: list[Event]
) -> None:
    token: Tensor = wide.source("0.token")
    following = Following(wide)
    following.read("0.token", token)
    with pytest.raises(Mismatch, match="takes another path"):
        following.prepare(Frame("0", events=events), Call(torch.add, (torch.zeros(3, 12), token)))
