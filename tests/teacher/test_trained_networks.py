"""Which networks a run trains, and what it says of them."""

import pytest
import timm
import torch
from torch import nn

from gpd_cli.teacher.networks import Alone, summary, with_teacher
from runs import TINY


@pytest.mark.parametrize(
    ("ratio", "branches", "said"),
    [
        (1, 1, "trained alone"),
        (2, 1, "with its dynamic teacher"),
        (1, 2, "with a dynamic teacher that is no wider"),
    ],
)
def test_a_run_says_whether_it_trains_the_student_alone(
    ratio: float, branches: int, said: str
) -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10, **TINY)
    found = with_teacher(network, (1, 16, 16), ratio=ratio, branches=branches, noise=0.0)
    first, *more = summary("resnet18", found).splitlines()
    assert said in first
    assert isinstance(found, Alone) == (ratio == branches == 1)
    # Ratio 1 with branches is easily taken for the student alone.
    told = any("add --model.branches 1 to train the student alone" in line for line in more)
    assert told == (ratio == 1 and branches > 1)


@pytest.mark.parametrize("branches", ["kxk", ["kxk"], [], "linear", ["linear", "kxk"]])
def test_a_teacher_that_would_be_the_student_itself_is_none(branches: str | list[str]) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = with_teacher(network, (1, 16, 16), ratio=1, branches=branches)
    assert isinstance(found, Alone)
