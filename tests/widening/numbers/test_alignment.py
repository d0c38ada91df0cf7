"""Axes of constants that coincide with axes of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.widening.numbers.alignment import aligned, overlays_operands, summed

X = torch.zeros(2, 6, 5, 4)


@pytest.mark.parametrize(
    ("function", "shape", "axes"),
    [
        (torch.add, (6, 1, 1), {0: 1, 1: 2, 2: 3}),  # by broadcasting, from the last axis on
        (torch.mul, (1, 2, 6, 5, 4), {1: 0, 2: 1, 3: 2, 4: 3}),
        (F.batch_norm, (6,), {0: 1}),
        (torch.matmul, (4, 3), {}),
    ],
)
def test_axes_are_aligned_as_the_function_aligns_them(
    function: Callable[..., Any], shape: tuple[int, ...], axes: dict[int, int]
) -> None:
    constant = torch.zeros(shape)
    assert aligned(function, (X, constant), {}, X, constant) == axes


def test_joined_tensors_are_aligned_along_the_other_axes() -> None:
    token = torch.zeros(2, 1, 5, 4)
    across = {0: 0, 2: 2, 3: 3}
    assert aligned(torch.cat, ([token, X], 1), {}, X, token) == across
    assert aligned(torch.cat, ([token, X],), {"dim": -3}, X, token) == across
    assert aligned(torch.cat, ([token, X],), {}, X, token) == {1: 1, 2: 2, 3: 3}


def test_a_mask_is_aligned_with_queries_but_for_its_last_two_axes() -> None:
    mask = torch.zeros(6, 5, 5)
    attention = F.scaled_dot_product_attention
    assert aligned(attention, (X, X, X), {"attn_mask": mask}, X, mask) == {0: 1}


def test_a_product_sums_over_one_axis_of_each_operand() -> None:
    table = torch.zeros(4, 3)
    assert summed(torch.matmul, (X, table), X, table) == (0, 3)
    assert summed(torch.matmul, (table.t(), X), X, table.t()) == (1, 2)
    vector = torch.zeros(4)
    assert summed(torch.matmul, (X, vector), X, vector) == (0, 3)
    assert summed(torch.add, (X, table), X, table) is None


def test_look_ups_and_sums_do_not_overlay_their_operands() -> None:
    assert overlays_operands(torch.add)
    assert overlays_operands(torch.matmul)
    assert not overlays_operands(F.linear)
    assert not overlays_operands(Tensor.__getitem__)
