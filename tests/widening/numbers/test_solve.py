"""Attributes that are solved from the equations of numbers that code computes."""

from __future__ import annotations

from typing import Any

import pytest

from gpd_cli.widening.numbers.arithmetic import Attribute, Number, expression_of
from gpd_cli.widening.numbers.solve import Equation, Unsolvable, solve

HEADS, DIM, WIDTH = (Attribute("attn", name) for name in ("num_heads", "dim", "head_dim"))


def number(attribute: Attribute, value: int) -> Any:
    return Number(value, attribute)


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
