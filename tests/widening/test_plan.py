import json
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.expansion import expand
from gpd_cli.widening.layout import Segment
from gpd_cli.widening.plan import IndexMap, TensorPlan, WidthPlan, stack
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.tensors import (
    Storage,
    complete_,
    expand_tensor,
    largest,
    replicate,
    slice_tensor,
)
from maps import copies

RATIOS = [1.25, 1.5, 2, 2.5, 3, 4]
SEEDS = range(8)


def random_map(seed: int, narrow: int | None = None) -> IndexMap:
    """A map in no order at all, each narrow position copied once or more."""
    generator = torch.Generator().manual_seed(seed)
    narrow = narrow or int(torch.randint(1, 9, (1,), generator=generator))
    more = int(torch.randint(12, (1,), generator=generator))
    extra = torch.randint(narrow, (more,), generator=generator)
    index = torch.cat([torch.arange(narrow), extra])
    order = torch.randperm(len(index), generator=generator)
    return IndexMap(narrow, tuple(index[order].tolist()))


def first_copies(wide: Tensor, plan: TensorPlan) -> Tensor:
    """The student's block by plain selection, axis by axis."""
    for axis, map_ in enumerate(plan.axes):
        if map_ is not None:
            firsts = torch.tensor([map_.index.index(c) for c in range(map_.narrow_size)])
            wide = wide.index_select(axis, firsts)
    return wide


def sum_over_copies(wide: Tensor, map_: IndexMap, axis: int) -> Tensor:
    shape = list(wide.shape)
    shape[axis] = map_.narrow_size
    return wide.new_zeros(shape).index_add_(axis, map_.tensor, wide)


# Index maps


@pytest.mark.parametrize("map_", [random_map(seed) for seed in SEEDS] + [copies(6, 2.5, 2)])
def test_counts_and_first_copies_are_those_of_the_index(map_: IndexMap) -> None:
    assert map_.counts.tolist() == [map_.index.count(c) for c in range(map_.narrow_size)]
    assert map_.firsts.tolist() == [map_.index.index(c) for c in range(map_.narrow_size)]
    assert map_.tensor[map_.firsts].tolist() == list(range(map_.narrow_size))
    assert len(map_) == sum(map_.counts.tolist())


@pytest.mark.parametrize(
    "index", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 1, 0, 0), (0, 1, 1), (1, 0), (0, 0), (0, 0, 1, 2)]
)
def test_the_index_of_first_copies_selects_them(index: tuple[int, ...]) -> None:
    map_ = IndexMap(max(index) + 1, index)
    assert torch.equal(torch.arange(len(map_))[map_.first_copies], map_.firsts)


def test_a_map_knows_whether_it_is_identity_uniform_and_onto() -> None:
    identity, pairs = IndexMap(3, (0, 1, 2)), IndexMap(2, (1, 0, 0, 1))
    uneven, partial = IndexMap(2, (0, 1, 1)), IndexMap(3, (0, 2))
    assert [m.is_identity for m in (identity, pairs, uneven, partial)] == [True, *3 * [False]]
    assert [m.is_uniform for m in (identity, pairs, uneven)] == [True, True, False]
    assert [m.is_onto() for m in (identity, pairs, uneven, partial)] == [*3 * [True], False]


@pytest.mark.parametrize("ratio", [1, *RATIOS])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_copies_are_side_by_side_and_spread_evenly(size: int, ratio: float) -> None:
    map_ = copies(size, ratio)
    assert abs(len(map_) - size * ratio) <= 0.5
    assert list(map_.index) == sorted(map_.index)
    assert map_.is_onto()
    assert int(map_.counts.max() - map_.counts.min()) <= 1


def test_blocks_of_neighbours_are_copied_as_a_whole() -> None:
    assert copies(6, 2, block=3).index == (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)
    assert copies(4, 1.5, block=2).index == (0, 1, 0, 1, 2, 3)


@pytest.mark.parametrize("other", [{"parts": 2}, {"block": 2}, {"grows": False}])
def test_a_number_of_wide_outputs_excludes_parts_and_blocks(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="7 wide outputs"):
        Segment(4, wide=7, **other)


def test_stacked_parts_each_follow_the_map() -> None:
    map_ = random_map(3, narrow=4)
    stacked = stack(map_, 3)
    assert stacked.narrow_size == 12
    x = torch.arange(12).view(3, 4)
    assert torch.equal(x.flatten()[stacked.tensor], x[:, map_.tensor].flatten())


# Plans of a tensor

PLANS = {
    "conv": (TensorPlan((copies(4, 2), copies(3, 2), None, None), 1), (4, 3, 3, 3)),
    "thrice": (TensorPlan((copies(5, 3), copies(4, 3), None, None), 1), (5, 4, 1, 1)),
    "half as many again": (TensorPlan((copies(6, 1.5), copies(4, 1.5)), 1), (6, 4)),
    "classifier": (TensorPlan((None, copies(4, 2)), 1), (7, 4)),
    "heads": (TensorPlan((stack(copies(8, 2, 4), 3), copies(8, 2)), 1), (24, 8)),
    "irregular": (TensorPlan((random_map(1, 5), random_map(2, 4)), 1), (5, 4)),
    "irregular kernel": (TensorPlan((random_map(3, 5), random_map(4, 4), None), 1), (5, 4, 3)),
    "irregular inputs": (TensorPlan((copies(5, 2), random_map(5, 6)), 1), (5, 6)),
    "depthwise": (TensorPlan((copies(6, 2, 2), None, None, None)), (6, 1, 3, 3)),
    "bias": (TensorPlan((random_map(6, 5),)), (5,)),
    "tokens": (TensorPlan((None, None, copies(4, 2))), (1, 3, 4)),
}
DIVIDED = [name for name, (plan, _) in PLANS.items() if plan.fan_in_map is not None]


@pytest.mark.parametrize("name", PLANS)
def test_the_first_copies_of_a_tensor_are_a_grid(name: str) -> None:
    plan, shape = PLANS[name]
    sizes = [n if m is None else len(m) for n, m in zip(shape, plan.axes, strict=True)]
    wide = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    assert torch.equal(wide[plan.first_copies], first_copies(wide, plan))
    assert wide[plan.first_copies].shape == shape


def test_irregular_axes_have_to_be_neighbours() -> None:
    plan = TensorPlan((IndexMap(3, (0, 1, 1, 2)), None, IndexMap(3, (0, 1, 1, 2))), 0)
    with pytest.raises(ValueError, match="neighbours"):
        _ = plan.first_copies


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("name", PLANS)
def test_slicing_undoes_expansion(name: str, noise: float) -> None:
    plan, shape = PLANS[name]
    student = torch.randn(shape, dtype=torch.float64)
    before = student.clone()
    teacher = expand_tensor(student, plan, noise=noise)
    torch.testing.assert_close(slice_tensor(teacher, plan), student, rtol=1e-15, atol=0)
    assert slice_tensor(teacher, plan).is_contiguous()
    teacher.zero_()
    assert torch.equal(student, before)


@pytest.mark.parametrize("ratio", RATIOS)
def test_slicing_undoes_expansion_at_any_ratio(ratio: float) -> None:
    plan = TensorPlan((copies(6, ratio), copies(8, ratio), None, None), 1)
    student = torch.randn(6, 8, 3, 3)
    back = slice_tensor(expand_tensor(student, plan, noise=0.5), plan)
    torch.testing.assert_close(back, student, rtol=2**-23, atol=0)
    if ratio in (1.25, 1.5, 2, 4):  # halving and quartering do not round
        assert torch.equal(back, student)


@pytest.mark.parametrize("name", PLANS)
def test_the_rounding_of_an_expanded_tensor_can_be_undone(name: str) -> None:
    plan, shape = PLANS[name]
    student = torch.randn(shape)
    noise = 0.5 if plan.fan_in_map is not None else 0.0
    rounded = expand_tensor(student.double(), plan, noise=noise).float().double()
    exact = rounded.clone()
    change = complete_(exact, student.double(), plan)
    assert change == (exact - rounded).abs().max()
    assert change <= 10 * 2**-23 * rounded.abs().max()
    if plan.fan_in_map is not None:
        fan_in = plan.fan_in or 0
        sums = torch.zeros_like(exact.index_select(fan_in, plan.fan_in_map.firsts))
        sums.index_add_(fan_in, plan.fan_in_map.tensor, exact)
        rows = TensorPlan(tuple(a if k != fan_in else None for k, a in enumerate(plan.axes)))
        assert largest(sums - replicate(student.double(), rows)) < 1e-15
    exact[(0,) * exact.ndim] += 1
    assert complete_(exact, student.double(), plan) > 0.9


@pytest.mark.parametrize("name", DIVIDED)
def test_a_wide_layer_that_is_fed_copies_computes_copies(name: str) -> None:
    plan, shape = PLANS[name]
    student = torch.randn(shape, dtype=torch.float64)
    teacher = expand_tensor(student, plan, noise=10.0)
    x = torch.randn(shape[1], dtype=torch.float64)
    out, into = plan.axes[0], plan.axes[1]
    assert into is not None
    narrow = torch.einsum("oi...,i->o...", student, x)
    wide = torch.einsum("oi...,i->o...", teacher, x[into.tensor])
    expected = narrow if out is None else narrow[out.tensor]
    torch.testing.assert_close(wide, expected, rtol=1e-11, atol=1e-12)


# Noise


@pytest.mark.parametrize("name", DIVIDED)
def test_noise_sums_to_zero_over_copies_and_spares_the_student(name: str) -> None:
    plan, shape = PLANS[name]
    map_ = plan.fan_in_map
    assert map_ is not None
    student = torch.randn(shape, dtype=torch.float64)
    noise = expand_tensor(student, plan, noise=1.0) - expand_tensor(student, plan)
    assert float(sum_over_copies(noise, map_, 1).abs().max()) < 1e-13
    assert not first_copies(noise, plan).any()


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_noise_has_the_promised_size(ratio: int) -> None:
    plan = TensorPlan((copies(40, ratio), copies(30, ratio), None, None), 1)
    student = torch.randn(40, 30, 3, 3, dtype=torch.float64)
    quiet = expand_tensor(student, plan)
    noise = expand_tensor(student, plan, noise=0.5) - quiet
    promised = 0.5 * float(quiet.std())
    rows, columns = torch.arange(len(noise)) % ratio, torch.arange(noise.shape[1]) % ratio
    assert float(noise[rows > 0].std()) == pytest.approx(promised, rel=0.05)
    for copy in range(ratio):  # no copy of an input is favoured
        size = float(noise[rows > 0][:, columns == copy].std())
        assert size == pytest.approx(promised, rel=0.05)
    others = noise[rows == 0][:, columns > 0]
    if ratio == 2:  # a single copy beside the first: nothing sums to zero
        assert not others.any()
    else:
        assert float(others.std()) == pytest.approx(promised, rel=0.05)


@pytest.mark.parametrize("ratio", [2, 3])
def test_noise_tells_copies_apart(ratio: int) -> None:
    plan = TensorPlan((copies(4, ratio), copies(5, ratio)), 1)
    wide = expand_tensor(torch.randn(4, 5), plan, noise=0.5)
    rows = wide.view(4, ratio, -1)
    columns = wide.view(4 * ratio, 5, ratio)
    for a in range(ratio):
        for b in range(a):
            assert (rows[:, a] - rows[:, b]).abs().amax(1).min() > 0.01
            assert (columns[..., a] - columns[..., b]).abs().amax(0).min() > 0.01


def test_noise_comes_from_the_generator() -> None:
    plan, student = TensorPlan((copies(4, 2), copies(5, 2)), 1), torch.randn(4, 5)

    def expanded(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return expand_tensor(student, plan, noise=0.5, generator=generator)

    state = torch.get_rng_state()
    assert torch.equal(expanded(1), expanded(1))
    assert not torch.equal(expanded(1), expanded(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_that_are_only_copied_get_no_noise() -> None:
    plan, student = TensorPlan((copies(5, 3),)), torch.randn(5)
    assert torch.equal(expand_tensor(student, plan, noise=0.5), student.repeat_interleave(3))


# Multiplicities


@pytest.mark.parametrize("name", PLANS)
def test_multiplicities_broadcast_against_narrow_and_wide_tensors(name: str) -> None:
    plan, shape = PLANS[name]
    ones = torch.ones(shape, dtype=torch.float64)
    teacher = expand_tensor(ones, plan)
    copied, wide_copied = plan.divisor(ones), plan.wide_divisor(ones)
    if name not in DIVIDED:
        assert copied is None and wide_copied is None
        return
    assert copied is not None and wide_copied is not None
    assert copied.dtype == ones.dtype
    assert torch.equal(first_copies(teacher, plan), ones / copied)
    assert torch.equal(teacher, torch.ones_like(teacher) / wide_copied)


# Whole plans


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 5),
    )


def round_trip(plan: WidthPlan) -> WidthPlan:
    return WidthPlan.from_dict(json.loads(json.dumps(plan.to_dict())))


def test_a_plan_survives_json() -> None:
    plan = WidthPlan(
        2.5,
        {name: tensor_plan for name, (tensor_plan, _) in PLANS.items()},
        {"": {"num_features": 8}, "norm": {"normalized_shape": (4, 2)}, "conv": {"groups": 6}},
    )
    assert round_trip(plan) == plan
    assert round_trip(WidthPlan(1)) == WidthPlan(1)


@pytest.mark.parametrize("seed", range(40))
def test_irregular_maps_survive_json(seed: int) -> None:
    plan = WidthPlan(2, {"a": TensorPlan((random_map(seed), None, random_map(seed + 100)), 2)})
    assert round_trip(plan) == plan


@pytest.mark.parametrize(
    "index",
    [
        (0,),
        (0, 0, 0),
        (2, 1, 0),
        (0, 0, 1, 2, 2, 3),
        (0, 2, 4, 6, 1, 3, 5, 7),
        (0, 1, 2, 0, 1, 2),
        (5, 5, 3, 3, 1, 1, 0, 2, 4),
        (0, 0, 1, 1, 2, 2, 3, 4, 5, 5),
    ],
)
def test_hand_made_maps_survive_json(index: tuple[int, ...]) -> None:
    plan = WidthPlan(2, {"weight": TensorPlan((IndexMap(max(index) + 1, index),))})
    assert round_trip(plan) == plan


def test_the_plan_of_a_network_survives_json_and_serves_again() -> None:
    network, sample = small_network(), torch.randn(2, 3, 6, 6)
    plan = find_plan(network, sample, 3)
    read = round_trip(plan)
    assert read == plan
    found = expand(network, sample=sample, ratio=3, branches=1)
    given = expand(network, sample=sample, ratio=3, branches=1, plan=read)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), given.state_dict().values(), strict=True)
    )


def test_a_written_plan_is_short() -> None:
    flattened = IndexMap(25088, tuple(c * 49 + k for c in copies(512, 2).index for k in range(49)))
    plan = WidthPlan(2, {f"{n}.weight": TensorPlan((copies(4096, 2), flattened)) for n in "ab"})
    assert round_trip(plan) == plan
    assert len(json.dumps(plan.to_dict())) < 25_000


def test_a_plan_does_not_depend_on_the_weights() -> None:
    first, second, sample = small_network(), small_network(), torch.randn(2, 3, 6, 6)
    assert not torch.equal(first[0].weight, second[0].weight)
    assert find_plan(first, sample, 2) == find_plan(second, torch.zeros_like(sample), 2)


# Storage


@pytest.mark.parametrize("ratio", [2, 3])
def test_every_storage_gives_the_same_teacher(ratio: float) -> None:
    network, sample = small_network().double(), torch.randn(2, 3, 6, 6)
    teachers = [
        merged_teacher(expand(network, sample=sample, ratio=ratio, branches=1, storage=storage))
        for storage in get_args(Storage)
    ]
    expected = teachers[0].state_dict()
    for teacher in teachers[1:]:
        torch.testing.assert_close(teacher.state_dict(), dict(expected), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("storage", get_args(Storage))
@pytest.mark.parametrize("ratio", [2, 3])
def test_storage_says_at_what_scale_the_weights_are_stored(ratio: int, storage: Storage) -> None:
    network, sample = small_network(), torch.randn(2, 3, 6, 6)
    narrow = network[7].weight
    pair = expand(network, sample=sample, ratio=ratio, noise=0, branches=1, storage=storage)
    stored = pair.teacher.get_submodule("7.parametrizations.weight").original
    plan = pair.plan.tensors["7.weight"]
    assert torch.equal(first_copies(stored, plan), narrow)
    scale = torch.ones(stored.shape)
    if storage == "mixed":
        scale /= ratio
        scale[plan.first_copies] = 1
    torch.testing.assert_close(stored, narrow[:, plan.axes[1].tensor] * scale)


@pytest.mark.parametrize("ratio", [2, 3])
def test_storage_teacher_is_that_of_the_authors(ratio: int) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6)),
        *(nn.Conv2d(6, 6, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    ).double()
    sample = torch.randn(2, 3, 6, 6)
    pair = expand(network, sample=sample, ratio=ratio, noise=0, branches=1, storage="teacher")
    stored = {
        name.replace("parametrizations.", "").removesuffix(".original"): parameter
        for name, parameter in pair.teacher.named_parameters()
    }
    divided = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")
    assert stored.keys() == dict(network.named_parameters()).keys()
    for name, narrow in network.named_parameters():
        plan = pair.plan.tensors.get(name)
        expected = narrow.data if plan is None else expand_tensor(narrow, TensorPlan(plan.axes))
        scale = ratio if name in divided else 1
        torch.testing.assert_close(stored[name].data, expected / scale, rtol=1e-15, atol=0)
