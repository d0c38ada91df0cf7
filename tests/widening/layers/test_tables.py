"""Tables in nn.Embedding: positions, class tokens and biases of attention."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import assert_exact
from gpd_cli import ExpansionError, expand

TOKENS, WIDTH = 16, 16


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64)


class Tokens(nn.Module):
    """Patches, something with a table, and a head."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.patches, self.table = nn.Conv2d(3, WIDTH, 4, 4), table
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.register_buffer("ids", torch.arange(TOKENS)[None], persistent=False)

    def embed(self, x: Tensor) -> Tensor:
        return x + self.table(self.ids)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.patches(x).flatten(2).mT)
        return self.head(self.norm(x).mean(1))


class ClassToken(Tokens):
    def embed(self, x: Tensor) -> Tensor:
        token = self.table(torch.zeros(len(x), 1, dtype=torch.int64))
        return torch.cat([token, x], 1)


class Twice(Tokens):
    def embed(self, x: Tensor) -> Tensor:
        return x + self.table(self.ids) * self.table(self.ids.flip(1))


class WeightItself(Tokens):
    def embed(self, x: Tensor) -> Tensor:
        return x + self.table.weight


class Bags(Tokens):
    def embed(self, x: Tensor) -> Tensor:
        return x + self.table(self.ids[0].unfold(0, 2, 1).repeat(2, 1)[:TOKENS])


class Projected(Tokens):
    def __init__(self, table: nn.Module) -> None:
        super().__init__(table)
        self.project = nn.Linear(WIDTH, WIDTH)

    def embed(self, x: Tensor) -> Tensor:
        return x + self.project(self.table(self.ids))


class Offset(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


class Attention(nn.Module):
    """Attention with a bias by relative position, which may be handed in by the block before."""

    def __init__(self, heads: int, has_table: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(2 * TOKENS - 1, heads) if has_table else None

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.table is not None:
            places = torch.arange(x.shape[1])
            bias = self.table(places[:, None] - places + TOKENS - 1).permute(2, 0, 1)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.proj(y.transpose(1, 2).flatten(2)), bias


class Relative(Tokens):
    """Two attentions: each has a bias of its own, or the second one takes the first one's."""

    def __init__(self, heads: int, shared: bool) -> None:
        super().__init__(nn.Identity())
        self.blocks = nn.ModuleList([Attention(heads, True), Attention(heads, not shared)])

    def embed(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


@pytest.mark.parametrize(
    "build",
    [
        lambda: Tokens(nn.Embedding(TOKENS, WIDTH)),
        lambda: Tokens(nn.Embedding(TOKENS, WIDTH, padding_idx=3)),
        lambda: Tokens(nn.Embedding.from_pretrained(torch.randn(TOKENS, WIDTH))),
        lambda: Tokens(Offset(TOKENS + 2, WIDTH)),
        lambda: ClassToken(nn.Embedding(1, WIDTH)),
        lambda: Twice(nn.Embedding(TOKENS, WIDTH)),
        lambda: WeightItself(nn.Embedding(TOKENS, WIDTH)),
        lambda: Bags(nn.EmbeddingBag(TOKENS, WIDTH, mode="mean")),
        lambda: Bags(nn.EmbeddingBag(TOKENS, WIDTH, mode="max")),
    ],
    ids=["plain", "padding", "frozen", "offset", "token", "twice", "weight", "mean", "max"],
)
def test_tables_widen_with_what_they_are_added_to(build: Callable[[], nn.Module]) -> None:
    pair = assert_exact(build(), images())
    table = pair.teacher.get_parameter("table.weight")
    assert table.shape[1] == 2 * WIDTH
    assert not pair.plan.kept_narrow


@pytest.mark.parametrize("options", [{"ratio": 3}, {"storage": "teacher"}, {"storage": "student"}])
def test_tables_widen_at_any_ratio_and_storage(options: dict[str, object]) -> None:
    assert_exact(Tokens(nn.Embedding(TOKENS, WIDTH)), images(), **options)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("heads", [2, 4])
def test_biases_of_attention_widen_with_its_heads(heads: int, shared: bool) -> None:
    pair = assert_exact(Relative(heads, shared), images())
    assert pair.teacher.get_parameter("blocks.0.table.weight").shape[1] == 2 * heads


def test_padding_rows_stay_as_they_are_in_training() -> None:
    student = Tokens(nn.Embedding(TOKENS, WIDTH, padding_idx=3)).double()
    pair = expand(student, sample=images())
    before = pair.extract().get_parameter("table.weight")
    sum(logits.square().sum() for logits in pair(images())).backward()
    torch.optim.SGD(pair.parameters(), 0.1).step()
    changed = (pair.extract().get_parameter("table.weight") != before).any(1)
    assert changed.tolist() == [row != 3 for row in range(TOKENS)]


def test_an_excluded_table_keeps_its_width() -> None:
    pair = assert_exact(Projected(nn.Embedding(TOKENS, WIDTH)), images(), exclude="table")
    assert pair.teacher.get_parameter("table.weight").shape[1] == WIDTH
    assert pair.teacher.get_parameter("patches.weight").shape[0] == 2 * WIDTH


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"max_norm": 1.0}, "without max_norm"), ({"sparse": True}, "sparse=False")],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_that_cannot_be_exact_are_refused(
    kind: type[nn.Module], settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(ExpansionError, match=rf"^table \({kind.__name__}\) .*{reason}\.$"):
        expand(Tokens(kind(TOKENS, WIDTH, **settings)), sample=images())
