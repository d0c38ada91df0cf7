"""The plan on paper: words that tell every map, text that can be diffed."""

import re
from itertools import pairwise

import pytest
import torch
import yaml
from torch import Tensor, nn

from gpd_cli.widening.describe import axis_words, describe_plan, plan_text
from gpd_cli.widening.plan import (
    IndexMap,
    TensorPlan,
    WidthPlan,
    identity,
    spread,
    stack,
)
from gpd_cli.widening.search.find import find_plan
from maps import copies


def joined(*maps: IndexMap) -> IndexMap:
    """Maps laid end to end, as concatenation does."""
    index: list[int] = []
    start = 0
    for map_ in maps:
        index += [start + i for i in map_.index]
        start += map_.narrow_size
    return IndexMap(start, tuple(index))


SHUFFLED = IndexMap(4, (0, 2, 0, 2, 1, 3, 1, 3))
MAPS = {
    "kept": identity(8),
    "side by side x2": copies(8, 2),
    "side by side x3": copies(1, 3),
    "blocks of 64 x2": copies(192, 2, block=64),
    "blocks of 8 x2": IndexMap(8, (*range(8), *range(8))),
    "side by side x1.5 (1 or 2 copies each)": copies(64, 1.5),
    "blocks of 4 x1.5 (1 or 2 copies each)": copies(16, 1.5, block=4),
    "side by side x2.5 (2 or 3 copies each)": copies(64, 2.5),
    "channels 0-3 side by side x2; channels 4-7 kept": joined(copies(4, 2), identity(4)),
    "channel 0 kept; channels 1-8 side by side x2": joined(identity(1), copies(8, 2)),
    "channels 0-7 blocks of 4 x2; channels 8-9 side by side x3": joined(
        copies(8, 2, block=4), copies(2, 3)
    ),
    "channels 0-24 side by side x1.6 (1 or 2 copies each); channels 25-36 side by side x2": joined(
        spread(25, 40), spread(12, 24)
    ),
    "in the order 0-2 by 2, 0-2 by 2, 1-3 by 2, 1-3 by 2": SHUFFLED,
    "blocks of 4, each in the order 0-2 by 2, 0-2 by 2, 1-3 by 2, 1-3 by 2": stack(SHUFFLED, 3),
    "channels 0-3 in the order 0-2 by 2, 0-2 by 2, 1-3 by 2, 1-3 by 2; channels 4-5 kept": joined(
        SHUFFLED, identity(2)
    ),
    "channels 0-1 kept; channels 2-5 in the order 2-4 by 2, 2-4 by 2, 3-5 by 2, 3-5 by 2": joined(
        identity(2), SHUFFLED
    ),
}


@pytest.mark.parametrize("words", MAPS)
def test_a_map_in_words(words: str) -> None:
    assert axis_words(MAPS[words]) == words


def every_map(narrow: int, wide: int) -> list[IndexMap]:
    """All maps of an axis that leave no narrow position out."""
    grid = torch.cartesian_prod(*[torch.arange(narrow)] * wide).reshape(-1, wide).tolist()
    return [IndexMap(narrow, tuple(i)) for i in grid if len(set(i)) == narrow]


@pytest.mark.parametrize(("narrow", "wide"), [(2, 4), (2, 7), (3, 6), (4, 6), (5, 6)])
def test_different_maps_have_different_words(narrow: int, wide: int) -> None:
    maps = every_map(narrow, wide)
    assert len({axis_words(map_) for map_ in maps}) == len(maps)


def test_irregular_maps_in_order_have_different_words() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = set()
    for _ in range(300):
        counts = torch.randint(1, 4, (12,), generator=generator)
        maps.add(IndexMap(12, tuple(torch.arange(12).repeat_interleave(counts).tolist())))
    assert len({(len(map_), axis_words(map_)) for map_ in maps}) == len(maps)


class Attention(nn.Module):
    """Two heads, classes, and a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = self.norm(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT / 2).softmax(-1) @ v
        return self.head(x.transpose(1, 2).flatten(2)[:, 0])


@pytest.fixture(scope="module")
def network() -> Attention:
    torch.manual_seed(0)
    return Attention()


@pytest.fixture(scope="module")
def plan(network: Attention) -> WidthPlan:
    return find_plan(network, torch.zeros(2, 3, 16, 16), 2)


def test_every_tensor_and_attribute_of_the_plan_is_described(
    network: Attention, plan: WidthPlan
) -> None:
    modules = describe_plan(plan, network)["modules"]
    assert modules["qkv"] == {
        "class": "Linear",
        "tensors": {
            "weight": {
                "shape": "24 x 8 -> 48 x 16",
                "axis 0": "blocks of 4 x2",
                "axis 1": "side by side x2, weight divided by 2",
            },
            "bias": "24 -> 48, blocks of 4 x2",
        },
        "attributes": {"in_features": "8 -> 16", "out_features": "24 -> 48"},
    }
    assert modules["norm"]["attributes"] == {"normalized_shape": "(8,) -> (16,)"}
    own = modules["(the network itself)"]
    assert own["attributes"] == {"num_heads": "2 -> 4"}
    assert own["tensors"]["token"] == {
        "shape": "1 x 1 x 8 -> 1 x 1 x 16",
        "axis 2": "side by side x2",
    }
    described = sum(len(entry.get("tensors", {})) for entry in modules.values())
    assert described == len(plan.tensors)


def test_totals_are_those_of_the_widened_network(network: Attention, plan: WidthPlan) -> None:
    from gpd_cli.teacher.build import merged_teacher
    from gpd_cli.teacher.expansion import expand

    pair = expand(network, sample=torch.zeros(2, 3, 16, 16), plan=plan, branches=1)
    sizes = [sum(p.numel() for p in n.parameters()) for n in (network, merged_teacher(pair))]
    totals = describe_plan(plan, network)["widened"]
    assert totals["parameters"] == f"{sizes[0]} -> {sizes[1]}"
    assert totals["tensors"] == "8 of 9"  # all but the bias of the classes


def test_text_is_yaml_and_says_the_same(network: Attention, plan: WidthPlan) -> None:
    text = plan_text(plan, network, {"network": "attention"})
    assert yaml.safe_load(text) == {"network": "attention", **describe_plan(plan, network)}
    assert text.startswith("network: attention\nratio: 2.0\n")
    assert not re.search(r"tensor\(|IndexMap", text)


def test_order_is_the_networks_whatever_the_order_of_the_plan(
    network: Attention, plan: WidthPlan
) -> None:
    turned = WidthPlan(
        plan.ratio,
        dict(reversed(plan.tensors.items())),
        {name: dict(reversed(a.items())) for name, a in reversed(plan.attributes.items())},
        plan.kept_narrow,
    )
    text = plan_text(plan, network, {})
    assert plan_text(turned, network, {}) == text
    assert plan_text(WidthPlan.from_dict(plan.to_dict()), network, {}) == text
    places = [text.index(f"\n  {name}:") for name in ("stem", "norm", "qkv", "head")]
    assert all(a < b for a, b in pairwise(places))


def test_another_ratio_is_another_text(network: Attention, plan: WidthPlan) -> None:
    wider = find_plan(network, torch.zeros(2, 3, 16, 16), 3)
    lines = [plan_text(p, network, {}).splitlines() for p in (plan, wider)]
    assert len(lines[0]) == len(lines[1])
    assert lines[0] != lines[1]


def test_nothing_widened_is_said_too(network: Attention) -> None:
    text = plan_text(WidthPlan(1), network, {})
    assert "tensors: 0 of 9" in text
    assert yaml.safe_load(text)["modules"] == {}


def test_uneven_division_and_a_share() -> None:
    network = nn.Linear(4, 2)
    axes = (None, copies(4, 1.5))
    uneven = describe_plan(WidthPlan(1.5, {"weight": TensorPlan(axes, fan_in=1)}), network)
    weight = uneven["modules"]["(the network itself)"]["tensors"]["weight"]
    assert weight["axis 1"].endswith("weight divided by the number of copies")
    shared = describe_plan(WidthPlan(1.5, {"weight": TensorPlan(axes, extra_divisor=3)}), network)
    weight = shared["modules"]["(the network itself)"]["tensors"]["weight"]
    assert weight["weight"] == "divided by 3"


def test_tied_weights_count_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    both = {f"{i}.weight": TensorPlan((copies(4, 2), copies(4, 2)), fan_in=1) for i in (0, 1)}
    totals = describe_plan(WidthPlan(2, both), network)["widened"]
    assert totals == {"tensors": "2 of 2", "parameters": "16 -> 64"}


def test_modules_that_stay_narrow_inside_are_named(network: Attention) -> None:
    narrow = {"blocks.0": "self.heads = 3 would have to be 6"}
    assert describe_plan(WidthPlan(2, kept_narrow=narrow), network)["narrow"] == narrow
