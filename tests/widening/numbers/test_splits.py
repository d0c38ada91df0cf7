"""How code takes axes apart, as the search sees it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.widening.numbers.arithmetic import Attribute, Number
from gpd_cli.widening.numbers.splits import Split, factorizations, splits_of

X = torch.zeros(2, 12, 2, 2)


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (Tensor.reshape, (2, 3, 4, 2, 2), [Split(12, (3, 4), names=(None, None))]),
        (Tensor.unflatten, (1, (3, 4)), [Split(12, (3, 4), names=(None, None))]),
        (Tensor.reshape, (2, 12, 4), []),
        (torch.chunk, (3, 1), [Split(12, segments=(4, 4, 4))]),
        (torch.split, ([2, 10], 1), [Split(12, segments=(2, 10))]),
        (torch.unbind, (2,), [Split(2, segments=(1, 1))]),
        (F.channel_shuffle, (3,), [Split(12, (3, 4))]),
        (F.pixel_shuffle, (2,), [Split(12, (3, 4))]),
        (F.relu, (), []),
    ],
)
def test_a_call_takes_axes_apart(
    function: Any, args: tuple[Any, ...], expected: list[Split]
) -> None:
    assert splits_of(function, (X, *args), {}, function(X, *args)) == expected


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        ((Number(3, Attribute("a", "num_heads")), 4), 0),
        ((3, Number(4, Attribute("a", "num_heads"))), 1),
        ((3, Number(4, Attribute("a", "head_dim"))), 0),
        ((Number(3, Attribute("a", "parts")), 4), None),
    ],
)
def test_names_tell_which_factor_counts_heads(sizes: tuple[int, int], heads: int | None) -> None:
    args = (X, 2, *sizes, 2, 2)
    (split,) = splits_of(Tensor.reshape, args, {}, X.reshape(2, 3, 4, 2, 2))
    assert split.heads == heads
    assert [split.may_count(k) for k in range(2)] == [
        not isinstance(size, Number) or size.expression == Attribute("a", "num_heads")
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((4, 6), (4, 2, 3), [(6, (2, 3), 1)]),
        ((4, 6), (2, 2, 6), [(4, (2, 2), 0)]),
        ((4, 6), (2, 2, 3, 2), [(4, (2, 2), 0), (6, (3, 2), 2)]),
        ((1, 6), (2, 3), [(6, (2, 3), 0)]),
        ((4, 6), (24,), []),
        ((2, 12), (6, 4), [(12, (3, 4), 0)]),  # heads join the batch
        ((4, 6), (5,), []),
    ],
)
def test_axes_become_factors(
    old: tuple[int, ...], new: tuple[int, ...], expected: list[tuple[int, tuple[int, ...], int]]
) -> None:
    assert list(factorizations(old, new)) == expected
