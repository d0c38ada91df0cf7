"""Wide sizes of axes that are reshaped, and index maps of axes that are cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpd_cli.widening.numbers.arithmetic import Attribute, Number
from gpd_cli.widening.numbers.axes import cut, reshaped
from gpd_cli.widening.plan import IndexMap, spread, stack


def heads_of(value: int) -> Number:
    """A number that code reads from an attribute with one of the usual names of head counts."""
    return Number(value, Attribute("attn", "num_heads"))


def wide_of(narrow: torch.Tensor, maps: list[IndexMap | None]) -> torch.Tensor:
    for axis, map_ in enumerate(maps):
        narrow = narrow if map_ is None else narrow.index_select(axis, map_.tensor)
    return narrow


RESHAPES = [
    ((2, 7, 60), (2, 7, 3, 4, 5), [None, None, stack(spread(4, 8, 5), 3)], [2, 7, 3, 8, 5]),
    ((2, 4, 7, 5), (2, 4, 35), [None, spread(4, 8), None, spread(5, 15)], [2, 8, 105]),
    ((2, 4, 7, 5), (8, 35), [None, spread(4, 8), None, None], [16, 35]),
    ((3, 12, 5), (12, 3, 5), [None, spread(4, 8, 3), None], [24, 3, 5]),  # heads join the batch
    ((1, 6), (6,), [None, spread(6, 12)], [12]),
    ((6, 1, 1), (2, 3), [spread(6, 12), None, None], [2, 6]),
    ((5, 4, 1, 3), (5, 4, 3), [None, None, spread(1, 2), None], [5, 4, 6]),  # a single head
]


@pytest.mark.parametrize(("old", "new", "maps", "sizes"), RESHAPES)
def test_wide_sizes_of_a_reshape(old: Any, new: Any, maps: Any, sizes: Any) -> None:
    x = torch.arange(math.prod(old)).reshape(old)
    wide = wide_of(x, maps)
    assert reshaped(old, new, wide.shape, lambda: maps) == sizes
    # The channels of the reshaped tensor are those of the narrow one, in as many copies.
    result = wide.reshape(sizes)
    assert set(result.flatten().tolist()) == set(x.flatten().tolist())


def test_parts_that_are_copied_in_orders_of_their_own_can_be_taken_apart() -> None:
    # Channels of two layers laid end to end, those of one in pairs: what a shuffle gets.
    map_ = IndexMap(8, (0, 1, 0, 1, 2, 3, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7))
    assert reshaped((8,), (2, 4), (16,), lambda: [map_]) == [2, 8]


def test_of_several_ways_to_take_an_axis_apart_heads_grow_before_their_width() -> None:
    heads = spread(3, 6, block=4)
    assert reshaped((12,), (3, 4), (24,), lambda: [heads], (heads_of(3), -1)) == [6, 4]
    one = stack(spread(1, 2, block=4), 3)  # queries, keys and values of a single head
    asked = (3, heads_of(1), -1)
    assert reshaped((12,), (3, 1, 4), (24,), lambda: [one], asked) == [3, 2, 4]


def test_an_open_size_of_one_is_there_for_copies() -> None:
    assert reshaped((6,), (2, 3, 1), (12,), lambda: [spread(6, 12)], (2, 3, -1)) == [2, 3, 2]
    assert reshaped((6,), (2, 3, 1), (12,), lambda: [spread(6, 12)], (2, 3, 1)) == [2, 6, 1]


def test_the_size_that_the_code_asks_for_decides_which_axis_grows() -> None:
    either = IndexMap(6, (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5))  # copies along one axis or the other
    dim = Number(3, Attribute("attn", "dim"))
    for asked, sizes in (
        ((2, 3), [4, 3]),  # of equals the outermost
        ((-1, dim), [4, 3]),
        ((2, -1), [2, 6]),
        ((2, dim), [2, 6]),
        ((-1, heads_of(3)), [2, 6]),
    ):
        assert reshaped((6,), (2, 3), (12,), lambda: [either], asked) == sizes


def test_a_reshape_across_copies_has_no_sizes() -> None:
    assert reshaped((6,), (4, 3), (12,), lambda: [spread(6, 12)]) is None  # not as many elements
    assert reshaped((6,), (2, 3), (9,), lambda: [spread(6, 9)]) is None


def test_pieces_of_a_cut_axis() -> None:
    pieces = cut(stack(spread(4, 8), 2), (4, 4))
    assert pieces is not None
    assert [len(piece) for piece in pieces] == [8, 8]
    assert pieces[1] == spread(4, 8)
    uneven = cut(spread(6, 9), (2, 4))
    assert uneven is not None
    assert [len(piece) for piece in uneven] == [3, 6]
    assert cut(IndexMap(4, (0, 1, 2, 3, 0, 1, 2, 3)), (2, 2)) is None
