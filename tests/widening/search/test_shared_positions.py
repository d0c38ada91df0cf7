"""Biases by relative position that one module makes for the attention of every block."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exactness import assert_exact

VIT = {"img_size": 32, "patch_size": 8, "num_classes": 5, "depth": 2, "embed_dim": 48}


def images(side: int = 32) -> Tensor:
    return torch.randn(3, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize(("own", "fused"), [(True, True), (False, True), (True, False)])
def test_beit_with_a_shared_table(own: bool, fused: bool) -> None:
    student = timm.create_model(
        "beit_base_patch16_224",
        **VIT,
        num_heads=3,
        use_rel_pos_bias=own,
        use_shared_rel_pos_bias=True,
        use_abs_pos_emb=False,
    )
    for block in student.blocks:
        block.attn.fused_attn = fused
    pair = assert_exact(student, images())
    assert not pair.plan.kept_narrow
    assert pair.teacher.get_submodule("blocks.1.attn").num_heads == 6
    assert pair.teacher.get_parameter("rel_pos_bias.relative_position_bias_table").shape[1] == 6


@pytest.mark.parametrize("kind", ["mlp", "bias"])
def test_vit_with_shared_relative_positions(kind: str) -> None:
    student = timm.create_model(
        "vit_srelpos_small_patch16_224",
        **VIT,
        num_heads=3,
        rel_pos_type=kind,
        rel_pos_dim=32 if kind == "mlp" else None,
    )
    for module in student.modules():
        if isinstance(module, nn.Dropout):  # in the module that makes the biases
            module.p = 0.0
    assert not assert_exact(student, images()).plan.kept_narrow


class Bias(nn.Module):
    """A table of biases; it takes nothing, or whole numbers."""

    def __init__(self, heads: int, tokens: int, reshapes: bool) -> None:
        super().__init__()
        self.n_heads, self.tokens, self.reshapes = heads, tokens, reshapes
        self.table = nn.Parameter(torch.zeros(2 * tokens - 1, heads))

    def forward(self, places: Tensor | None = None) -> Tensor:
        places = torch.arange(self.tokens) if places is None else places
        bias = self.table[(places[:, None] - places + self.tokens - 1).flatten()]
        if self.reshapes:
            return bias.reshape(self.tokens, self.tokens, self.n_heads).permute(2, 0, 1)
        return bias.mT.unflatten(1, (self.tokens, self.tokens))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, heads: int, reshapes: bool, numbered: bool) -> None:
        super().__init__()
        width, tokens = 16, 16
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.bias, self.numbered = Bias(heads, tokens, reshapes), numbered
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        bias = self.bias(torch.arange(x.shape[1])) if self.numbered else self.bias()
        for block in self.blocks:
            x = block(x, bias)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("heads", "reshapes", "numbered"), [(2, False, False), (2, True, False), (4, True, True)]
)
def test_a_table_of_ones_own_for_all_blocks(heads: int, reshapes: bool, numbered: bool) -> None:
    pair = assert_exact(Net(heads, reshapes, numbered), images(16))
    assert not pair.plan.kept_narrow
    assert pair.teacher.get_parameter("bias.table").shape[1] == 2 * heads
