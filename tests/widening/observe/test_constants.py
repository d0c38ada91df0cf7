"""Constants, and the axes of parameters that they were computed from."""

from __future__ import annotations

import torch

from gpd_cli.widening.observe.constants import Constants, source_axes


def test_what_constants_alone_give_is_a_constant() -> None:
    token, table, x = torch.randn(3), torch.randn(3), torch.randn(3)
    constants = Constants()
    constants.add(token, ["token"])
    constants.add(table, ["table"])
    both, mixed = token + table, x + token
    constants.derive(([token], {"other": table}), (both, None))
    constants.derive((x, token), mixed)
    assert constants.names(both) == {"token", "table"}
    assert constants.names(mixed) is None
    mask = torch.ones(3)
    constants.derive((3,), mask)  # no tensor behind it
    assert constants.names(mask) == frozenset()


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
