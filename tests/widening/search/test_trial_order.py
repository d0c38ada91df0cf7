"""The order of guesses: the likeliest first, and none twice."""

from gpd_cli.widening.layout import Scale, Segment
from gpd_cli.widening.observe.recording import Reads
from gpd_cli.widening.rules import Rule
from gpd_cli.widening.search.options import factor_variable
from gpd_cli.widening.search.trial_order import counts_in, ordered_guesses
from gpd_cli.widening.search.variables import DIVIDED, SIDE_BY_SIDE, STAYS_NARROW, LayoutVariable

LAYOUT = LayoutVariable(
    ("a.qkv",),
    {
        SIDE_BY_SIDE: (Segment(6),),
        "factor 0": (Segment(6, block=3),),
        STAYS_NARROW: (Segment(6, grows=False),),
    },
    SIDE_BY_SIDE,
    {"factor 0": {6, 2}},
)


def test_numbers_of_heads_come_before_no_assumption_and_factors_after_it() -> None:
    reads = Reads({"a.scale": 0.5, "a.dim": 6, "a.num_heads": 4})
    assert counts_in([LAYOUT], reads) == [4, None, 2, 6]
    assert counts_in([LAYOUT], None) == [None, 2, 6]


def test_layouts_in_which_a_count_widens_come_first_and_narrow_ones_last() -> None:
    assert list(ordered_guesses([LAYOUT], [2, None])) == [
        ("factor 0",),
        (SIDE_BY_SIDE,),
        (STAYS_NARROW,),
    ]
    assert list(ordered_guesses([LAYOUT], [None])) == [
        (SIDE_BY_SIDE,),
        ("factor 0",),
        (STAYS_NARROW,),
    ]


def test_what_was_right_before_comes_first() -> None:
    remembered = [{"a.qkv": STAYS_NARROW}, {"a.qkv": "of another module"}]
    assert list(ordered_guesses([LAYOUT], [2], remembered)) == [
        (STAYS_NARROW,),
        (SIDE_BY_SIDE,),
        ("factor 0",),
    ]


def test_with_nothing_to_decide_there_is_one_guess() -> None:
    assert list(ordered_guesses([], [None])) == [()]


def test_wider_heads_with_a_divided_factor_are_tried_early() -> None:
    factor = factor_variable("a.scale", 0.5, Scale(2), Rule())
    guesses = list(ordered_guesses([factor, LAYOUT], [2, None]))
    assert guesses[:3] == [
        (STAYS_NARROW, "factor 0"),
        (STAYS_NARROW, SIDE_BY_SIDE),
        (DIVIDED, SIDE_BY_SIDE),
    ]
