"""Layers to keep narrow inside a container."""

import torch

from gpd_cli.widening.layout import Segment
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.search.containers import inner_layers, stream_layers

RECORDING = Recording(
    out_channels={"a.x.conv": 4, "a.x.last": 6, "a.y.last": 6, "a.z": 6, "ab.z": 6, "b": 6},
    ends={"a": {"a.z"}, "a.x": {"a.x.last"}, "a.y": {"a.y.last", "a.y.norm"}},
    outputs={"a": [[torch.zeros(2, 6, 4, 4)]]},
    sums=[{"b", "a.z"}, {"a.x.last", "b"}, {"ab.z", "a.x.conv"}],
)
NARROW = (Segment(6, grows=False),)


def test_layers_stay_narrow_whose_outputs_stay_inside() -> None:
    assert inner_layers(RECORDING, "a") == {
        "a.x.conv": (Segment(4, grows=False),),
        "a.x.last": NARROW,
        "a.y.last": NARROW,
    }


def test_a_gate_may_stay_narrow_though_it_ends_a_path() -> None:
    gated = Recording(
        out_channels={"a.body": 6, "a.gate": 2},
        ends={"a": {"a.body", "a.gate"}},
        outputs={"a": [[torch.zeros(3, 6, 4, 4)]]},
    )
    assert inner_layers(gated, "a", with_gates=True) == {"a.gate": (Segment(2, grows=False),)}
    assert inner_layers(gated, "a") == {}


def test_layers_stay_narrow_whose_outputs_children_hand_on() -> None:
    # What is added to them, too, over several sums; layers outside stay as they are.
    assert stream_layers(RECORDING, "a", ["x"]) == {"a.x.last": NARROW, "a.z": NARROW}
    assert stream_layers(RECORDING, "a", ["y"]) == {"a.y.last": NARROW}
