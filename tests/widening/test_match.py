"""Index maps found by value: from a student's activation and the wide one."""

import pytest
import torch
from torch import Tensor

from gpd_cli.widening.match import Matches, match_axes
from gpd_cli.widening.mismatch import Mismatch, UnfitMultiple
from gpd_cli.widening.plan import IndexMap, TensorPlan, spread
from gpd_cli.widening.tensors import replicate

UNEVEN = IndexMap(3, (2, 0, 1, 1))


def activation(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "maps",
    [
        (None, None, None),
        (None, UNEVEN, None),
        (None, None, spread(4, 9)),
        (None, IndexMap(3, (2, 0, 1, 1, 2, 0)), spread(4, 8)),
        (spread(2, 4), IndexMap(3, (2, 0, 1, 1, 2, 0)), spread(2, 4, block=2)),
    ],
)
def test_the_maps_of_a_replication_are_found(maps: tuple[IndexMap | None, ...]) -> None:
    narrow = activation(2, 3, 4)
    assert match_axes(narrow, replicate(narrow, TensorPlan(maps))) == maps


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_one_other_value_is_no_replication(value: float) -> None:
    narrow = activation(2, 3, 4)
    for maps in (None, UNEVEN, None), (None, spread(3, 6), spread(4, 8)):
        wide = replicate(narrow, TensorPlan(maps))
        wide[1, 2, 3] = value
        assert match_axes(narrow, wide) is None


def test_another_number_of_axes_is_no_replication() -> None:
    narrow = activation(2, 3)
    assert match_axes(narrow, narrow[..., None]) is None


def test_among_equal_channels_the_largest_blocks_are_copied() -> None:
    narrow = activation(2, 2)[:, [0, 1, 0, 1]]
    wide = replicate(narrow, TensorPlan((None, spread(2, 4, block=2))))
    assert match_axes(narrow, wide) == (None, spread(1, 2, block=4))


def test_outputs_of_a_module_are_replications_and_logits_do_not_widen() -> None:
    narrow = activation(2, 3)
    wide = replicate(narrow, TensorPlan((None, spread(3, 6))))
    matches = Matches()
    matches.check_output("a", [narrow], [wide])
    for name, recorded, outputs in [
        ("", [narrow], [wide]),
        ("a", [narrow], [wide + 1]),
        ("a", [narrow], [wide, wide]),
        ("a", [narrow], [2 * wide]),
    ]:
        with pytest.raises(Mismatch, match="does not follow the copies"):
            matches.check_output(name, recorded, outputs)


def test_a_multiple_matches_where_it_is_allowed() -> None:
    narrow = activation(2, 3)
    wide = 2 * replicate(narrow, TensorPlan((None, spread(3, 6))))
    plain, matches = Matches(), Matches(allows_multiples=True)
    assert plain.find(narrow, wide) is None
    assert plain.matches_as_multiple_only(narrow, wide)
    assert not plain.matches_as_multiple_only(narrow, wide / 2)
    assert matches.find(narrow, wide) == ((None, spread(3, 6)), 2)
    with pytest.raises(UnfitMultiple, match="the student's output times 2"):
        matches.check_output("a", [narrow], [wide])
    matches.check_output("a", [narrow], [wide], allows_multiples=True)
