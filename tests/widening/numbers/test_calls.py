"""Calls with numbers that follow the copies in their input."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import assert_exact
from gpd_cli.widening.numbers.arithmetic import Attribute, Number
from gpd_cli.widening.numbers.calls import Call, Unfollowed, follow
from gpd_cli.widening.numbers.solve import Equation
from gpd_cli.widening.observe.events import shapes
from gpd_cli.widening.plan import Axes, IndexMap, spread


def followed(
    function: Callable[..., Any],
    narrow: Tensor,
    wide: Tensor,
    axes: Axes,
    *args: Any,
    **kwargs: Any,
) -> tuple[list[tuple[int, ...]], list[Equation]]:
    """The shapes that a call gives in the wide network, and its equations."""
    shapes = [tuple(piece.shape) for piece in function(narrow, *args, **kwargs)]
    equations: list[Equation] = []
    call = follow(
        Call(function, (wide, *args), kwargs), lambda: axes, narrow.shape, shapes, equations
    )
    return [tuple(piece.shape) for piece in call.function(*call.args, **call.kwargs)], equations


@pytest.mark.parametrize("function", [Tensor.tensor_split, torch.tensor_split])
@pytest.mark.parametrize("name", [None, "sections"])
def test_a_tensor_split_counts_its_pieces_in_its_own_way(
    function: Callable[..., Any], name: str | None
) -> None:
    # Its pieces differ by one at most: 3 x 2 x 2 of 7 channels. Those of chunk are 3 x 3 x 1.
    narrow, wide, axes = torch.zeros(7), torch.zeros(14), [spread(7, 14)]
    given, named = ((3,), {}) if name is None else ((), {name: 3})
    with pytest.raises(Unfollowed, match="into 5 x 5 x 4, and their copies take 6 x 4 x 4"):
        followed(function, narrow, wide, axes, *given, **named, dim=0)
    wide, axes = torch.zeros(21), [spread(7, 21)]
    with pytest.raises(Unfollowed, match="into 7 x 7 x 7, and their copies take 9 x 6 x 6"):
        followed(function, narrow, wide, axes, *given, **named, dim=0)


def test_more_pieces_than_channels_are_asked_for() -> None:
    # Four pieces of 6 channels are three; of 12 they are four.
    with pytest.raises(Unfollowed, match="into 3 x 3 x 3 x 3, and their copies take 4 x 4 x 4"):
        followed(torch.chunk, torch.zeros(6), torch.zeros(12), [spread(6, 12)], 4)


@pytest.mark.parametrize("name", [None, "indices"])
def test_indices_follow_the_copies(name: str | None) -> None:
    first, last = Attribute("a", "first"), Attribute("a", "last")
    indices = [Number(2, first), Number(-1, last)]
    given, named = ((indices,), {}) if name is None else ((), {name: indices})
    shapes, equations = followed(
        torch.tensor_split, torch.zeros(6), torch.zeros(12), [spread(6, 12)], *given, **named
    )
    assert shapes == [(4,), (6,), (2,)]
    assert [(e.expression, e.wanted, e.given) for e in equations] == [
        (first, 4, 2),
        (last, -2, -1),
    ]


@pytest.mark.parametrize(
    ("indices", "expected"), [((2, 100), [(4,), (8,), (0,)]), ((-100, 4), [(0,), (8,), (4,)])]
)
def test_positions_beyond_the_axis_stay(
    indices: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    narrow, wide, axes = torch.zeros(6), torch.zeros(12), [spread(6, 12)]
    shapes, equations = followed(torch.tensor_split, narrow, wide, axes, indices)
    assert shapes == expected
    assert [equation.given for equation in equations] == [n for n in indices if abs(n) < 100]


MAP, BLOCKS = spread(6, 12), spread(2, 4, block=3)
SIX = Number(6, Attribute("a", "width"))
TWO = Number(2, Attribute("a", "heads"))


@pytest.mark.parametrize(
    ("function", "shape", "map_", "args", "expected", "wanted"),
    [
        (Tensor.reshape, (2, 6), BLOCKS, (2, TWO, 3), (2, 4, 3), {2: 4}),
        (Tensor.unflatten, (2, 6), BLOCKS, (1, (TWO, 3)), (2, 4, 3), {2: 4}),
        (torch.narrow, (2, 6), MAP, (1, TWO, 3), (2, 6), {2: 4}),
        (torch.narrow, (2, 6), MAP, (1, -TWO, 2), (2, 4), {}),
        (Tensor.__getitem__, (2, 6), MAP, ((slice(None), slice(TWO, None)),), (2, 8), {2: 4}),
        (Tensor.__getitem__, (2, 6), MAP, ((..., slice(None, TWO)),), (2, 4), {2: 4}),
        (Tensor.__getitem__, (2, 6), MAP, ((0,),), (12,), {}),
        (Tensor.expand, (1, 6), MAP, (4, SIX), (4, 12), {6: 12}),
        (F.layer_norm, (2, 6), MAP, ((SIX,),), (2, 12), {6: 12}),
    ],
)
def test_numbers_of_a_call_follow_the_copies(
    function: Callable[..., Any],
    shape: tuple[int, int],
    map_: IndexMap,
    args: tuple[Any, ...],
    expected: tuple[int, ...],
    wanted: dict[int, int],
) -> None:
    narrow, wide = torch.zeros(shape), torch.zeros(shape[0], 12)
    new = tuple(function(narrow, *args).shape)
    equations: list[Equation] = []
    call = follow(Call(function, (wide, *args)), lambda: (None, map_), shape, new, equations)
    assert tuple(call.function(*call.args, **call.kwargs).shape) == expected
    solved = {e.given: e.wanted for e in equations if isinstance(e.expression, Attribute)}
    assert solved == wanted


@pytest.mark.parametrize(
    ("function", "map_", "args", "reason"),
    [
        (Tensor.reshape, BLOCKS, (2, 3, 2), "reshapes 2 x 6 to 2 x 3 x 2 across the copies"),
        (torch.split, BLOCKS, ([2, 4], 1), "cuts 6 channels into 2 x 4 across their copies"),
        (Tensor.__getitem__, MAP, ((slice(None), 1),), "takes channel 1 by its position"),
        (Tensor.__getitem__, MAP, ((..., slice(0, 4, 2)),), "channels 0 to 4 in steps of 2"),
        (Tensor.__getitem__, BLOCKS, ((..., slice(2)),), "channels 0 to 1 across their copies"),
    ],
)
def test_calls_that_mix_copies_are_not_followed(
    function: Callable[..., Any], map_: IndexMap, args: tuple[Any, ...], reason: str
) -> None:
    narrow, wide = torch.zeros(2, 6), torch.zeros(2, 12)
    new = shapes(function(narrow, *args))
    with pytest.raises(Unfollowed, match=reason):
        follow(Call(function, (wide, *args)), lambda: (None, map_), narrow.shape, new, [])


class FirstThousand(nn.Module):
    """Code that takes at most so many channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1000]


def test_a_slice_beyond_the_channels_takes_all_of_them() -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(
        nn.Conv2d(3, 6, 3), FirstThousand(), pool, nn.Flatten(), nn.Linear(6, 3)
    )
    pair = assert_exact(student, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert not pair.plan.kept_narrow


class Bits(nn.Module):
    """Code that reads an activation as numbers of a type, which is no reshape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.dtype) + x.view(dtype=x.dtype)


def test_a_view_with_a_type_has_no_sizes_to_follow() -> None:
    pool = nn.AdaptiveAvgPool2d(1)
    student = nn.Sequential(nn.Conv2d(3, 6, 3), Bits(), pool, nn.Flatten(), nn.Linear(6, 3))
    pair = assert_exact(student, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert not pair.plan.kept_narrow
