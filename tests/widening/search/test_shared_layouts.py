"""The container that decides a layer's layout, and layers that need one layout."""

from gpd_cli.widening.layout import Scale
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.recording import Recording
from gpd_cli.widening.search.shared_layouts import splits_by_container

HEADS = Split(6, (2, 3), names=("num_heads", None))
PAIRS = Split(6, (3, 2))
TWICE, HALF_AS_WIDE_AGAIN = Scale(2), Scale(1.5)


def test_the_innermost_container_around_layer_and_code_decides() -> None:
    recording = Recording(
        out_channels={"a.attn.qkv": 6},
        splits={"a.attn.qkv": [("a.attn", HEADS), ("a", PAIRS)]},
    )
    assert splits_by_container(recording, TWICE) == {
        "a.attn": {"a.attn.qkv": [HEADS]},
        "a": {"a.attn.qkv": [PAIRS]},
    }


def test_names_in_the_code_of_another_module_mean_nothing_around_it() -> None:
    recording = Recording(out_channels={"a.x": 6}, splits={"a.x": [("a.attn", HEADS)]})
    assert splits_by_container(recording, TWICE) == {"a": {"a.x": [Split(6, (2, 3))]}}


def test_modules_are_told_apart_by_whole_names() -> None:
    recording = Recording(out_channels={"ab.x": 6}, splits={"ab.x": [("a.attn", PAIRS)]})
    assert splits_by_container(recording, TWICE) == {"": {"ab.x": [PAIRS]}}


def test_added_layers_share_a_layout_only_where_copies_may_not_coincide() -> None:
    recording = Recording(
        out_channels={"a.x": 6, "a.y.z": 6, "b": 6},
        splits={"a.x": [("a", PAIRS)]},
        sums=[{"a.x", "a.y.z"}],
    )
    assert splits_by_container(recording, TWICE) == {"a": {"a.x": [PAIRS]}}
    both = {"a": {"a.x": [PAIRS], "a.y.z": [PAIRS]}}
    assert splits_by_container(recording, HALF_AS_WIDE_AGAIN) == both
    assert splits_by_container(recording, Scale(2, rounded_to=8)) == both


def test_sums_join_layers_over_several_steps() -> None:
    recording = Recording(
        out_channels={"a.x": 6, "a.y": 6, "b": 6},
        splits={"a.x": [("a", HEADS)], "b": [("b", PAIRS), ("a", HEADS)]},
        sums=[{"a.x", "a.y"}, {"a.y", "b"}],
    )
    found = splits_by_container(recording, HALF_AS_WIDE_AGAIN)
    assert found == {"": {layer: [HEADS, PAIRS] for layer in ("a.x", "a.y", "b")}}
