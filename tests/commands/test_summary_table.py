"""The size and compute that `expand` and `extract` print."""

import pytest
import timm
import torch
from torch import Tensor, nn

from gpd_cli import expand
from gpd_cli.commands.summary_table import cost
from gpd_cli.teacher.build import merged_teacher


def test_attention_counts() -> None:
    tokens, width, depth = 197, 192, 12
    layers = depth * tokens * 12 * width**2 + 196 * 3 * 16**2 * width + 1000 * width
    attention = depth * 2 * tokens**2 * width
    found = cost(timm.create_model("deit_tiny_patch16_224"), (3, 224, 224))
    assert found.macs == layers + attention


class Looks(nn.Module):
    """A network whose code looks at values, which only real tensors have."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.a, self.b, self.looks = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), looks

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mean((2, 3))
        return self.b(x if self.looks and x.sum().item() > 1e9 else x.relu())


@pytest.mark.parametrize("looks", [True, False])
def test_the_wide_network_is_counted_from_its_plan(looks: bool) -> None:
    student = Looks(looks).train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    pair = expand(student, sample=torch.zeros(2, 3, 8, 8), branches=2)
    assert cost(student, (3, 8, 8), pair.plan) == cost(merged_teacher(pair), (3, 8, 8))
    assert cost(student, (3, 8, 8)).parameters == sum(p.numel() for p in student.parameters())
    after = student.state_dict()
    assert student.training
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
