"""How many runs of parts of a network a search makes in vain, and where it stops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.widening.mismatch import Mismatch
from gpd_cli.widening.search.find import find_plan
from gpd_cli.widening.search.trials import Trials
from gpd_cli.widening.search.widen import Widening

WIDTH = 6


def around(inside: nn.Module) -> nn.Sequential:
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), inside, pool, nn.Flatten(), nn.Linear(WIDTH, 3))


class Pairs(nn.Module):
    """Multiplies neighbours, which layers with their copies side by side do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH // 2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x[:, 0::2] * x[:, 1::2])


def test_runs_that_were_not_confirmed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    student, images = around(Pairs()), torch.zeros(2, 3, 8, 8)
    usual = find_plan(student, images, 2).trials
    assert usual > 0
    confirm, rejected = Widening._confirm, list[Widening]()

    def reject_once(self: Widening, images: Tensor) -> None:
        if not rejected:
            rejected.append(self)
            self._run.is_confirming = True
            raise Mismatch("0", "it is a test")
        confirm(self, images)

    monkeypatch.setattr(Widening, "_confirm", reject_once)
    assert find_plan(student, images, 2).trials == 2 * usual


class Large(nn.Module):
    """Code that cannot follow the copies on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.avg_pool2d(x, 8))
        if x.shape[-1] < 130:
            y = y * torch.linspace(1, 2, WIDTH).view(-1, 1, 1)
        return self.two(y.mean((2, 3)))


def test_trials_with_smaller_images_count() -> None:
    images = torch.zeros(2, 3, 136, 136)
    assert find_plan(Large(), images, 2, shrink=False).trials == 0
    assert find_plan(Large(), images, 2).trials > 0


def sums(x: Tensor) -> Tensor:
    """Sums that are exact only where copies lie in the blocks of the split, after a few trials."""
    return x.unflatten(1, (2, 2, 3)).cumsum(1).cumsum(2).cumsum(3).flatten(1, 3)


class Sums(nn.Module):
    """Code that trial widens, around further modules."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.inside = nn.Sequential(*inside)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.two(sums(self.one(x))))


class Fails(Sums):
    """Code that follows no copies, after that of other modules."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(1).sigmoid()


def nested(kind: type[Sums], depth: int, width: int) -> Sums:
    """Modules of as many classes, ``width`` of them in each of the next outer depth."""
    inside = [nested(kind, depth - 1, width) for _ in range(width if depth > 1 else 0)]
    return type(kind.__name__, (kind,), {})(*inside)


def test_classes_inside_classes_that_all_fail_are_not_tried_on_and_on() -> None:
    student = around(nn.Sequential(nested(Fails, 3, 3), nn.Conv2d(WIDTH, WIDTH, 1)))
    plan = find_plan(student, torch.zeros(2, 3, 8, 8), 2)
    assert plan.kept_narrow
    # 13 classes, of which one or two reach the limit and the others have a guess each.
    assert plan.trials < 40


def test_trials_that_help_in_the_end_do_not_stop_the_others() -> None:
    plan = find_plan(around(nested(Sums, 3, 2)), torch.zeros(2, 3, 8, 8), 2)
    assert not plan.kept_narrow
    assert plan.trials > 20


def test_trials_in_vain_inside_a_container_are_limited() -> None:
    trials = Trials()
    with trials.of_container():
        for helps, spent in [(True, False), (False, False), (False, True), (True, True)]:
            with trials.of_container():
                assert trials.are_spent() == (trials.count > 30)
                trials.count += 11
                assert trials.are_spent() == spent
                assert trials.are_spent(11)
                if helps:
                    trials.found()
    with trials.of_container():
        assert trials.count == 44
        assert not trials.are_spent()
