"""Whatever network is drawn: it expands exactly and comes back, or is refused in one sentence."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from torch import Tensor, nn

from gpd_cli import ExpansionError, Pair, expand
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.compare import relative_difference
from random_networks import Case, cases


def images_of(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def runs(network: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(network)(images)
    except Exception:
        return False
    return True


def assert_exact(pair: Pair, student: nn.Module, images: Tensor) -> None:
    for training in (False, True):
        pair.train(training)
        student.train(training)
        if not runs(student, images):
            continue  # of another size than the network takes, or too few for a batch norm
        with torch.no_grad():
            expected, (narrow, wide) = student(images), pair(images)
        assert relative_difference(wide, expected) < 1e-9, f"inexact, {training=}"
        assert relative_difference(narrow, expected) < 1e-12


def assert_widened(pair: Pair, student: nn.Module, least: float) -> None:
    """At least the given part of the kernels grew, and at least one."""
    wide = merged_teacher(pair)
    grown = [
        wide.get_parameter(name).numel() > kernel.numel()
        for name, kernel in student.named_parameters()
        if kernel.ndim > 1
    ]
    assert any(grown) and sum(grown) >= least * len(grown), "little was widened"


def train(pair: Pair, images: Tensor) -> None:
    optimizer = torch.optim.SGD(pair.train().parameters(), 1e-3)
    for _ in range(2):
        narrow, wide = pair(images)
        optimizer.zero_grad()
        (narrow.square().mean() + wide.sin().mean()).backward()
        optimizer.step()


def assert_extracts(pair: Pair, student: nn.Module, images: Tensor) -> None:
    """What is cut out is the student that was trained, to the last bit, in the user's own class."""
    before = copy.deepcopy(student.state_dict())
    extracted = pair.eval().extract().eval()
    student.eval().load_state_dict(extracted.state_dict(), strict=True)
    with torch.no_grad():
        expected = pair.student(images)
        assert torch.equal(extracted(images), expected)
        assert torch.equal(student(images), expected)
        assert torch.equal(pair(images)[0], expected)
    # One kernel at least: behind some norms and pools, those before them get no gradient.
    kernels = {name: p for name, p in extracted.named_parameters() if p.ndim > 1}
    assert any(not torch.equal(p, before[name]) for name, p in kernels.items()), "nothing trained"


def outcome(case: Case) -> str:
    """Assert that one case is as it should be; says what became of it."""
    student = case.build()
    image = (3, case.size, case.size)
    try:
        pair = expand(
            student,
            sample=images_of(case.batch, *image),
            ratio=case.ratio,
            branches=case.branches,
            branch_layers=case.branch_layers,
            storage=case.storage,
            branch_init=case.branch_init,
            width_multiple=case.width_multiple,
        )
    except ExpansionError as error:
        message = str(error)
        assert message.endswith(".") and "\n" not in message and len(message) < 500, message
        assert not case.usual, f"refused: {message}"
        return "refused"
    if case.branch_init == "gpd":  # which starts as what the branches merge to
        student.load_state_dict(pair.extract().state_dict(), strict=True)
    assert_widened(pair, student, case.least)
    for shape in ((4, *image), (3, *image), (3, 3, 20, 20)):
        assert_exact(pair, student, images_of(*shape))
    train(pair, images_of(4, *image))
    assert_extracts(pair, student, images_of(4, *image))
    return "expanded"


common = settings(
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(common, max_examples=25)
@given(cases())
def test_random_networks_expand_exactly_or_are_refused(case: Case) -> None:
    event(outcome(case))


@pytest.mark.slow
@settings(common, max_examples=100)
@given(cases())
def test_many_random_networks_expand_exactly_or_are_refused(case: Case) -> None:
    event(outcome(case))
