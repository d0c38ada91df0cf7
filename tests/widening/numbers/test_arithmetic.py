"""Numbers that remember where they come from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

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

HEADS, DIM = (Attribute("attn", name) for name in ("num_heads", "dim"))


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
