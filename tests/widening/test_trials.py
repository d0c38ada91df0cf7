"""How many runs of parts of a network a search makes in vain, and where it stops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.widening.mismatch import Mismatch
from gpd_cli.widening.search.find import find_plan
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
            self.confirming = True
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
