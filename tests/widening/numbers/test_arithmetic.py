"""Numbers that remember where they come from, and attributes solved from them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpd_cli.widening.numbers.arithmetic import (
    Attribute,
    Number,
    evaluate,
    expression_of,
    invert,
    remember,
    text,
)
from gpd_cli.widening.numbers.axes import cut, reshaped
from gpd_cli.widening.numbers.solve import Equation, Unsolvable, solve
from gpd_cli.widening.observe.constants import source_axes
from gpd_cli.widening.plan import IndexMap, spread, stack

HEADS, DIM, WIDTH = (Attribute("attn", name) for name in ("num_heads", "dim", "head_dim"))


def number(attribute: Attribute, value: int) -> Any:
    return Number(value, attribute)


def test_a_number_is_an_integer_wherever_one_is_expected() -> None:
    heads = number(HEADS, 3)
    assert heads == 3
    assert hash(heads) == hash(3)
    assert torch.zeros(2, 6).reshape(2, heads, -1).shape == (2, 3, 2)
    assert list(range(heads)) == [0, 1, 2]
    assert f"{heads}" == "3"
    assert heads / 2 == 1.5


def test_copies_of_a_number_are_plain() -> None:
    module = nn.Identity()
    module.heads = number(HEADS, 3)  # code that keeps what it computed
    for twin in (copy.deepcopy(module).heads, pickle.loads(pickle.dumps(module.heads))):
        assert type(twin) is int


def test_entries_of_tuples_and_lists_are_remembered_one_by_one() -> None:
    sizes = remember(Attribute("block", "sizes"), (4, 5))
    assert type(sizes) is tuple
    assert str(expression_of(sizes[1])) == "block.sizes[1]"
    assert remember(HEADS, "three") == "three"
    assert remember(HEADS, True) is True


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 9),
    st.sampled_from(
        ["a * b + c", "(a - c) * b", "a // c * b", "a % c + b", "c * (a + b) // 2", "-a + b"]
    ),
)
def test_an_expression_has_the_value_that_was_computed(a: int, b: int, c: int, code: str) -> None:
    known = {HEADS: a, DIM: b}
    result = eval(code, {"a": number(HEADS, a), "b": number(DIM, b), "c": c})
    assert evaluate(result.expression, known) == result == eval(code, {"a": a, "b": b, "c": c})


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 9), st.integers(2, 4))
def test_an_inverted_expression_gives_the_wanted_value(a: int, b: int, c: int, r: int) -> None:
    heads = number(HEADS, a)
    for result, scaled in (
        (heads * b + c, a * r * b + c),
        (heads * c, a * r * c),
        (b - heads, b - r * a),
    ):
        value = invert(result.expression, scaled, HEADS, {})
        assert value == a * r
        assert evaluate(result.expression, {HEADS: value}) == scaled


def test_what_no_integer_gives_is_not_inverted() -> None:
    heads = number(HEADS, 3)
    assert invert((heads * 4).expression, 10, HEADS, {}) is None
    assert invert((heads * heads).expression, 36, HEADS, {}) is None  # occurs twice
    assert invert((heads % 4).expression, 1, HEADS, {}) is None


def test_an_expression_reads_as_code() -> None:
    assert (
        text((number(DIM, 64) // (number(HEADS, 4) * 2)).expression)
        == "self.dim // (self.num_heads * 2)"
    )


def equation(value: int, wanted: int) -> Equation:
    return Equation(expression_of(value), wanted, int(value))


def test_heads_grow_where_the_width_of_a_head_does_not() -> None:
    heads, width = number(HEADS, 4), number(WIDTH, 16)
    equations = [equation(heads, 8), equation(width, 16), equation(heads * width, 128)]
    assert solve(equations, {HEADS: 4, WIDTH: 16}) == {HEADS: 8}


def test_an_attribute_that_is_divided_by_another_follows() -> None:
    dim, heads = number(DIM, 64), number(HEADS, 4)
    equations = [equation(dim // heads, 16), equation(heads, 8)]
    assert solve(equations, {HEADS: 4, DIM: 64}) == {HEADS: 8, DIM: 128}


def test_nothing_changes_where_every_number_is_right() -> None:
    assert solve([equation(number(HEADS, 4), 4), equation(7, 7)], {HEADS: 4}) == {}


@pytest.mark.parametrize(
    ("equations", "reason"),
    [
        ([(HEADS, 48, 96), (HEADS, 48, 64)], "self.num_heads = 48 must be both 64 and 96"),
        ([(None, 48, 96)], "the 48 that its code computes would have to be 96"),
        ([(WIDTH, 5, 6)], "self.head_dim = 5 would have to be 6"),
    ],
)
def test_the_number_in_the_way_is_named(equations: list[Any], reason: str) -> None:
    system = [
        equation(given if attribute is None else number(attribute, given), wanted)
        for attribute, given, wanted in equations
    ]
    with pytest.raises(Unsolvable) as failure:
        solve(system, {HEADS: 48, WIDTH: 5}, fixed={WIDTH})
    assert str(failure.value) == reason


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
    asked = number(HEADS, 3)
    assert reshaped((12,), (3, 4), (24,), lambda: [heads], (asked, -1)) == [6, 4]
    one = stack(spread(1, 2, block=4), 3)  # queries, keys and values of a single head
    asked = number(HEADS, 1)
    assert reshaped((12,), (3, 1, 4), (24,), lambda: [one], (3, asked, -1)) == [3, 2, 4]


def test_an_open_size_of_one_is_there_for_copies() -> None:
    assert reshaped((6,), (2, 3, 1), (12,), lambda: [spread(6, 12)], (2, 3, -1)) == [2, 3, 2]
    assert reshaped((6,), (2, 3, 1), (12,), lambda: [spread(6, 12)], (2, 3, 1)) == [2, 6, 1]


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


def test_the_axis_that_a_derived_table_comes_from() -> None:
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[0, 3, 8], [2, 2, 1]])
    bias = 16 * table[rows.flatten()].view(2, 3, 4).permute(2, 0, 1).unsqueeze(0).sigmoid()
    assert source_axes(bias, 1, table) == {1: 0}
    assert source_axes(bias, 3, table) == {}
    square = torch.randn(3, 3, requires_grad=True)
    assert source_axes(square.t() * 2, 0, square) == {1: 0}
    assert source_axes(torch.ones(3), 0, square) == {}
    key = torch.randn(3, requires_grad=True)
    assert source_axes(torch.cat([torch.ones(4), 2 * key, torch.ones(2)]), 0, key) == {0: 4}
