"""Methods on logits and embeddings against the published formulas, written again in loops."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods import Batch, Method
from gpd_cli.distill.methods.cc import CC, cc_loss, correlations, kernel_loss
from gpd_cli.distill.methods.crd import CRD, nce_loss, remember, similarities
from gpd_cli.distill.methods.dist import DIST, dist_loss, pearson
from gpd_cli.distill.methods.dkd import DKD, dkd_loss
from gpd_cli.distill.methods.embeddings import unit_vectors
from gpd_cli.distill.methods.kd import KD, kd_loss
from gpd_cli.distill.methods.mlld import MLLD, gram_loss, mlld_loss
from gpd_cli.distill.methods.nkd import NKD, nkd_loss
from gpd_cli.distill.methods.pkt import PKT, affinities, pkt_loss
from gpd_cli.distill.methods.rkd import RKD, rkd_loss
from gpd_cli.distill.methods.simkd import SimKD, mean_of_copies, simkd_loss
from gpd_cli.distill.methods.srrl import SRRL, srrl_loss
from gpd_cli.distill.methods.standardize import standardize_logits
from gpd_cli.errors import MethodError

Array = npt.NDArray[np.float64]

ROWS, CLASSES, WIDTH, WIDER, IMAGES = 5, 7, 4, 6, 20
NETWORK, TEACHER = FeatureInfo((), "fc", WIDTH), FeatureInfo((), "fc", WIDER)

METHODS: dict[str, Callable[[], Method]] = {
    "kd": KD,
    "kd_standardized": lambda: KD(standardize=True),
    "dkd": DKD,
    "dkd_standardized": lambda: DKD(standardize=True),
    "dist": DIST,
    "mlld": MLLD,
    "mlld_standardized": lambda: MLLD(standardize=True),
    "nkd": NKD,
    "rkd": RKD,
    "pkt": PKT,
    "cc": lambda: CC(feat_dim=3),
    "cc_kernel": lambda: CC(feat_dim=3, kernel=True),
    "cc_plain": lambda: CC(feat_dim=None, kernel=True),
    "srrl": SRRL,
    "simkd": SimKD,
    "crd": lambda: CRD(IMAGES, feat_dim=3, nce_k=9),
}
WITH_CONNECTOR = ["cc", "cc_kernel", "srrl", "crd"]
ON_EMBEDDINGS = ["rkd", "pkt", "cc", "srrl", "simkd", "crd"]


def logits(scale: float = 3.0, classes: int = CLASSES, rows: int = ROWS) -> Tensor:
    return scale * torch.randn(rows, classes, dtype=torch.float64)


def labels(classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (ROWS,))


def features(width: int = WIDTH, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64)


def teacher_places(name: str) -> FeatureInfo:
    return NETWORK if name == "simkd" else TEACHER


def built(name: str) -> Method:
    method = METHODS[name]()
    method.build(NETWORK, teacher_places(name))
    return method


def outputs(where: FeatureInfo, dtype: torch.dtype = torch.float64, grad: bool = False) -> Outputs:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    width = where.embedding
    return Outputs(make(ROWS, CLASSES), (), make(ROWS, width), make(CLASSES, width), make(CLASSES))


def a_batch() -> Batch:
    return Batch(labels(), torch.randperm(IMAGES)[:ROWS])


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-10, abs=1e-10)


# ---- the formulas again ----


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


def reference_standardized(values: Tensor) -> Tensor:
    rows = []
    for row in values.tolist():
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
        rows.append([(v - mean) / max(deviation, 1e-4) for v in row])
    return torch.tensor(rows, dtype=torch.float64)


def correlation(one: Any, other: Any) -> float:
    """Pearson's, as covariance over the product of deviations."""
    mean_one, mean_other = sum(one) / len(one), sum(other) / len(other)
    covariance = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    norms = (
        math.sqrt(sum((a - mean_one) ** 2 for a in one)),
        math.sqrt(sum((b - mean_other) ** 2 for b in other)),
    )
    return float(covariance / (max(norms[0], 1e-4) * max(norms[1], 1e-4)))


def softened(values: Tensor, temperature: float = 1.0) -> Array:
    return np.array([probabilities(row, temperature) for row in values.tolist()])


def reference_dist(
    student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float
) -> float:
    p, q = softened(student, temperature), softened(teacher, temperature)
    inter = 1 - sum(correlation(a, b) for a, b in zip(p, q, strict=True)) / len(p)
    intra = 1 - sum(correlation(a, b) for a, b in zip(p.T, q.T, strict=True)) / p.shape[1]
    return temperature**2 * (beta * inter + gamma * intra)


def reference_mlld(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, ...], *weights: float
) -> float:
    total = 0.0
    for temperature in temperatures:
        p, q = softened(student, temperature), softened(teacher, temperature)
        rows, classes = p.shape
        batch = sum(
            (float(p[i] @ p[j]) - float(q[i] @ q[j])) ** 2 for i in range(rows) for j in range(rows)
        )
        of_classes = sum(
            (float(p[:, i] @ p[:, j]) - float(q[:, i] @ q[:, j])) ** 2
            for i in range(classes)
            for j in range(classes)
        )
        levels = (reference_kd(student, teacher, temperature), batch / rows, of_classes / classes)
        total += sum(weight * level for weight, level in zip(weights, levels, strict=True))
    return total


def reference_nkd(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float
) -> float:
    total = 0.0
    for s, t, k in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        total -= probabilities(t)[k] * math.log(probabilities(s)[k])
        p = probabilities(t, temperature)
        q = probabilities(s, temperature)
        for i in range(len(p)):
            if i != k:
                share, ours = p[i] / (1 - p[k]), q[i] / (1 - q[k])
                total -= gamma * temperature**2 * share * math.log(ours)
    return total / len(student)


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def reference_rkd(student: Array, teacher: Array, distance: float, angle: float) -> float:
    def distances(x: Array) -> Array:
        found = np.array([[math.dist(a, b) for b in x] for a in x])
        return found / found[found > 0].mean()

    def cosine(x: Array, i: int, j: int, k: int) -> float:
        one, other = x[j] - x[i], x[k] - x[i]
        length = math.hypot(*one) * math.hypot(*other)
        return float(one @ other) / length if length else 0.0

    count = range(len(student))
    ours, theirs = distances(student), distances(teacher)
    pairs = [huber(ours[i, j] - theirs[i, j]) for i in count for j in count]
    triples = [
        huber(cosine(student, *ijk) - cosine(teacher, *ijk))
        for ijk in itertools.product(count, repeat=3)
    ]
    return distance * float(np.mean(pairs)) + angle * float(np.mean(triples))


def cosine(a: Array, b: Array) -> float:
    return float(a @ b) / (math.hypot(*a) * math.hypot(*b))


def reference_pkt(student: Array, teacher: Array) -> float:
    def conditional(x: Array) -> Array:
        kernel = np.array([[(cosine(a, b) + 1) / 2 for b in x] for a in x])
        return np.array([row / sum(row) for row in kernel])

    p, q = conditional(teacher).ravel(), conditional(student).ravel()
    terms = [a * math.log((a + 1e-7) / (b + 1e-7)) for a, b in zip(p, q, strict=True)]
    return sum(terms) / len(terms)


def reference_cc(student: Array, teacher: Array) -> float:
    total = 0.0
    for i in range(len(student) - 1):
        for f in range(student.shape[1]):
            here, next_one = (abs(student[k, f] - teacher[k, f]) for k in (i, i + 1))
            total += here * next_one
    return total / (len(student) - 1)


def reference_kernel(student: Array, teacher: Array, gamma: float, order: int) -> float:
    def kernel(a: Array, b: Array) -> float:
        x = cosine(a, b)
        return sum(
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * x**p
            for p in range(order + 1)
        )

    count = range(len(student))
    return (
        sum(
            (kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2
            for i in count
            for j in count
        )
        / len(student) ** 2
    )


def reference_nce(estimates: Array, num_images: int) -> float:
    """Of estimated probabilities, the pair that belongs together in the first column."""
    draws = estimates.shape[1] - 1
    total = 0.0
    for row in estimates:
        total -= math.log(row[0] / (row[0] + draws / num_images))
        for p in row[1:]:
            total -= math.log(draws / num_images / (p + draws / num_images))
    return total / len(estimates)


# ---- KD and DKD ----

# The stored tensors are 3 sin(0.7 (1 + 7 b + c)) for the student and 3 sin(1.3 (1 + 7 b + c)) for
# the teacher, with b from 0 to 4 and c from 0 to 6, and the target classes 0, 2, 4, 6, 1. The
# stored values were computed from equation 7 of Zhao et al. and from T^2 KL(teacher || student)
# with Python's floats and math.fsum, and those of KD again with 40 digits.


def stored(step: float) -> Tensor:
    return 3 * torch.sin(step * torch.arange(1, 36, dtype=torch.float64)).view(5, 7)


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 2.321032058), (4.0, 3.922372825)])
def test_kd_of_stored_tensors(temperature: float, value: float) -> None:
    assert kd_loss(stored(0.7), stored(1.3), temperature).item() == pytest.approx(value, abs=1e-8)
    single = kd_loss(stored(0.7).float(), stored(1.3).float(), temperature)
    assert single.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ((1.0, 8.0, 4.0), 32.266362537),
        ((1.0, 0.5, 1.0), 1.597890459),
        ((1.0, 2.0, 1.0), 5.591839795),
    ],
)
def test_dkd_of_stored_tensors(settings: tuple[float, float, float], value: float) -> None:
    target = torch.tensor([0, 2, 4, 6, 1])
    loss = dkd_loss(stored(0.7), stored(1.3), target, *settings)
    assert loss.item() == pytest.approx(value, abs=1e-8)
    single = dkd_loss(stored(0.7).float(), stored(1.3).float(), target, *settings)
    assert single.item() == pytest.approx(value, rel=1e-6)


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


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_the_largest_soft_label_is_the_target(name: str) -> None:
    method, ours, theirs, target = built(name), outputs(NETWORK), outputs(TEACHER), labels()
    soft = 0.6 * F.one_hot(target, CLASSES) + 0.4 / CLASSES
    assert torch.equal(method(ours, theirs, Batch(soft)), method(ours, theirs, Batch(target)))


def test_dkd_of_two_classes_has_no_non_target_part() -> None:
    student, teacher, target = logits(classes=2), logits(classes=2), labels(2)
    assert dkd_loss(student, teacher, target, alpha=0.0, beta=8.0, temperature=4.0).item() == 0
    loss = dkd_loss(student, teacher, target, alpha=1.0, beta=8.0, temperature=4.0)
    assert loss.item() == near(kd_loss(student, teacher, 4.0).item())


# ---- methods on logits ----


def test_standardized_methods_are_methods_of_standardized_logits() -> None:
    ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
    student, teacher = (reference_standardized(o.logits) for o in (ours, theirs))
    assert KD(2.0, standardize=True)(ours, theirs, batch).item() == near(
        reference_kd(student, teacher, 2.0)
    )
    assert DKD(1.0, 8.0, 2.0, standardize=True)(ours, theirs, batch).item() == near(
        reference_dkd(student, teacher, batch.labels, 1.0, 8.0, 2.0)
    )
    instance = MLLD([2.0, 3.0], batch_weight=0.0, class_weight=0.0, standardize=True)
    assert instance(ours, theirs, batch).item() == near(
        reference_kd(student, teacher, 2.0) + reference_kd(student, teacher, 3.0)
    )
    others = MLLD([2.0], instance_weight=0.0, standardize=True)
    assert others(ours, theirs, batch).item() == near(
        reference_mlld(ours.logits, theirs.logits, (2.0,), 0.0, 1.0, 1.0)
    )


def test_standardizing_takes_scale_and_shift_away() -> None:
    student = logits()
    moved = standardize_logits(student * 5 + 3)
    torch.testing.assert_close(moved, standardize_logits(student), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.0, 1.0), (2.0, 2.0)])
def test_dist_is_the_written_formula(beta: float, gamma: float, temperature: float) -> None:
    student, teacher = logits(), logits()
    loss = dist_loss(student, teacher, beta, gamma, temperature)
    assert loss.shape == ()
    assert loss.item() == near(reference_dist(student, teacher, beta, gamma, temperature))


def test_correlation_does_not_see_scale_and_shift_of_a_row() -> None:
    one, other = features(), features()
    scale, shift = torch.rand(ROWS, 1) + 0.5, torch.randn(ROWS, 1)
    moved = pearson(one * scale + shift, other)
    torch.testing.assert_close(moved, pearson(one, other), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(pearson(-one, other), -pearson(one, other))


def test_dist_does_not_see_a_shift_of_the_logits() -> None:
    student, teacher = logits(), logits()
    moved = dist_loss(student + torch.randn(ROWS, 1), teacher + torch.randn(ROWS, 1))
    assert moved.item() == near(dist_loss(student, teacher).item())


def test_mlld_is_the_written_formula() -> None:
    student, teacher = logits(), logits()
    loss = mlld_loss(
        student, teacher, (2.0, 5.0), instance_weight=0.3, batch_weight=2.0, class_weight=3.0
    )
    assert loss.shape == ()
    assert loss.item() == near(reference_mlld(student, teacher, (2.0, 5.0), 0.3, 2.0, 3.0))
    published = reference_mlld(student, teacher, (2.0, 3.0, 4.0, 5.0, 6.0), 1.0, 1.0, 1.0)
    assert mlld_loss(student, teacher).item() == near(published)


def test_gram_matrices_do_not_see_a_turn() -> None:
    one = features()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    assert gram_loss(one @ turn, one).item() == near(0.0)


@pytest.mark.parametrize(("gamma", "temperature"), [(0.0, 1.0), (1.5, 1.0), (1.5, 3.0)])
def test_nkd_is_the_written_formula(gamma: float, temperature: float) -> None:
    student, teacher, target = logits(), logits(), labels()
    loss = nkd_loss(student, teacher, target, gamma, temperature)
    assert loss.shape == ()
    assert loss.item() == near(reference_nkd(student, teacher, target, gamma, temperature))


# ---- methods on embeddings ----


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 0.0), (0.0, 50.0), (25.0, 50.0)])
def test_rkd_is_the_written_formula(distance: float, angle: float) -> None:
    student, teacher = 2 * features(), features(WIDER)
    loss = rkd_loss(student, teacher, distance, angle)
    assert loss.shape == ()
    assert loss.item() == near(reference_rkd(student.numpy(), teacher.numpy(), distance, angle))


def test_rkd_does_not_see_turns_shifts_and_scale() -> None:
    teacher = features()
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    assert rkd_loss(3 * teacher @ turn + 1, teacher).item() == near(0.0)


def test_pkt_is_the_written_formula() -> None:
    student, teacher = features(), features(WIDER)
    loss = pkt_loss(student, teacher)
    assert loss.shape == ()
    assert loss.item() == near(reference_pkt(student.numpy(), teacher.numpy()))
    torch.testing.assert_close(affinities(student).sum(dim=1), torch.ones(ROWS).double())


@pytest.mark.parametrize("loss", [pkt_loss, kernel_loss])
def test_cosines_do_not_see_lengths(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = features(), features(WIDER)
    scaled = student * (torch.rand(ROWS, 1) + 0.5)
    assert loss(scaled, teacher).item() == near(loss(student, teacher).item())


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.7, 1), (0.4, 4)])
def test_kernel_loss_is_the_written_formula(gamma: float, order: int) -> None:
    student, teacher = features(), features(WIDER)
    loss = kernel_loss(student, teacher, gamma, order)
    assert loss.shape == ()
    assert loss.item() == near(reference_kernel(student.numpy(), teacher.numpy(), gamma, order))


def test_cc_is_the_written_formula() -> None:
    student, teacher = features(), features()
    loss = cc_loss(student, teacher)
    assert loss.shape == ()
    assert loss.item() == near(reference_cc(student.numpy(), teacher.numpy()))


def test_cc_by_hand_and_by_stored_value() -> None:
    # Distances (1, 2), (3, 4), (5, 0): (1 * 3 + 2 * 4 + 3 * 5 + 4 * 0) / 2 neighbours.
    student = torch.tensor([[1.0, -2.0], [-3.0, 4.0], [5.0, 0.0]])
    assert cc_loss(student, torch.zeros(3, 2)).item() == 13.0
    assert cc_loss(student[:1], torch.zeros(1, 2)).item() == 0.0  # no neighbours
    # What the code of Tian et al. gives for sines, stored.
    sines = [torch.sin(step * torch.arange(1, 31.0).double()).view(5, 6) for step in (0.7, 0.3)]
    assert cc_loss(*sines).item() == pytest.approx(4.80175984, abs=1e-8)


def test_the_series_comes_to_the_gaussian_kernel() -> None:
    units = unit_vectors(features())
    kernel = torch.exp(-0.4 * (units[:, None] - units[None]).square().sum(dim=2))
    torch.testing.assert_close(correlations(units, 0.4, order=12), kernel)


@pytest.mark.parametrize("kernel", [False, True])
def test_cc_compares_what_its_layers_give(kernel: bool) -> None:
    method = built("cc_kernel" if kernel else "cc").double()
    ours, theirs = outputs(NETWORK), outputs(TEACHER)
    student, teacher = (
        o.embedding.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        for o, layer in ((ours, method.student_layer), (theirs, method.teacher_layer))
    )
    expected = 0.02 * reference_cc(student, teacher)
    if kernel:
        expected = 100 * reference_kernel(student, teacher, 0.4, 2)
    assert method(ours, theirs, a_batch()).item() == near(expected)


def test_cc_without_layers_compares_the_embeddings() -> None:
    ours, theirs = outputs(NETWORK), outputs(TEACHER)
    one, other = ours.embedding.numpy(), theirs.embedding.numpy()
    plain = built("cc_plain")(ours, theirs, a_batch())
    assert plain.item() == near(100 * reference_kernel(one, other, 0.4, 2))
    alike = CC(feat_dim=None, weight=2.0)
    with pytest.raises(MethodError, match="feat_dim"):
        alike.build(NETWORK, TEACHER)
    alike.build(NETWORK, NETWORK)
    twin = outputs(NETWORK)
    expected = 2 * reference_cc(one, twin.embedding.numpy())
    assert alike(ours, twin, a_batch()).item() == near(expected)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_srrl_is_the_written_formula(relu: bool, biased: bool) -> None:
    method = SRRL(relu, feature_weight=2.0, softmax_weight=0.3).double()
    method.build(NETWORK, TEACHER)
    method.double()
    ours, theirs = outputs(NETWORK), outputs(TEACHER)
    if not biased:
        theirs = Outputs(theirs.logits, (), theirs.embedding, theirs.weight)
    linear = method.connector[0].weight.detach().numpy()
    x = ours.embedding.numpy() @ linear.T
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    x = np.maximum(x, 0) if relu else x
    seen = x @ theirs.weight.numpy().T + (theirs.bias.numpy() if biased else 0)
    expected = 2.0 * ((x - theirs.embedding.numpy()) ** 2).mean()
    expected += 0.3 * ((seen - theirs.logits.numpy()) ** 2).mean()
    assert method(ours, theirs, a_batch()).item() == near(expected)


def test_srrl_of_the_teachers_own_embedding_is_nothing() -> None:
    theirs = outputs(TEACHER)
    seen = F.linear(theirs.embedding, theirs.weight, theirs.bias)
    loss = srrl_loss(theirs.embedding, theirs.embedding, theirs.weight, theirs.bias, seen)
    assert loss.item() == near(0.0)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_simkd_is_the_mean_squared_difference(ratio: int) -> None:
    student, teacher = features(ratio * WIDTH), features()
    narrow = [
        [sum(row[c * ratio : (c + 1) * ratio]) / ratio for c in range(WIDTH)]
        for row in student.tolist()
    ]
    squares = [
        (a - b) ** 2
        for one, other in zip(narrow, teacher.tolist(), strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    loss = simkd_loss(student, teacher)
    assert loss.shape == ()
    assert loss.item() == near(sum(squares) / len(squares))


def test_simkd_treats_copies_like_what_they_copy() -> None:
    student, teacher = features(), features()
    copies = student.repeat_interleave(2, dim=1)
    torch.testing.assert_close(mean_of_copies(copies, WIDTH), student)
    assert simkd_loss(copies, teacher).item() == near(simkd_loss(student, teacher).item())


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1, 2 * WIDTH - 1])
def test_simkd_names_its_students_where_widths_differ(width: int) -> None:
    with pytest.raises(MethodError, match="simkd/NAME"):
        SimKD().build(FeatureInfo((), "fc", width), NETWORK)


# ---- CRD ----


def test_similarities_are_products_with_the_entries_drawn() -> None:
    embedding, memory, drawn = features(), features(rows=IMAGES), torch.randint(IMAGES, (ROWS, 6))
    found = similarities(embedding, memory, drawn)
    for i, k in itertools.product(range(ROWS), range(6)):
        product = float(embedding[i] @ memory[int(drawn[i, k])])
        assert found[i, k].item() == near(product)


def test_nce_is_the_written_formula() -> None:
    scores = torch.randn(ROWS, 10, dtype=torch.float64) - 3
    loss = nce_loss(scores, IMAGES)
    assert loss.shape == ()
    assert loss.item() == near(reference_nce(np.exp(scores.numpy()), IMAGES))


def test_crd_is_the_written_formula_at_the_first_and_the_second_step() -> None:
    torch.manual_seed(3)
    method = CRD(IMAGES, feat_dim=3, nce_k=9, nce_t=0.1, momentum=0.25)
    method.build(NETWORK, TEACHER)
    method.double()
    layers = (method.student_layer, method.teacher_layer)
    memories = [m.clone().numpy() for m in (method.student_memory, method.teacher_memory)]
    norms: list[float] = []
    for step in range(2):
        ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
        torch.manual_seed(step)
        loss = method(ours, theirs, batch)
        torch.manual_seed(step)
        drawn = torch.randint(IMAGES, (ROWS, 9)).numpy()
        indices = batch.indices.numpy()
        drawn = np.concatenate([indices[:, None], drawn], axis=1)
        units = []
        for output, layer in zip((ours, theirs), layers, strict=True):
            x = layer(output.embedding).detach().numpy()
            units.append(np.array([row / math.hypot(*row) for row in x]))
        scores = [
            np.array(
                [
                    [math.exp(float(unit[i] @ memory[d]) / 0.1) for d in drawn[i]]
                    for i in range(ROWS)
                ]
            )
            for unit, memory in zip(units, memories[::-1], strict=True)
        ]
        norms = norms or [float(score.mean()) * IMAGES for score in scores]
        expected = sum(
            reference_nce(score / norm, IMAGES) for score, norm in zip(scores, norms, strict=True)
        )
        assert loss.item() == near(0.8 * expected)
        for unit, memory in zip(units, memories, strict=True):
            for i, index in enumerate(indices):
                moved = 0.25 * memory[index] + 0.75 * unit[i]
                memory[index] = moved / math.hypot(*moved)
        np.testing.assert_allclose(method.student_memory.numpy(), memories[0], atol=1e-12)
        np.testing.assert_allclose(method.teacher_memory.numpy(), memories[1], atol=1e-12)


def test_crd_draws_again_what_it_drew() -> None:
    method, ours, theirs, batch = built("crd"), outputs(NETWORK), outputs(TEACHER), a_batch()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(copy.deepcopy(method)(ours, theirs, batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_crd_remembers_nothing_in_eval_mode() -> None:
    method = built("crd").eval()
    before = method.student_memory.clone()
    method(outputs(NETWORK), outputs(TEACHER), a_batch())
    assert torch.equal(method.student_memory, before)


def test_the_last_of_equal_images_is_remembered() -> None:
    memory, embedding = unit_vectors(features(rows=IMAGES)), unit_vectors(features())
    once = memory.clone()
    remember(memory, torch.tensor([7, 3, 7, 2, 3]), embedding)
    remember(once, torch.tensor([7, 2, 3]), embedding[2:])
    torch.testing.assert_close(memory, once)


def test_crd_takes_no_broken_embedding_into_its_memory() -> None:
    method = built("crd")
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    batch, ours, theirs = a_batch(), outputs(NETWORK), outputs(TEACHER)
    broken = replace(ours, embedding=ours.embedding.clone())
    broken.embedding[1] = math.nan
    broken.embedding[2] = math.inf
    assert not math.isfinite(method(broken, theirs, batch).item())
    assert not method.normed and not method.log_norms.any()
    moved = (method.student_memory != before["student_memory"]).any(dim=1).nonzero().flatten()
    assert set(moved.tolist()) == set(batch.indices.tolist()) - set(batch.indices[1:3].tolist())
    # The norms are those of the first sound batch.
    assert math.isfinite(method(ours, theirs, batch).item())
    assert method.normed and torch.isfinite(method.log_norms).all() and method.log_norms.all()
    assert all(torch.isfinite(buffer).all() for buffer in method.buffers())


def test_crd_goes_on_where_it_was() -> None:
    method = built("crd")
    method(outputs(NETWORK), outputs(TEACHER), a_batch())
    other = built("crd")
    other.load_state_dict(method.state_dict())
    ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
    losses = []
    for one in (method, other):
        torch.manual_seed(5)
        losses.append(one(ours, theirs, batch).item())
    assert losses[0] == losses[1]


def test_crd_draws_fewer_negatives_than_there_are_images() -> None:
    assert CRD(100).nce_k == 99
    assert CRD(50000).nce_k == 16384


def test_crd_needs_the_number_of_images_and_their_indices() -> None:
    with pytest.raises(MethodError, match="num_images"):
        CRD()
    with pytest.raises(MethodError, match="index of every"):
        built("crd")(outputs(NETWORK), outputs(TEACHER), Batch(labels()))
    assert CRD(IMAGES).num_images == IMAGES
    assert CRD.one_label


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    method = torch.nn.parallel.DistributedDataParallel(built("crd").double())
    ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
    for _ in range(2):
        half = slice(rank, None, 2) if rank else slice(0, 4, 2)
        part = [Outputs(o.logits[half], (), o.embedding[half]) for o in (ours, theirs)]
        method(*part, Batch(batch.labels[half], batch.indices[half])).backward()
    torch.save(method.module.state_dict(), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_keep_one_memory(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    torch.manual_seed(0)
    alone = built("crd").double()
    ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
    part = [Outputs(o.logits[:4], (), o.embedding[:4]) for o in (ours, theirs)]
    for _ in range(2):
        alone(*part, Batch(batch.labels[:4], batch.indices[:4]))
    torch.testing.assert_close(first["student_memory"], alone.student_memory)
    torch.testing.assert_close(first["teacher_memory"], alone.teacher_memory)


# ---- what holds for every method ----


@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    method = built(name).double()
    method(outputs(NETWORK), outputs(teacher_places(name)), a_batch())
    # In eval mode a step leaves nothing behind; batch norm then has the statistics of the above.
    method.eval()
    ours, theirs, batch = outputs(NETWORK, grad=True), outputs(teacher_places(name)), a_batch()

    def loss(student: Tensor, embedding: Tensor) -> Tensor:
        torch.manual_seed(0)
        return method(Outputs(student, (), embedding), theirs, batch)

    assert torch.autograd.gradcheck(loss, (ours.logits, ours.embedding), fast_mode=True)


@pytest.mark.parametrize("name", METHODS)
def test_student_is_pulled_towards_the_teacher(name: str) -> None:
    method = built(name).double().eval()
    ours, theirs, batch = outputs(NETWORK, grad=True), outputs(teacher_places(name)), a_batch()

    def loss(outputs: Outputs) -> Tensor:
        torch.manual_seed(0)
        return method(outputs, theirs, batch)

    before = loss(ours)
    inputs = [ours.logits, ours.embedding]
    gradients = torch.autograd.grad(before, inputs, allow_unused=True, materialize_grads=True)
    size = 1e-3 / torch.cat([g.flatten() for g in gradients]).norm()
    moved = [x.detach() - size * g for x, g in zip(inputs, gradients, strict=True)]
    assert loss(Outputs(moved[0], (), moved[1])) < before


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_reaches_the_static_teacher(name: str) -> None:
    method = built(name)
    ours = outputs(NETWORK, torch.float32, grad=True)
    theirs = outputs(teacher_places(name), torch.float32, grad=True).detach()
    method(ours, theirs, a_batch()).backward()
    used = ours.embedding if "embedding" in method.needs else ours.logits
    assert used.grad is not None and used.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())
    assert not any(t.requires_grad for t in (theirs.logits, theirs.embedding, theirs.weight))


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_is_on_its_own(name: str) -> None:
    method = built(name)
    ours, theirs = outputs(NETWORK), outputs(teacher_places(name))
    method(ours, theirs, a_batch())
    other = copy.deepcopy(method)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    method(ours, theirs, a_batch())
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert torch.isfinite(other(ours, theirs, a_batch()))


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision_gives_a_float32_loss_near_that_of_float32(name: str) -> None:
    method = built(name)
    ours = outputs(NETWORK, torch.float32, grad=True)
    theirs = outputs(teacher_places(name), torch.float32)
    batch = a_batch()
    exact = copy.deepcopy(method)
    torch.manual_seed(0)
    expected = exact(ours, theirs, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        loss = method(ours, theirs, batch)
    assert loss.dtype == torch.float32
    tolerance = 0.05 if name in WITH_CONNECTOR else 1e-6
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    loss.backward()
    used = ours.embedding if "embedding" in method.needs else ours.logits
    assert torch.isfinite(used.grad).all()


@pytest.mark.parametrize("name", WITH_CONNECTOR)
def test_connectors_of_half_precision_run(name: str) -> None:
    method = built(name).bfloat16()
    loss = method(
        outputs(NETWORK, torch.float32), outputs(teacher_places(name), torch.float32), a_batch()
    )
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", METHODS)
def test_double_precision_is_kept(name: str) -> None:
    method = built(name).double()
    loss = method(outputs(NETWORK), outputs(teacher_places(name)), a_batch())
    assert loss.dtype == torch.float64
    assert loss.shape == ()


HARD: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "all equal": lambda x: x[:1].expand_as(x).clone(),
    "two equal": lambda x: torch.cat([x[:1], x[:-1]]),
    "one image": lambda x: x[:1],
    "large": lambda x: 1e3 * x,
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_stay_finite_where_formulas_divide_by_zero(name: str, case: str) -> None:
    if name == "srrl" and case == "one image":
        pytest.skip("batch norm needs two images")
    method = built(name)
    ours, theirs = outputs(NETWORK, torch.float32), outputs(teacher_places(name), torch.float32)
    batch, change = a_batch(), HARD[case]
    student = [change(t).requires_grad_() for t in (ours.logits, ours.embedding)]
    rows = len(student[0])
    teacher = Outputs(theirs.logits[:rows], (), theirs.embedding[:rows], theirs.weight, theirs.bias)
    loss = method(
        Outputs(student[0], (), student[1]),
        teacher,
        Batch(batch.labels[:rows], batch.indices[:rows]),
    )
    assert torch.isfinite(loss)
    loss.backward()
    gradient = student["embedding" in method.needs].grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() < 1e5


@pytest.mark.parametrize(
    "name", ["kd", "dkd", "dist", "mlld", "kd_standardized", "dkd_standardized"]
)
def test_equal_logits_leave_nothing_to_distil(name: str) -> None:
    ours = outputs(NETWORK)
    loss = built(name)(ours, ours, a_batch())
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["rkd", "pkt", "cc_plain", "simkd"])
def test_equal_embeddings_leave_nothing_to_distil(name: str) -> None:
    ours = outputs(NETWORK, grad=True)
    loss = built(name)(ours, ours.detach(), a_batch())
    assert loss.item() == pytest.approx(0.0, abs=1e-9)
    loss.backward()
    assert ours.embedding.grad.abs().max() < 1e-3  # PKT: 30000 times its 1e-7


def test_certain_networks_that_disagree_give_finite_loss_and_gradient() -> None:
    student = (1e3 * torch.eye(CLASSES)).requires_grad_()
    teacher, target = student.detach().roll(1, 0), torch.arange(CLASSES)
    for name in ("kd", "dkd", "nkd", "mlld", "dist"):
        loss = built(name)(Outputs(student), Outputs(teacher), Batch(target))
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss), name
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0])
def test_losses_of_half_precision_logits_stay_finite(scale: float, dtype: torch.dtype) -> None:
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "kd": lambda s, t, _: kd_loss(s, t),
        "dkd": partial(dkd_loss, alpha=1.0, beta=8.0, temperature=4.0),
        "nkd": nkd_loss,
        "dist": lambda s, t, _: dist_loss(s, t),
        "mlld": lambda s, t, _: mlld_loss(s, t),
    }
    student, teacher = logits(scale).to(dtype).requires_grad_(), logits(scale).to(dtype)
    for name, loss_of in losses.items():
        loss = loss_of(student, teacher, labels())
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss), name
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_networks_without_a_linear_classifier_are_refused(name: str) -> None:
    for one, other in ((FeatureInfo(), TEACHER), (NETWORK, FeatureInfo())):
        with pytest.raises(MethodError, match="linear classifier"):
            METHODS[name]().build(one, other)


# ---- settings ----


def test_settings_reach_the_losses() -> None:
    ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
    kd = KD(temperature=2.0)
    assert torch.equal(kd(ours, theirs, batch), kd_loss(ours.logits, theirs.logits, 2.0))
    dkd = DKD(alpha=0.5, beta=2.0, temperature=3.0)
    expected = dkd_loss(ours.logits, theirs.logits, batch.labels, 0.5, 2.0, 3.0)
    assert torch.equal(dkd(ours, theirs, batch), expected)
    mine = MLLD(temperatures=[3, 5])
    expected = mlld_loss(ours.logits, theirs.logits, (3.0, 5.0))
    assert torch.equal(mine(ours, theirs, batch), expected)


def test_methods_default_to_the_published_settings() -> None:
    ours, theirs, batch = outputs(NETWORK), outputs(TEACHER), a_batch()
    student, teacher, target = ours.logits, theirs.logits, batch.labels
    expected = {
        "kd": reference_kd(student, teacher, 4.0),
        "dkd": reference_dkd(student, teacher, target, 1.0, 0.5, 1.0),
        "dist": reference_dist(student, teacher, 2.0, 2.0, 1.0),
        "mlld": reference_mlld(student, teacher, (2.0, 3.0, 4.0, 5.0, 6.0), 1.0, 1.0, 1.0),
        "nkd": reference_nkd(student, teacher, target, 1.5, 1.0),
    }
    one, other = ours.embedding.numpy(), theirs.embedding.numpy()
    expected["rkd"] = reference_rkd(one, other, 25.0, 50.0)
    expected["pkt"] = 30000 * reference_pkt(one, other)
    for name, value in expected.items():
        assert built(name)(ours, theirs, batch).item() == near(value), name


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        *(
            (cls, {"temperature": t}, "temperature")
            for cls in (KD, DKD, DIST, NKD)
            for t in (0, -1)
        ),
        (MLLD, {"temperatures": []}, "temperature"),
        (MLLD, {"temperatures": [2.0, 0.0]}, "temperature"),
        (CC, {"feat_dim": 0}, "width"),
        (CC, {"gamma": 0.0}, "gamma"),
        (CC, {"order": 0}, "order"),
        (CRD, {"num_images": 1}, "num_images"),
        (CRD, {"num_images": 9, "nce_k": 0}, "nce_k"),
        (CRD, {"num_images": 9, "feat_dim": 0}, "feat_dim"),
        (CRD, {"num_images": 9, "nce_t": 0.0}, "temperature"),
        (CRD, {"num_images": 9, "momentum": 1.0}, "momentum"),
    ],
)
def test_settings_out_of_range_are_named(
    cls: type[Method], settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(MethodError, match=named):
        cls(**settings)
