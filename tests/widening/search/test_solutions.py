"""How attributes grew in a module of a class is tried first in others of the class."""

import pytest
import torch
from torch import Tensor, nn

from exactness import assert_exact
from gpd_cli.widening.search.solutions import Solutions

IMAGES = torch.randn(5, 3, 16, 16, dtype=torch.float64)


class Scaled(nn.Module):
    """Attention whose scale comes from the width of its input and its own number of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.count = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        parts = self.qkv(x).reshape(b, n, 3, self.count, c // self.count).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        attention = (q * (c // self.count) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return x + self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class Tokens(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize("heads", [(3, 3, 3), (2, 3, 4)])
def test_the_second_run_of_a_code_is_made_once_per_class(heads: tuple[int, ...]) -> None:
    pair = assert_exact(Tokens(*(Scaled(12, k) for k in heads)), IMAGES, branches=2)
    assert [block.count for block in pair.teacher.blocks] == [2 * k for k in heads]
    assert not pair.plan.kept_narrow
    assert pair.plan.trials == 2  # in the first: another layout, and numbers not solved yet


def modules() -> dict[str, nn.Module]:
    network = nn.ModuleDict({"a": Scaled(12, 3), "b": Scaled(12, 4), "c": nn.Linear(2, 2)})
    return dict(network.named_modules())


def test_attributes_grow_by_the_same_factor() -> None:
    solutions = Solutions(modules())
    solutions.remember("a", {}, {"a": {"count": 6}, "c": {"out_features": 4}})
    assert solutions.of("b", {}) == {"b": {"count": 8}}
    assert solutions.of("b", {"b": {"count": 4}}) == {}  # it has grown already
    assert solutions.of("c", {}) == {}  # of another class


def test_what_grows_to_no_whole_number_is_not_tried() -> None:
    solutions = Solutions(modules())
    solutions.remember("a", {}, {"a": {"count": 4}})
    assert solutions.of("b", {}) == {}


def test_lists_are_not_remembered() -> None:
    known = modules()
    known["a"].count = [3, 3]
    solutions = Solutions(known)
    solutions.remember("a", {}, {"a": {"count": [6, 3]}})
    assert solutions.of("b", {}) == {}
