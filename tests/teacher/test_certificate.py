"""What the certificate catches: teachers that are wrong, or do not run, somewhere."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.errors import ExpansionError
from gpd_cli.teacher.certification import certify
from gpd_cli.teacher.expansion import expand
from gpd_cli.teacher.networks import summary
from gpd_cli.teacher.pair import Pair
from gpd_cli.widening.plan import WidthPlan

SAMPLE = torch.zeros(2, 3, 16, 16)


class Student(nn.Module):
    """A student whose forward does something more in train mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.head, self.width = nn.Linear(width, 5), width

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.a(x)))
        return self.head(F.relu(self.b(x)).mean((2, 3)))


class Counts(Student):
    def between(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.width, *x.shape[2:]) if self.training else x


class Mixes(Student):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def between(self, x: Tensor) -> Tensor:
        return self.drop(x + x.sum(1, keepdim=True)) if self.training else x


class Drops(Student):
    def between(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), self.width, 1, 1) > 0.1) if self.training else x


class Chaotic(Student):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x))).sigmoid()
        for _ in range(18):  # each doubles what differs
            x = 4 * x * (1 - x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Student, "cannot be expanded exactly"), (Chaotic, "cannot be told from rounding, since")],
)
def test_a_student_that_amplifies_rounding_is_told_apart(
    kind: type[Student], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chaos that the certificate sees is mostly found by the search before it.
    monkeypatch.setattr("gpd_cli.teacher.certification.TOLERANCE", -1.0)
    with pytest.raises(ExpansionError, match=reason):
        expand(kind(), sample=SAMPLE, branches=1)


@pytest.mark.parametrize("kind", [Counts, Mixes, Drops])
def test_what_happens_in_train_mode_only_is_certified_too(kind: type[Student]) -> None:
    with pytest.raises(ExpansionError, match="train mode"):
        expand(kind(), sample=SAMPLE, branches=1)


@pytest.mark.parametrize("storage", ["mixed", "student", "teacher"])
@pytest.mark.parametrize("ratio", [2, 3])
def test_the_teacher_is_certified_in_the_type_in_which_it_is_kept(
    storage: str, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student()
    options = {"sample": SAMPLE, "branches": 2, "ratio": ratio, "storage": storage}
    pair = expand(student, **options)
    assert pair.certificate.difference < 1e-12
    assert {p.dtype for p in pair.parameters()} == {torch.float32}

    def noise(wide: Tensor, *args: object) -> None:
        wide += 1e-5 * torch.randn(wide.shape, dtype=wide.dtype)

    monkeypatch.setattr("gpd_cli.widening.tensors.add_zero_sum_noise_", noise)
    with pytest.raises(ExpansionError, match=r"b\.\S+ is not an expansion of the student's"):
        expand(student, **options)


class Alone(Mixes):
    """Gives no numbers in train mode for an image alone."""

    def between(self, x: Tensor) -> Tensor:
        return super().between(x) / (x.std(0) * 0 + 1) if self.training else x


class Many(Mixes):
    """Runs in train mode on batches of 16 images or more."""

    def between(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 16:
            raise ValueError("too few images")
        return super().between(x)


class Noisy(Student):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), 1, 1, 1) if self.training else x


class Several(Student):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


def test_the_difference_in_train_mode_is_that_of_a_batch_with_numbers() -> None:
    with pytest.raises(ExpansionError, match="In train mode"):
        expand(Alone(), sample=SAMPLE, branches=1)
    pair = expand(Student(), sample=SAMPLE, branches=1)
    assert 0 <= pair.certificate.in_training < 1e-12
    assert "train mode" not in summary("student", pair)


@pytest.mark.parametrize("kind", [Many, Noisy, Several])
def test_it_is_said_that_train_mode_was_not_compared(kind: type[Student]) -> None:
    pair = expand(kind(), sample=SAMPLE, branches=1)
    assert pair.certificate.in_training is None
    assert "not compared in train mode" in summary("student", pair)


def test_an_error_of_gpd_in_train_mode_is_no_lack_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = Pair._weight

    def broken(self: Pair, *args: object, **kwargs: object) -> Tensor:
        return 1 / 0 if self.training else weight(self, *args, **kwargs)

    monkeypatch.setattr(Pair, "_weight", broken)
    with pytest.raises(ZeroDivisionError):
        expand(Student(), sample=SAMPLE, branches=1)


class Cosine(nn.Linear):
    """A classifier by angles, which depend on the length of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


def test_a_layer_that_takes_no_noise_is_told_so() -> None:
    student = Student()
    student.head = Cosine(8, 5)
    with pytest.raises(ExpansionError, match=r"exactly, except with noise 0.*without_noise\.$"):
        expand(student, sample=SAMPLE, ratio=3)
    assert expand(student, sample=SAMPLE, ratio=3, without_noise=["head"]).certificate is not None


def test_broken_weights_are_told_from_an_expansion_that_fails() -> None:
    student = Student()
    with torch.no_grad():
        student.b.weight[0] = torch.nan
    with pytest.raises(ExpansionError, match="Student gives NaN or infinite logits"):
        expand(student, sample=SAMPLE)


def test_a_pair_made_in_inference_mode_can_be_trained() -> None:
    student = Student()
    with torch.inference_mode():
        pair = expand(student, sample=SAMPLE)
    pair(torch.randn(2, 3, 16, 16))[0].sum().backward()
    assert all(weight.grad is not None for weight in pair.parameters())


def test_the_certificate_leaves_no_trace() -> None:
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Student(8).b)
    student = nn.Sequential(*student, nn.Flatten(), nn.Linear(8 * 12 * 12, 4))
    pair = expand(student, sample=SAMPLE, branches=2)
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    certify(pair, SAMPLE)
    after = pair.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {t.dtype for t in after.values()} == {torch.float32, torch.int64}


def test_dropout_alone_is_no_reason_to_refuse() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    pair = expand(student, sample=SAMPLE, branches=1)
    assert [m.p for m in pair.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


class Large(Student):
    """Runs one of its layers on large images only."""

    def between(self, x: Tensor) -> Tensor:
        return self.more(x) if x.shape[-1] > 100 else x

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(8, 8, 1)


def test_layers_of_large_images_are_found_at_the_second_try() -> None:
    pair = expand(Large(), sample=torch.zeros(2, 3, 136, 136), branches=1)
    assert pair.teacher.more.out_channels == 16


class Keeps(Student):
    """Keeps activations, as networks do for auxiliary losses."""

    def __init__(self, keep: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.keep = keep

    def between(self, x: Tensor) -> Tensor:
        self.kept = self.keep(x)
        return x


@pytest.mark.parametrize(
    "keep", [lambda x: x, lambda x: [x, (2 * x, None)], lambda x: {"inner": [x]}]
)
def test_a_student_that_keeps_its_activations(keep: Callable[[Tensor], object]) -> None:
    student = Keeps(keep)
    student(torch.randn(SAMPLE.shape)).sum().backward()
    pair = expand(student, sample=SAMPLE, branches=1)
    images = torch.randn(SAMPLE.shape)
    torch.stack([logits.sum() for logits in pair(images)]).sum().backward()
    extracted = pair.eval().extract()
    assert torch.equal(extracted(images), pair.student(images))


class Splits(Student):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 4]

    def between(self, x: Tensor) -> Tensor:
        first, second, _ = torch.split(x, self.sizes + [0], 1)  # noqa: RUF005 - lists alone add
        return torch.cat([first, second], 1)


def test_lists_are_still_lists_when_a_plan_was_read_from_a_file() -> None:
    student = Splits()
    plan = expand(student, sample=SAMPLE, branches=1).plan
    read = WidthPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert expand(student, sample=SAMPLE, branches=1, plan=read).teacher.sizes == [8, 8]


def test_a_plan_whose_teacher_does_not_run_is_refused() -> None:
    student = Splits()
    plan = expand(student, sample=SAMPLE, branches=1).plan
    plan.attributes.clear()
    with pytest.raises(ExpansionError, match="does not run"):
        expand(student, sample=SAMPLE, branches=1, plan=plan)


class Counted(Student):
    """Has a parameter of integers, which take no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(8), requires_grad=False)

    def between(self, x: Tensor) -> Tensor:
        return x + x.mean()


def test_a_parameter_of_integers() -> None:
    assert expand(Counted(), sample=SAMPLE, branches=1).certificate.difference < 1e-9


def test_a_registry_of_subclasses_is_left_alone() -> None:
    known: dict[str, type] = {}

    class Registered(Student):
        def __init_subclass__(cls) -> None:
            assert known.setdefault(cls.__name__, cls) is cls, f"{cls} is registered twice"

    class Mine(Registered):
        pass

    assert expand(Mine(), sample=SAMPLE, branches=1).certificate.difference < 1e-9
    assert known == {"Mine": Mine}
