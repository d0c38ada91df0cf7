"""The order of guesses: the likeliest first, and none twice."""

from gpd_cli.widening.layout import Segment
from gpd_cli.widening.observe.recording import Reads
from gpd_cli.widening.search.trial_order import counts_in, ordered_guesses
from gpd_cli.widening.search.variables import Variable

LAYOUT = Variable(
    "layout",
    ("a.qkv",),
    {
        "plain": (Segment(6),),
        "factor 0": (Segment(6, block=3),),
        "keep": (Segment(6, grows=False),),
    },
    {"factor 0": {6, 2}},
    "plain",
)


def test_numbers_of_heads_come_before_no_assumption_and_factors_after_it() -> None:
    reads = Reads({"a.scale": 0.5, "a.dim": 6, "a.num_heads": 4})
    assert counts_in([LAYOUT], reads) == [4, None, 2, 6]
    assert counts_in([LAYOUT], None) == [None, 2, 6]


def test_layouts_in_which_a_count_widens_come_first_and_narrow_ones_last() -> None:
    assert list(ordered_guesses([LAYOUT], [2, None])) == [("factor 0",), ("plain",), ("keep",)]
    assert list(ordered_guesses([LAYOUT], [None])) == [("plain",), ("factor 0",), ("keep",)]


def test_what_was_right_before_comes_first() -> None:
    remembered = [{"a.qkv": "keep"}, {"a.qkv": "of another module"}]
    assert list(ordered_guesses([LAYOUT], [2], remembered)) == [
        ("keep",),
        ("plain",),
        ("factor 0",),
    ]


def test_with_nothing_to_decide_there_is_one_guess() -> None:
    assert list(ordered_guesses([], [None])) == [()]
