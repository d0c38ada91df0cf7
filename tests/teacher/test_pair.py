import copy
import gc
from collections.abc import Iterator
from functools import cache
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpd_cli import Pair, expand
from gpd_cli.branches import BranchBank
from gpd_cli.teacher.build import merged_networks, merged_teacher
from gpd_cli.teacher.kernel import both_kernels
from gpd_cli.widening.plan import IndexMap, TensorPlan, WidthPlan
from gpd_cli.widening.running.randomize import randomize
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.tensors import Storage, expand_tensor, stored_scales
from maps import copies

SHAPE = (8, 3, 8, 8)
STORAGES = get_args(Storage)


class Convolutional(nn.Module):
    """Plain, depthwise, grouped and pointwise convolutions, and a flattened classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
        self.act = nn.PReLU(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depthwise(F.silu(self.bn(self.stem(x)))))
        y = F.gelu(self.bn2(self.grouped(x)))
        return self.fc(F.avg_pool2d(y + self.point(y), 2).flatten(1))


class Transformer(nn.Module):
    """Tokens, position embeddings, attention over heads, a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.gamma = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.gamma * self.mlp(x)
        return self.head(x[:, 0])


NETWORKS: dict[str, type[nn.Module]] = {"cnn": Convolutional, "vit": Transformer}


def make_pair(name: str = "cnn", ratio: float = 2, branches: int = 1, **kwargs) -> Pair:
    student = NETWORKS[name]()
    randomize(student, torch.Generator().manual_seed(1))
    plan = plan_of(name, ratio)
    return expand(student, sample=torch.randn(SHAPE), plan=plan, branches=branches, **kwargs)


@cache
def plan_of(name: str, ratio: float) -> WidthPlan:
    """A network's plan, by which many tests expand it, since the search takes most time."""
    return find_plan(NETWORKS[name](), torch.randn(SHAPE), ratio)


def joint_loss(pair: Pair, images: Tensor, labels: Tensor) -> Tensor:
    narrow, wide = pair(images)
    target = wide.detach().float().softmax(1)
    return (
        F.cross_entropy(narrow, labels)
        + F.cross_entropy(wide, labels)
        + F.cross_entropy(narrow.float(), target)
    )


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield (
            torch.randn(SHAPE, generator=generator),
            torch.randint(5, SHAPE[:1], generator=generator),
        )


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-4)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


def train(pair: Pair, steps: int = 3, optimizer: str = "sgd") -> Pair:
    pair.train()
    optimize = OPTIMIZERS[optimizer](pair.parameters())
    for images, labels in batches(steps):
        loss = joint_loss(pair, images, labels)
        optimize.zero_grad()
        loss.backward()
        optimize.step()
    return pair


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# What is extracted is what was trained


@pytest.mark.parametrize(
    ("optimizer", "storage"), [("sgd", "mixed"), ("adamw", "student"), ("sgd", "teacher")]
)
@pytest.mark.parametrize("branches", [1, 6, "gpd"])
@pytest.mark.parametrize(
    ("name", "ratio"), [*((name, r) for name in NETWORKS for r in (1, 2, 3)), ("cnn", 1.5)]
)
def test_the_extracted_student_is_the_trained_one(
    name: str, ratio: float, branches: int | str, optimizer: str, storage: Storage
) -> None:
    init = "gpd" if branches == "gpd" else "zero"
    pair = make_pair(name, ratio, branches, storage=storage, branch_init=init)
    before = pair.extract().state_dict()
    train(pair, optimizer=optimizer).eval()
    extracted = pair.extract()
    assert not any(
        torch.equal(before[key], tensor)
        for key, tensor in extracted.state_dict().items()
        if tensor.is_floating_point()
    )
    plain = NETWORKS[name]().eval()
    plain.load_state_dict(extracted.state_dict(), strict=True)
    images = torch.randn(SHAPE)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            student, (joint, _) = pair.student(images), pair(images)
            assert torch.equal(student, joint)
            assert torch.equal(student, extracted(images))
            assert torch.equal(student, plain(images))


class Frames(nn.Module):
    """A linear layer on a transposed input: its arithmetic depends on who requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.conv(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_student_and_extracted_run_the_same_arithmetic(mode) -> None:
    student = Frames()
    randomize(student, torch.Generator().manual_seed(1))
    pair = expand(student, sample=torch.randn(SHAPE), branches=1).eval()
    images = torch.randn(SHAPE)
    with mode():
        expected = student(images)
        assert torch.equal(pair.extract()(images), expected)
        assert torch.equal(pair.student(images), expected)
        assert torch.equal(pair(images)[0], expected)


def test_extraction_changes_nothing() -> None:
    pair = train(make_pair(branches=3))
    state = {k: v.clone() for k, v in pair.state_dict().items()}
    first, second = pair.extract(), pair.extract()
    assert same(first.state_dict(), second.state_dict())
    for parameter in first.parameters():
        parameter.data.zero_()
    assert same(pair.state_dict(), state)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_outline_has_the_modules_and_shapes_of_the_student(name: str) -> None:
    pair = train(make_pair(name, ratio=3, branches=6))
    outline, student = pair.outline(), pair.extract()
    assert type(outline) is type(student)
    shapes = [[(n, p.shape) for n, p in m.named_parameters()] for m in (outline, student)]
    assert shapes[0] == shapes[1]
    kernels = [dict(m.named_parameters()) for m in (outline, pair.narrow)]
    assert not kernels[0].keys() & kernels[1].keys()  # the pair's own student stays without


@pytest.mark.parametrize("name", NETWORKS)
def test_the_merged_teacher_is_the_trained_one(name: str) -> None:
    pair = train(make_pair(name, ratio=3, branches=6)).eval()
    teacher = merged_teacher(pair)
    assert type(teacher) is NETWORKS[name]
    assert not any(parametrize.is_parametrized(m) for m in teacher.modules())
    images = torch.randn(SHAPE)
    assert torch.equal(teacher(images), pair(images)[1])
    train(pair, 1)
    assert not torch.equal(teacher(images), pair.eval()(images)[1])


@pytest.mark.parametrize("storage", ["mixed", "student"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_without_the_teachers_loss_a_student_trains_as_it_would_alone(
    ratio: int, name: str, optimizer: str, storage: Storage
) -> None:
    alone = NETWORKS[name]()
    randomize(alone, torch.Generator().manual_seed(1))
    pair = make_pair(name, ratio, storage=storage)
    networks = ((alone, alone), (pair, pair.student))
    for module, forward in networks:
        optimize = OPTIMIZERS[optimizer](module.parameters())
        for images, labels in batches(4):
            optimize.zero_grad()
            F.cross_entropy(forward(images), labels).backward()
            optimize.step()
    assert same(pair.extract().state_dict(), alone.state_dict())


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_the_teachers_storage_kernels_and_biases_move_by_the_square(
    name: str, ratio: int
) -> None:
    alone = NETWORKS[name]().double()
    randomize(alone, torch.Generator().manual_seed(1))
    images, labels = next(batches(1))
    images = images.double()
    pair = expand(alone, sample=images, ratio=ratio, branches=1, storage="teacher")
    before = {key: p.detach().clone() for key, p in alone.named_parameters()}
    for module, forward in ((alone, alone), (pair, pair.student)):
        optimizer = torch.optim.SGD(module.parameters(), 0.05)
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()
    moved = dict(pair.extract().named_parameters())
    still = ("bn", "norm", "act", "mlp.0", "depthwise", "cls_", "pos_", "gamma", "fc", "head")
    for key, parameter in alone.named_parameters():
        times = 1 if key.startswith(still) else ratio**2
        expected = before[key] + times * (parameter - before[key])
        torch.testing.assert_close(moved[key], expected, rtol=1e-9, atol=1e-12)


# Gradients


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("branches", [1, 6, "gpd"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_is_trained(name: str, branches: int | str, storage: Storage) -> None:
    pair = make_pair(name, branches=branches, storage=storage)
    assert all(p.requires_grad for p in pair.parameters())
    assert {id(p) for p in pair.parameters()} == {id(p) for p in pair.teacher.parameters()}
    before = {k: p.detach().clone() for k, p in pair.named_parameters()}
    train(pair, 1)
    assert all(p.grad is not None for p in pair.parameters())
    # Gates start at zero: what they multiply has a gradient from the second step on.
    train(pair, 2)
    for key, parameter in pair.named_parameters():
        assert (parameter != before[key]).any(), key


def test_frozen_weights_stay_frozen() -> None:
    student = Convolutional()
    randomize(student, torch.Generator().manual_seed(1))
    for layer in (student.stem, student.bn, student.point):
        layer.requires_grad_(False)
    frozen = [key for key, p in student.named_parameters() if not p.requires_grad]
    pair = expand(student, sample=torch.randn(SHAPE), branches=3)
    extracted = train(pair).extract()
    state = extracted.state_dict()
    assert all(torch.equal(state[key], student.state_dict()[key]) for key in frozen)
    assert [key for key, p in extracted.named_parameters() if not p.requires_grad] == frozen
    assert not torch.equal(state["fc.weight"], student.fc.weight)


PLANS = {
    "conv": (TensorPlan((copies(3, 2), copies(2, 2), None, None), 1), (3, 2, 2, 2)),
    "thrice": (TensorPlan((copies(2, 3), copies(3, 3)), 1), (2, 3)),
    "uneven": (TensorPlan((copies(4, 1.5), copies(4, 1.5)), 1), (4, 4)),
    "classifier": (TensorPlan((None, copies(4, 2)), 1), (3, 4)),
    "irregular": (
        TensorPlan((IndexMap(3, (1, 0, 1, 2)), IndexMap(3, (2, 0, 0, 1, 0))), 1),
        (3, 3),
    ),
    "one to one": (TensorPlan((copies(3, 1), copies(2, 1)), 1), (3, 2)),
    "copied": (TensorPlan((copies(3, 2), None)), (3, 2)),
    "same": (TensorPlan((None, None)), (3, 2)),
}


def plain_kernels(
    merged: Tensor,
    teacher_scale: Tensor | None,
    plan: TensorPlan,
    storage: Storage,
    student_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `both_kernels` computes, as operations that autograd knows."""
    student = merged
    for axis, map_ in enumerate(plan.axes):
        if map_ is not None:
            student = student.index_select(axis, map_.firsts)
    scale = torch.ones_like(merged)
    if teacher_scale is not None and storage == "mixed":
        scale[plan.first_copies] = teacher_scale.expand(student.shape).clone()
    elif teacher_scale is not None:
        scale *= teacher_scale
    return merged * scale, student if student_scale is None else student * student_scale


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("used", ["both", "teacher", "student"])
@pytest.mark.parametrize("name", PLANS)
def test_a_kernels_gradient_is_that_of_plain_operations(
    name: str, used: str, storage: Storage
) -> None:
    plan, shape = PLANS[name]
    narrow = torch.randn(shape, dtype=torch.float64)
    stored = expand_tensor(narrow, plan, noise=1.0)
    out_axis = None if plan.fan_in is None else 1 - plan.fan_in
    teacher_scale, student_scale = stored_scales(plan, storage, stored, out_axis)
    weights = torch.randn_like(stored), torch.randn_like(narrow)

    def gradient(split) -> tuple[Tensor, ...]:
        merged = stored.clone().requires_grad_()
        results = split(merged)
        chosen = {"both": (0, 1), "teacher": (0,), "student": (1,)}[used]
        sum((results[k].square() * weights[k]).sum() for k in chosen).backward()
        assert merged.grad is not None
        return (*(r.detach() for r in results), merged.grad)

    actual = gradient(
        lambda merged: both_kernels(
            merged, teacher_scale, plan.first_copies, storage, student_scale
        )
    )
    expected = gradient(
        lambda merged: plain_kernels(merged, teacher_scale, plan, storage, student_scale)
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)

    def function(merged: Tensor) -> tuple[Tensor, ...] | Tensor:
        teacher, student = both_kernels(
            merged, teacher_scale, plan.first_copies, storage, student_scale
        )
        return {"both": (teacher, student), "teacher": teacher, "student": student}[used]

    assert torch.autograd.gradcheck(function, (stored.clone().requires_grad_(),))


def test_splitting_leaves_the_stored_weight_alone() -> None:
    plan, shape = PLANS["conv"]
    stored = torch.randn([len(copies(3, 2)), len(copies(2, 2)), 2, 2], requires_grad=True)
    before = stored.detach().clone()
    teacher, student = both_kernels(stored, torch.full((1, 2, 1, 1), 0.5), plan.first_copies)
    (teacher.sum() + student.sum()).backward()
    assert torch.equal(stored, before)
    assert student.shape == shape


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("ratio", [2, 3])
def test_copies_diverge_because_of_the_noise(ratio: int, storage: Storage) -> None:
    def spread(pair: Pair) -> list[Tensor]:
        """How far apart the copies of each channel are, in the teacher and beyond the first."""
        caught: list[Tensor] = []
        layer = pair.teacher.get_submodule("bn2")
        handle = layer.register_forward_hook(lambda module, args, y: caught.append(y))
        with torch.no_grad():
            pair.eval()(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
        handle.remove()
        wide = caught[0].unflatten(1, (-1, ratio))
        return [(wide[:, :, k] - wide[:, :, 0]).abs().mean() for k in range(1, ratio)] + [
            (wide[:, :, k] - wide[:, :, k - 1]).abs().mean() for k in range(2, ratio)
        ]

    noisy = make_pair(ratio=ratio, storage=storage)
    quiet = make_pair(ratio=ratio, storage=storage, noise=0)
    assert all(d < 1e-5 for d in spread(noisy))
    assert all(d > 0.02 for d in spread(train(noisy, 4)))
    if ratio == 3:  # without noise only the first copies, which the student trains, move away
        assert spread(train(quiet, 4))[-1] < 1e-5


# A pair is an ordinary module


def test_each_network_keeps_its_own_statistics() -> None:
    pair = make_pair()
    wide, narrow = (net.get_submodule("bn") for net in (pair.teacher, pair.narrow))
    assert torch.equal(wide.running_mean[::2], narrow.running_mean)
    train(pair, 3)
    assert wide.num_batches_tracked == narrow.num_batches_tracked == 3
    bn2 = [net.get_submodule("bn2").running_var for net in (pair.teacher, pair.narrow)]
    assert not torch.allclose(bn2[0][::2], bn2[1])
    state = {k: v.clone() for k, v in pair.named_buffers()}
    with torch.no_grad():
        pair.train().student(torch.randn(SHAPE))
    assert wide.num_batches_tracked == 3
    assert narrow.num_batches_tracked == 4
    assert torch.equal(wide.running_mean, state["teacher.bn.running_mean"])
    assert not torch.equal(narrow.running_mean, state["narrow.bn.running_mean"])


def test_switching_modes_switches_both_networks() -> None:
    pair, images = train(make_pair()), torch.randn(SHAPE)
    for mode in (False, True):
        pair.train(mode)
        assert {m.training for m in pair.modules()} == {mode}
        assert pair.extract().training is mode
    with torch.no_grad():
        evaluated = pair.eval()(images)
        state = {k: v.clone() for k, v in pair.state_dict().items()}
        assert all(torch.equal(a, b) for a, b in zip(pair(images), evaluated, strict=True))
        assert same(pair.state_dict(), state)
        trained = pair.train()(images)
    assert not any(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))


@pytest.mark.parametrize("branches", [1, 6])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_is_equal_and_independent(name: str, branches: int) -> None:
    pair, images = train(make_pair(name, branches=branches)).eval(), torch.randn(SHAPE)
    expected = pair(images)
    twin = copy.deepcopy(pair)
    assert all(torch.equal(a, b) for a, b in zip(twin(images), expected, strict=True))
    train(twin, 1)
    assert all(torch.equal(a, b) for a, b in zip(pair(images), expected, strict=True))
    assert not torch.equal(twin.eval()(images)[0], expected[0])
    assert torch.equal(twin.student(images), twin.extract()(images))


def test_a_pair_can_be_copied_after_its_teacher_ran_alone() -> None:
    pair, images = make_pair(branches=3).eval(), torch.randn(SHAPE)
    wide = pair.teacher(images)
    assert torch.equal(wide, pair(images)[1])
    pair.teacher(images)
    assert torch.equal(copy.deepcopy(pair)(images)[1], wide)


def test_a_student_is_that_of_the_weights_after_its_teacher_ran_alone() -> None:
    pair = expand(Convolutional(), sample=torch.zeros(SHAPE), ratio=2, branches=1)
    with torch.no_grad():
        pair.teacher(torch.randn(SHAPE))
        before = pair.extract().fc.weight
        pair.teacher(torch.randn(SHAPE))
        for parameter in pair.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(pair.extract().fc.weight, 2 * before)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pair_can_change_its_type(name: str) -> None:
    pair, images = train(make_pair(name, 3, branches=3)).eval(), torch.randn(SHAPE)
    expected = pair(images)
    pair.double()
    results = pair(images.double())
    for actual, single in zip(results, expected, strict=True):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual.float(), single, rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0], pair.extract()(images.double()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_loads_into_another_pair(name: str) -> None:
    trained = train(make_pair(name, branches=6)).eval()
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    torch.manual_seed(5)
    other = expand(NETWORKS[name](), sample=torch.randn(SHAPE), ratio=2, branches=6).eval()
    assert other.load_state_dict(state, strict=True)
    images = torch.randn(SHAPE)
    for a, b in zip(other(images), trained(images), strict=True):
        assert torch.equal(a, b)
    assert same(other.extract().state_dict(), trained.extract().state_dict())


def test_a_state_holds_every_weight_once() -> None:
    pair = make_pair("cnn", 2, branches=6)
    state = pair.state_dict()
    floating = [v for v in state.values() if v.is_floating_point()]
    assert len({v.data_ptr() for v in floating}) == len(floating)
    statistics = {k for k, _ in Convolutional().named_buffers()}
    buffers = {f"{network}.{k}" for network in ("teacher", "narrow") for k in statistics}
    assert set(state) == buffers | {k for k, _ in pair.named_parameters()}


# Where graphs begin and end


def test_branches_are_merged_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = 0
    forward = BranchBank.forward

    def counted(self: BranchBank, kernel: Tensor) -> Tensor:
        nonlocal merges
        merges += 1
        return forward(self, kernel)

    pair = make_pair(branches=3)
    monkeypatch.setattr(BranchBank, "forward", counted)
    pair(torch.randn(SHAPE))
    assert merges == sum(isinstance(m, BranchBank) for m in pair.modules()) == 3
    pair(torch.randn(SHAPE))
    assert merges == 6
    pair.outline()
    merged_networks(pair)  # gates of zero: there is nothing to merge yet
    assert merges == 6
    with torch.no_grad():
        for name, parameter in pair.named_parameters():
            parameter += 0.1 * (".gates." in name)
    student, teacher = merged_networks(pair)
    assert merges == 9
    for found, expected in zip(
        (student, teacher), (pair.extract(), merged_teacher(pair)), strict=True
    ):
        assert same(found.state_dict(), expected.state_dict())


def test_nothing_of_a_step_is_kept() -> None:
    def graph_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) and o.grad_fn is not None for o in gc.get_objects())

    pair = make_pair(branches=3)
    before = graph_tensors()
    narrow, wide = pair(torch.randn(SHAPE))
    assert graph_tensors() > before
    (narrow.sum() + wide.sum()).backward()
    del narrow, wide
    pair.student(torch.randn(SHAPE)).sum().backward()
    pair.extract()
    merged_teacher(pair)
    assert graph_tensors() == before


def test_nothing_is_kept_after_an_error() -> None:
    pair, images = make_pair(branches=3).eval(), torch.randn(SHAPE)
    with pytest.raises(RuntimeError):
        pair(torch.randn(2, 4, 8, 8))
    copy.deepcopy(pair)
    with torch.no_grad():
        before = pair(images)[0]
        pair.teacher.get_submodule("stem.parametrizations.weight").original.mul_(2)
        assert not torch.equal(pair(images)[0], before)


def test_a_pair_runs_twice_within_one_cache() -> None:
    pair, images = make_pair(branches=3).eval(), torch.randn(SHAPE)
    expected = pair(images)
    with parametrize.cached():
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(pair(images), expected, strict=True))
            assert torch.equal(pair.student(images), expected[0])


@pytest.mark.parametrize("branches", [1, 6])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pair_trains_under_autocast(name: str, branches: int) -> None:
    pair = make_pair(name, branches=branches)
    optimizer = torch.optim.SGD(pair.parameters(), 0.05)
    for images, labels in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            narrow, wide = pair(images)
            loss = F.cross_entropy(narrow, labels) + F.cross_entropy(wide, labels)
        assert narrow.dtype == wide.dtype == torch.bfloat16
        optimizer.zero_grad()
        loss.backward()
        for parameter in pair.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all()
        optimizer.step()
    extracted, images = pair.eval().extract(), torch.randn(SHAPE)
    with torch.no_grad():
        single = pair.student(images)
        assert torch.equal(single, extracted(images))
        with torch.autocast("cpu", torch.bfloat16):
            narrow, wide = pair(images)
            assert torch.equal(narrow, pair.student(images))
            torch.testing.assert_close(narrow, extracted(images), rtol=0.05, atol=0.05)
    torch.testing.assert_close(narrow.float(), single, rtol=0.1, atol=0.1)
