"""What may widen in a container, and in which ways."""

from gpd_cli.widening.layout import Scale, Segment
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.plan import TensorPlan, spread
from gpd_cli.widening.rules import Rule
from gpd_cli.widening.search.options import (
    ALL_SIZES,
    BY_RULE,
    IN_USE,
    blocks_in,
    factor_variable,
    layout_variable,
    number_variable,
    tensor_variable,
)
from gpd_cli.widening.search.variables import DIVIDED, SIDE_BY_SIDE, STAYS_NARROW

TWICE, NO_RULE = Scale(2), Rule()
KNOWN = {6: [spread(6, 12)]}


def test_a_number_of_a_size_that_widens_is_a_width_unless_its_name_says_otherwise() -> None:
    width = number_variable("a.dim", 6, KNOWN, TWICE, NO_RULE)
    assert width.options == {STAYS_NARROW: None, IN_USE: 12}
    assert (width.first, width.is_count) == (IN_USE, False)
    heads = number_variable("a.num_heads", 6, KNOWN, TWICE, NO_RULE)
    assert (heads.first, heads.is_count, heads.preferred(6, inner=True)) == (
        STAYS_NARROW,
        True,
        IN_USE,
    )
    assert number_variable("a.head_dim", 6, KNOWN, TWICE, NO_RULE).first == STAYS_NARROW


def test_each_of_several_sizes_may_widen() -> None:
    shape = number_variable("a.shape", (2, 6), KNOWN, TWICE, NO_RULE)
    assert shape.options == {
        STAYS_NARROW: None,
        IN_USE: (2, 12),
        ALL_SIZES: (4, 12),
        "only size 0": (4, 6),
    }


def test_a_rule_leaves_some_options() -> None:
    free = number_variable("a.x", 5, KNOWN, TWICE, NO_RULE)
    assert (free.options, free.first) == ({STAYS_NARROW: None, ALL_SIZES: 10}, STAYS_NARROW)
    grows = number_variable("a.x", 5, KNOWN, TWICE, Rule(grow=("x",)))
    assert (grows.options, grows.first) == ({ALL_SIZES: 10}, ALL_SIZES)
    kept = number_variable("a.x", 5, KNOWN, TWICE, Rule(grow=("x",), keep=("x",)))
    assert (kept.options, kept.first, kept.counts) == ({STAYS_NARROW: None}, STAYS_NARROW, {})


def test_a_factor_may_be_divided_by_a_whole_ratio() -> None:
    assert factor_variable("a.scale", 0.5, TWICE, NO_RULE).options == {
        STAYS_NARROW: None,
        DIVIDED: 0.25,
    }
    for scale, rule in (Scale(1.5), NO_RULE), (TWICE, Rule(keep=("scale",))):
        assert factor_variable("a.scale", 0.5, scale, rule).options == {STAYS_NARROW: None}


def test_a_tensor_widens_along_one_axis() -> None:
    blocks: dict[int, set[int]] = {3: {2}}
    token = tensor_variable("a.token", (1, 6), KNOWN, blocks, TWICE, NO_RULE)
    assert token.options == {
        STAYS_NARROW: None,
        "axis 1": TensorPlan((None, spread(6, 12))),
        "axis 1 in blocks 0": TensorPlan((None, spread(2, 4, block=3))),
    }
    assert token.first == "axis 1"
    ruled = tensor_variable("a.token", (1, 6), {}, {}, TWICE, Rule(axes={"token": -1}))
    assert (ruled.options, ruled.first) == ({"axis 1": token.options["axis 1"]}, "axis 1")


def test_a_layout_follows_the_factor_that_counts_heads() -> None:
    split = Split(12, (3, 2, 2), names=(None, "num_heads", None))
    layout = layout_variable(("a.qkv",), 12, [split], TWICE, NO_RULE, "qkv")
    assert layout.options == {
        SIDE_BY_SIDE: (Segment(12),),
        "factor 0 of split 0": (Segment(12, block=4),),
        "factor 1 of split 0": (Segment(12, parts=3, block=2),),
        STAYS_NARROW: (Segment(12, grows=False),),
    }
    assert (layout.first, layout.named) == ("factor 1 of split 0", True)
    for block, segment in (4, Segment(12, block=4)), (0, Segment(12, grows=False)):
        rule = Rule(blocks={"qkv": block})
        ruled = layout_variable(("a.qkv",), 12, [split], TWICE, rule, "qkv")
        assert (ruled.options, ruled.first) == ({BY_RULE: (segment,)}, BY_RULE)


def test_a_layout_of_segments_leaves_single_outputs_narrow() -> None:
    layout = layout_variable(("a.x",), 5, [Split(5, segments=(4, 1))], TWICE, NO_RULE, "x")
    assert layout.options["segments of split 0"] == (Segment(4), Segment(1, grows=False))
    assert (layout.first, layout.named) == ("segments of split 0", False)


def test_blocks_are_those_of_layouts_in_one_segment() -> None:
    split = Split(12, (3, 4), names=(None, "num_heads"))
    layouts = [
        layout_variable(("a.qkv",), 12, [split], TWICE, NO_RULE, "qkv"),
        layout_variable(("a.x",), 12, [Split(12, segments=(6, 6))], TWICE, NO_RULE, "x"),
    ]
    assert blocks_in(layouts) == {1: {4}, 4: {3}}
