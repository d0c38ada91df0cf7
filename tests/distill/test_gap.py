import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpd_cli.distill.gap import gap_loss, soft_cross_entropy
from gpd_cli.distill.objective import Objective

ROWS, CLASSES = 5, 7


def logits(scale: float = 3.0, classes: int = CLASSES) -> Tensor:
    return scale * torch.randn(ROWS, classes, dtype=torch.float64)


def labels(classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (ROWS,))


# The references: plain sums over Python floats.


def probabilities(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def reference_ce(student: Tensor, targets: list[list[float]], smoothing: float) -> float:
    total = 0.0
    for s, target in zip(student.tolist(), targets, strict=True):
        p = probabilities(s)
        for a, b in zip(target, p, strict=True):
            total -= ((1 - smoothing) * a + smoothing / len(p)) * math.log(b)
    return total / len(student)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_soft_cross_entropy_is_the_written_formula(smoothing: float) -> None:
    student, targets = logits(), logits().softmax(dim=1)
    loss = soft_cross_entropy(student, targets, smoothing)
    assert loss.shape == ()
    assert loss.item() == near(reference_ce(student, targets.tolist(), smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_gap_loss_is_smoothed_cross_entropy_with_the_teachers_softmax(smoothing: float) -> None:
    student, teacher = logits(), logits()
    targets = [probabilities(row) for row in teacher.tolist()]
    loss = gap_loss(student, teacher, smoothing)
    assert loss.shape == ()
    assert loss.item() == near(reference_ce(student, targets, smoothing))


def test_gap_loss_smooths_by_a_tenth_unless_told() -> None:
    student, teacher = logits(), logits()
    assert gap_loss(student, teacher).item() == gap_loss(student, teacher, 0.1).item()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gap": gap_loss,
    "soft_cross_entropy": lambda s, t: soft_cross_entropy(s, t.softmax(dim=1), 0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    student, teacher = logits(1.0).requires_grad_(), logits(1.0)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), (student,))


@pytest.mark.parametrize("name", LOSSES)
def test_student_is_pulled_towards_the_teacher(name: str) -> None:
    student, teacher = logits(1.0).requires_grad_(), logits(1.0)
    before = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(before, student)
    after = LOSSES[name](student.detach() - 0.01 * gradient, teacher)
    assert after < before


def test_gap_loss_sends_no_gradient_into_the_dynamic_teacher() -> None:
    student, teacher = logits().requires_grad_(), logits().requires_grad_()
    gap_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_stays_finite(name: str, scale: float, dtype: torch.dtype) -> None:
    student = logits(scale).to(dtype).requires_grad_()
    loss = LOSSES[name](student, logits(scale).to(dtype))
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_the_terms_of_half_precision_logits_are_computed_in_full(
    soft: bool, autocast: bool
) -> None:
    student, teacher = logits().bfloat16(), logits().bfloat16()
    targets = logits().softmax(dim=1).bfloat16() if soft else labels()
    full = targets.float() if soft else targets
    expected = Objective().terms(student.float(), teacher.float(), full)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = Objective().terms(student, teacher, targets)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_certain_networks_that_disagree_give_finite_loss_and_gradient(name: str) -> None:
    student = (1e3 * torch.eye(CLASSES)).requires_grad_()
    loss = LOSSES[name](student, student.detach().roll(1, 0))
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_objective_names_its_terms(dynamic: bool) -> None:
    terms = Objective().terms(logits(), logits() if dynamic else None, labels())
    assert set(terms) == {"student_ce"} | ({"teacher_ce", "gap"} if dynamic else set())
    assert all(term.shape == () for term in terms.values())


def test_objective_weights_its_terms() -> None:
    student, dynamic, target = logits(), logits(), labels()
    objective = Objective(gap_weight=2.5, gap_smoothing=0.2, ce_weight=0.7, label_smoothing=0.1)
    terms = objective.terms(student, dynamic, target)
    hard = torch.nn.functional.one_hot(target, CLASSES).double().tolist()
    soft = [probabilities(row) for row in dynamic.tolist()]
    assert terms["student_ce"].item() == near(0.7 * reference_ce(student, hard, 0.1))
    assert terms["teacher_ce"].item() == near(0.7 * reference_ce(dynamic, hard, 0.1))
    assert terms["gap"].item() == near(2.5 * reference_ce(student, soft, 0.2))


def test_objective_defaults_to_the_papers_weights() -> None:
    student, dynamic, target = logits(), logits(), labels()
    terms = Objective().terms(student, dynamic, target)
    soft = [probabilities(row) for row in dynamic.tolist()]
    assert terms["gap"].item() == near(3.0 * reference_ce(student, soft, 0.1))


def test_the_gap_term_softens_both_networks_by_its_temperature() -> None:
    student, dynamic, target = logits(), logits(), labels()
    terms = Objective(gap_smoothing=0.2, gap_temperature=4.0).terms(student, dynamic, target)
    soft = [probabilities(row) for row in (dynamic / 4).tolist()]
    assert terms["gap"].item() == near(3 * 16 * reference_ce(student / 4, soft, 0.2))


def test_lambda_rises_over_its_warm_up() -> None:
    student, dynamic, target = logits(), logits(), labels()
    full = Objective().terms(student, dynamic, target, epoch=0)["gap"].item()
    objective = Objective(gap_warmup_epochs=4)
    terms = [objective.terms(student, dynamic, target, epoch) for epoch in (0, 2, 3, 9)]
    assert [term["gap"].item() / full for term in terms] == near([0.25, 0.75, 1.0, 1.0])
    assert all(term["student_ce"] == terms[0]["student_ce"] for term in terms)


def test_objective_without_gap_weight_trains_the_two_apart() -> None:
    student, dynamic = logits().requires_grad_(), logits().requires_grad_()
    terms = Objective(gap_weight=0.0).terms(student, dynamic, labels())
    assert set(terms) == {"student_ce", "teacher_ce"}


def test_dynamic_teacher_learns_from_labels_only() -> None:
    student, dynamic, target = logits(), logits().requires_grad_(), labels()
    terms = Objective().terms(student, dynamic, target)
    (everything,) = torch.autograd.grad(sum(terms.values()), dynamic, retain_graph=True)
    assert torch.equal(everything, torch.autograd.grad(terms["teacher_ce"], dynamic)[0])


def test_labels_can_be_left_out() -> None:
    assert set(Objective(ce_weight=0).terms(logits(), logits(), labels())) == {"gap"}


def test_objective_takes_the_soft_labels_of_mixup() -> None:
    student, dynamic, soft = logits(), logits(), logits().softmax(dim=1)
    terms = Objective().terms(student, dynamic, soft)
    assert terms["student_ce"].item() == near(reference_ce(student, soft.tolist(), 0.0))
