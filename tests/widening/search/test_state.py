"""States of a run, and the network that returns to them."""

from torch import nn

from gpd_cli.widening.layers import LayerPlan
from gpd_cli.widening.layout import Segment
from gpd_cli.widening.plan import TensorPlan, WidthPlan, spread
from gpd_cli.widening.search.state import State
from gpd_cli.widening.search.wide_network import WideNetwork

WIDE = LayerPlan({"weight": TensorPlan((spread(2, 4), None))}, {"out_features": 4})


def test_a_copy_of_a_state_does_not_change_with_it() -> None:
    plan = WidthPlan(2, {"a": TensorPlan((None,))}, {"a": {"dim": 4}}, {"b": "a reason"})
    state = State(plan, {"a": 1})
    before, same = state.copy(), state.copy()
    assert state.count_call("a") == 1
    assert state.count_call("b") == 0
    state.inputs["a"] = ((None,), 1.0)
    state.layouts["a"] = (Segment(4),)
    state.output_factors["a"] = 2.0
    state.gives_multiples.add("a")
    state.settled.add("a")
    state.plan.tensors["b"] = TensorPlan((None, None))
    state.plan.attributes["a"]["heads"] = 2
    state.plan.kept_narrow["c"] = "another reason"
    assert before == same
    assert before.calls == {"a": 1}
    assert before.plan == WidthPlan(
        2, {"a": TensorPlan((None,))}, {"a": {"dim": 4}}, {"b": "a reason"}
    )


def test_a_network_returns_to_an_earlier_plan() -> None:
    network = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    wide = WideNetwork(network, 2)
    wide.apply("0", WIDE)
    earlier = State(wide.plan).copy()
    wide.apply("1", WIDE)
    wide.restore(earlier.copy().plan)
    assert wide.plan == earlier.plan
    assert [tuple(wide.tensor(f"{k}.weight").shape) for k in range(2)] == [(4, 3), (2, 3)]
    assert [wide.network.get_submodule(f"{k}").out_features for k in range(2)] == [4, 2]
    assert wide.tensor("1.weight") is wide.source("1.weight")
