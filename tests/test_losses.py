import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpd_cli.errors import GpdError
from gpd_cli.losses import DKD, KD, dkd_loss, gap_loss, kd_loss, make_method, soft_cross_entropy
from gpd_cli.training.objective import Objective

ROWS, CLASSES = 5, 7


def logits(scale: float = 3.0, classes: int = CLASSES) -> Tensor:
    return scale * torch.randn(ROWS, classes, dtype=torch.float64)


def labels(classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (ROWS,))


# The references: plain sums over Python floats.


def probabilities(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference_kd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    rows = [
        divergence(probabilities(t, temperature), probabilities(s, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def reference_dkd(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> float:
    total = 0.0
    for s, t, k in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        binary = divergence([p[k], 1 - p[k]], [q[k], 1 - q[k]])
        p_rest = [value / (1 - p[k]) for i, value in enumerate(p) if i != k]
        q_rest = [value / (1 - q[k]) for i, value in enumerate(q) if i != k]
        total += alpha * binary + beta * divergence(p_rest, q_rest)
    return temperature**2 * total / len(student)


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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_is_the_written_formula(temperature: float) -> None:
    student, teacher = logits(), logits()
    loss = kd_loss(student, teacher, temperature)
    assert loss.shape == ()
    assert loss.item() == near(reference_kd(student, teacher, temperature))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (1.0, 8.0), (0.3, 0.5)])
def test_dkd_is_the_written_formula(alpha: float, beta: float, temperature: float) -> None:
    student, teacher, target = logits(), logits(), labels()
    loss = dkd_loss(student, teacher, target, alpha, beta, temperature)
    assert loss.shape == ()
    assert loss.item() == near(reference_dkd(student, teacher, target, alpha, beta, temperature))


def test_dkd_weighted_by_the_teachers_doubt_is_kd() -> None:
    """Zhao et al., equation 6: per image, KD = TCKD + (1 - p_target) NCKD."""
    student, teacher, target = logits()[:1], logits()[:1], labels()[:1]
    doubt = 1 - probabilities(teacher[0].tolist(), 2.0)[int(target)]
    decoupled = dkd_loss(student, teacher, target, 1.0, doubt, 2.0)
    assert decoupled.item() == near(kd_loss(student, teacher, 2.0).item())


def test_dkd_takes_the_largest_soft_label_for_the_target() -> None:
    student, teacher, target = logits(), logits(), labels()
    soft = 0.6 * torch.nn.functional.one_hot(target, CLASSES) + 0.4 / CLASSES
    assert torch.equal(dkd_loss(student, teacher, soft), dkd_loss(student, teacher, target))


def test_dkd_of_two_classes_has_no_non_target_part() -> None:
    student, teacher, target = logits(classes=2), logits(classes=2), labels(2)
    assert dkd_loss(student, teacher, target, alpha=0.0, beta=8.0).item() == 0
    assert dkd_loss(student, teacher, target, alpha=1.0).item() == near(
        kd_loss(student, teacher).item()
    )


def test_equal_networks_have_nothing_to_distil() -> None:
    student, target = logits(), labels()
    assert kd_loss(student, student.clone()).item() == near(0.0)
    assert dkd_loss(student, student.clone(), target).item() == near(0.0)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda s, t, _: kd_loss(s, t),
    "dkd": lambda s, t, y: dkd_loss(s, t, y),
    "gap": lambda s, t, _: gap_loss(s, t),
    "soft_cross_entropy": lambda s, t, _: soft_cross_entropy(s, t.softmax(dim=1), 0.1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    student, teacher, target = logits(1.0).requires_grad_(), logits(1.0), labels()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher, target), (student,))


@pytest.mark.parametrize("name", LOSSES)
def test_student_is_pulled_towards_the_teacher(name: str) -> None:
    student, teacher, target = logits(1.0).requires_grad_(), logits(1.0), labels()
    before = LOSSES[name](student, teacher, target)
    (gradient,) = torch.autograd.grad(before, student)
    after = LOSSES[name](student.detach() - 0.01 * gradient, teacher, target)
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
    loss = LOSSES[name](student, logits(scale).to(dtype), labels())
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_certain_networks_that_disagree_give_finite_loss_and_gradient(name: str) -> None:
    student = (1e3 * torch.eye(CLASSES)).requires_grad_()
    loss = LOSSES[name](student, student.detach().roll(1, 0), torch.arange(CLASSES))
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_methods_are_made_by_name_and_settings() -> None:
    student, teacher, target = logits(), logits(), labels()
    kd = make_method("kd", {"temperature": 2.0})
    assert torch.equal(kd(student, teacher, target), kd_loss(student, teacher, 2.0))
    dkd = make_method("dkd", {"alpha": 0.5, "beta": 2.0, "temperature": 3.0})
    expected = dkd_loss(student, teacher, target, 0.5, 2.0, 3.0)
    assert torch.equal(dkd(student, teacher, target), expected)


def test_methods_default_to_the_published_settings() -> None:
    assert make_method("kd") == KD(temperature=4.0)
    assert make_method("dkd") == DKD(alpha=1.0, beta=0.5, temperature=1.0)


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("crd", None, "crd"),
        ("kd", {"tau": 2.0}, "tau"),
        ("dkd", {"temperature": 2.0, "gamma": 1.0}, "gamma"),
    ],
)
def test_unknown_methods_and_settings_are_named(
    name: str, settings: dict[str, float] | None, named: str
) -> None:
    with pytest.raises(GpdError, match=named):
        make_method(name, settings)


@pytest.mark.parametrize("name", ["kd", "dkd"])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_has_to_be_positive(name: str, temperature: float) -> None:
    with pytest.raises(GpdError, match="temperature"):
        make_method(name, {"temperature": temperature})


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_objective_has_the_terms_that_apply(dynamic: bool, static: bool) -> None:
    objective = Objective(method=KD())
    terms = objective.terms(
        logits(), logits() if dynamic else None, logits() if static else None, labels()
    )
    expected = {"student_ce"}
    if dynamic:
        expected |= {"teacher_ce", "gap"}
    if static:
        expected |= {"student_static"}
    if dynamic and static:
        expected |= {"teacher_static"}
    assert set(terms) == expected
    assert all(term.shape == () for term in terms.values())


def test_objective_weights_its_terms() -> None:
    student, dynamic, static, target = logits(), logits(), logits(), labels()
    objective = Objective(
        gap_weight=2.5, gap_smoothing=0.2, static_weight=0.7, method=KD(2.0), label_smoothing=0.1
    )
    terms = objective.terms(student, dynamic, static, target)
    hard = torch.nn.functional.one_hot(target, CLASSES).double().tolist()
    soft = [probabilities(row) for row in dynamic.tolist()]
    assert terms["student_ce"].item() == near(reference_ce(student, hard, 0.1))
    assert terms["teacher_ce"].item() == near(reference_ce(dynamic, hard, 0.1))
    assert terms["student_static"].item() == near(0.7 * reference_kd(student, static, 2.0))
    assert terms["teacher_static"].item() == near(0.7 * reference_kd(dynamic, static, 2.0))
    assert terms["gap"].item() == near(2.5 * reference_ce(student, soft, 0.2))


def test_objective_defaults_to_the_papers_weights() -> None:
    student, dynamic, target = logits(), logits(), labels()
    terms = Objective().terms(student, dynamic, None, target)
    soft = [probabilities(row) for row in dynamic.tolist()]
    assert terms["gap"].item() == near(3.0 * reference_ce(student, soft, 0.1))


def test_objective_without_gap_weight_trains_the_two_apart() -> None:
    student, dynamic = logits().requires_grad_(), logits().requires_grad_()
    terms = Objective(gap_weight=0.0).terms(student, dynamic, None, labels())
    assert set(terms) == {"student_ce", "teacher_ce"}


def test_dynamic_teacher_learns_from_labels_and_static_teacher_only() -> None:
    student, dynamic, static, target = logits(), logits().requires_grad_(), logits(), labels()
    terms = Objective(method=KD()).terms(student, dynamic, static, target)
    (everything,) = torch.autograd.grad(sum(terms.values()), dynamic, retain_graph=True)
    own = terms["teacher_ce"] + terms["teacher_static"]
    assert torch.equal(everything, torch.autograd.grad(own, dynamic)[0])


def test_objective_takes_the_soft_labels_of_mixup() -> None:
    student, dynamic, soft = logits(), logits(), logits().softmax(dim=1)
    terms = Objective().terms(student, dynamic, None, soft)
    assert terms["student_ce"].item() == near(reference_ce(student, soft.tolist(), 0.0))
