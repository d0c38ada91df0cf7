"""Channels that code shuffles or cuts by position: layouts whose copies go where they belong."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from exactness import assert_exact
from gpd_cli import Pair
from gpd_cli.widening.layout import Scale, Segment, layout_map
from gpd_cli.widening.search.cut_layouts import cut_layouts
from gpd_cli.widening.search.find import find_plan


class ShuffleUnit(nn.Module):
    """Half of the channels pass through; then both halves are interleaved."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(half, half, 1), nn.BatchNorm2d(half)
        self.depthwise = nn.Conv2d(half, half, 3, padding=1, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        kept, new = x.chunk(2, 1)
        new = self.depthwise(self.norm(self.conv(new)).relu())
        joined = torch.cat([kept, new], 1)
        b, c, h, w = joined.shape
        return joined.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Thirds(nn.Module):
    """Each third of the channels in a way of its own; the last one is smaller."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, 1)
        return torch.cat([a.relu(), b * a, c.sigmoid()], 1)


def around(stem: nn.Module, inside: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(stem, inside, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def shuffling(half: int, units: int) -> nn.Sequential:
    inside = nn.Sequential(*[ShuffleUnit(half) for _ in range(units)])
    return around(nn.Conv2d(3, 2 * half, 3, 2, 1), inside, 2 * half)


def exact(student: nn.Module, ratio: float = 2) -> Pair:
    return assert_exact(student, torch.randn(4, 3, 8, 8, dtype=torch.float64), ratio=ratio)


@pytest.mark.parametrize("ratio", [1.5, 2, 3])
@pytest.mark.parametrize(("half", "units"), [(5, 3), (6, 3), (11, 3)])
def test_shuffled_channels_widen_as_far_as_others(half: int, units: int, ratio: float) -> None:
    student = shuffling(half, units)
    pair = exact(student, ratio)
    assert not pair.plan.kept_narrow
    assert pair.plan.trials <= 20
    for name, layer in student.named_modules():
        if isinstance(layer, nn.Conv2d):
            wide = pair.teacher.get_submodule(name).out_channels
            assert wide == Scale(ratio).width(layer.out_channels)


def test_outputs_of_a_shuffled_layer_have_different_numbers_of_copies() -> None:
    student = shuffling(5, 2)
    plan = find_plan(student, torch.zeros(2, 3, 8, 8), 2)
    # Outputs 0 and 1 of the first unit pass through the second one: wide outputs 0 to 4 do.
    outputs = plan.tensors["1.0.conv.weight"].axes[0]
    assert outputs is not None
    assert outputs.index == (0, 0, 0, 1, 1, 2, 2, 3, 3, 4)
    read = plan.tensors["1.1.conv.weight"].fan_in_map
    assert read is not None
    assert read.is_onto()
    assert not read.is_uniform


def test_uneven_pieces_get_as_many_copies_as_there_is_room_for() -> None:
    student = around(nn.Conv2d(3, 7, 3, 2, 1), Thirds(), 7)
    pair = exact(student)
    assert not pair.plan.kept_narrow
    outputs = pair.plan.tensors["0.weight"].axes[0]
    assert outputs is not None
    # Pieces of 3, 3 and 1 channels; the same code cuts 14 channels into 5, 5 and 4.
    assert outputs.index == (0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 6, 6)


def test_where_no_copies_can_go_the_way_of_a_channel_the_stage_stays_narrow() -> None:
    # Output 0 of the first unit passes four units and goes into the sixth. Of twice as many
    # outputs none does: 0 passes the sixth as well, and 1 goes into the fifth.
    units = [ShuffleUnit(12) for _ in range(6)]
    stage = nn.Sequential(nn.Conv2d(8, 24, 1), *units, nn.Conv2d(24, 8, 1))
    pair = exact(around(nn.Conv2d(3, 8, 3, 2, 1), stage, 8))
    assert list(pair.plan.kept_narrow) == ["1"]
    assert "across their copies" in pair.plan.kept_narrow["1"]


def call(*shape: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    return (torch.randn(*shape, dtype=torch.float64),), {}


def test_layouts_of_one_container() -> None:
    container = nn.Sequential(nn.Conv2d(4, 7, 1, dtype=torch.float64), Thirds())
    found = cut_layouts(container, call(2, 4, 3, 3), call(2, 8, 3, 3), {"0": 14})
    assert found == {"0": (Segment(3, wide=5), Segment(3, wide=5), Segment(1, wide=4))}
    assert layout_map(found["0"], Scale(2)).counts.tolist() == [2, 2, 1, 2, 2, 1, 4]
    assert type(container[0]).forward is nn.Conv2d.forward
    assert "forward" not in vars(container[0])


class OneWidth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, last = x.reshape(len(x), 7, 3, 3).chunk(2, 1)
        return torch.cat([last, first], 1)


@pytest.mark.parametrize("code", [OneWidth(), nn.ReLU()])
def test_no_layouts_for_code_of_one_width_or_without_cuts(code: nn.Module) -> None:
    container = nn.Sequential(nn.Conv2d(4, 7, 1, dtype=torch.float64), code)
    assert cut_layouts(container, call(2, 4, 3, 3), call(2, 8, 3, 3), {"0": 14}) == {}


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("x0_5", ["stage3"]),
        ("x1_0", []),
        pytest.param("x1_5", [], marks=pytest.mark.slow),
        pytest.param("x2_0", [], marks=pytest.mark.slow),
    ],
)
def test_stages_of_torchvisions_shufflenets_that_stay_narrow(name: str, narrow: list[str]) -> None:
    student = get_model(f"shufflenet_v2_{name}", num_classes=5)
    plan = find_plan(student, torch.zeros(2, 3, 64, 64), 2, is_certified=True)
    assert list(plan.kept_narrow) == narrow
    assert plan.trials <= 20
