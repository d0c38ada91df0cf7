"""Attention among tokens, ``[B, N, D] -> [B, N, D]``, in many ways in which people write it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "no affine": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "none": lambda width: nn.Identity(),
}


class Attention(nn.Module):
    """Self-attention with one projection.

    ``order`` says how the projection's outputs are laid out. With ``plain_keys`` the second third
    of its biases counts as zero: those of the keys, where the layout has the three parts first.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        order: str = "3HD",
        norm: str = "layer",
        sdpa: bool = True,
        plain_keys: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.order, self.sdpa = heads, width // heads, order, sdpa
        self.plain_keys = plain_keys
        self.scale = self.head_dim**-0.5
        self.norm = NORMS[norm](width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.plain_keys:
            bias = self.qkv.bias.clone()
            third = bias.numel() // 3
            bias[third : 2 * third].zero_()
            y = F.linear(self.norm(x), self.qkv.weight, bias)
        else:
            y = self.qkv(self.norm(x))
        if self.order == "3HD":
            y = y.reshape(b, n, 3, self.num_heads, c // self.num_heads)
            q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        elif self.order == "H3D":
            y = y.view(b, n, self.num_heads, 3 * self.head_dim).transpose(1, 2)
            q, k, v = y.chunk(3, dim=-1)
        elif self.order == "HD3":
            y = y.view(b, n, self.num_heads, self.head_dim, 3)
            q, k, v = y.permute(4, 0, 2, 1, 3).unbind(0)
        else:  # the number of heads by way of their width
            q, k, v = (p.reshape(b, n, -1, self.head_dim).transpose(1, 2) for p in y.chunk(3, -1))
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, c))


class SeparateAttention(nn.Module):
    """Projections of their own: ``fewer`` key and value heads, norms of queries, other names."""

    def __init__(
        self,
        width: int,
        heads: int,
        joint_kv: bool = False,
        kv_heads: int | None = None,
        qk_norm: bool = False,
        output: str = "width",
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.dim_head = width // heads
        self.inner_dim = self.dim_head * heads
        self.joint_kv, self.output = joint_kv, output
        inner = self.dim_head * self.kv_heads
        self.to_q = nn.Linear(width, self.inner_dim, bias=False)
        if joint_kv:
            self.to_kv = nn.Linear(width, 2 * inner)
        else:
            self.to_k, self.to_v = nn.Linear(width, inner), nn.Linear(width, inner)
        self.q_norm = nn.LayerNorm(self.dim_head) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.dim_head) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(self.inner_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, self.heads, self.dim_head).transpose(1, 2)
        if self.joint_kv:
            kv = self.to_kv(x).view(b, n, 2, self.kv_heads, self.dim_head).permute(2, 0, 3, 1, 4)
            k, v = kv[0], kv[1]
        else:
            k = self.to_k(x).unflatten(2, (self.kv_heads, self.dim_head)).transpose(1, 2)
            v = self.to_v(x).unflatten(2, (self.kv_heads, self.dim_head)).transpose(1, 2)
        if self.kv_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y = y.reshape(b, n, self.inner_dim) if self.output == "width" else y.flatten(2)
        return x + self.to_out(y)


class EinsumAttention(nn.Module):
    """Attention in Einstein's notation, with a bias per head and position."""

    def __init__(self, width: int, heads: int, tokens: int, bias: str = "HNN") -> None:
        super().__init__()
        self.n_heads, self.tokens, self.bias = heads, tokens, bias
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        if bias == "HNN":
            self.bias_table = nn.Parameter(torch.zeros(heads, tokens, tokens))
        elif bias == "NNH":
            self.bias_table = nn.Parameter(torch.zeros(tokens, tokens, heads))
        elif bias == "index":  # Swin
            self.bias_table = nn.Parameter(torch.zeros(2 * tokens - 1, heads))
            index = torch.arange(tokens)
            index = index[:, None] - index[None] + tokens - 1
            self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.n_heads, -1)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        if self.bias == "HNN":
            scores = scores + self.bias_table
        elif self.bias == "NNH":
            scores = scores + self.bias_table.permute(2, 0, 1).unsqueeze(0)
        elif self.bias == "index":
            table = self.bias_table[self.relative_position_index.view(-1)]
            scores = scores + table.view(self.tokens, self.tokens, -1).permute(2, 0, 1)
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return x + self.proj(y.flatten(2))


class TorchAttention(nn.Module):
    """PyTorch's own attention, alone or in its encoder layer."""

    def __init__(self, width: int, heads: int, encoder: bool, norm_first: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        if encoder:
            self.layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=norm_first
            )
        else:
            self.norm = nn.LayerNorm(width)
            self.layer = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.encoder:
            return self.layer(x)
        y = self.norm(x)
        return x + self.layer(y, y, y, need_weights=False)[0]


class TalkingAttention(nn.Module):
    """Linear layers across heads before and after the softmax (CaiT)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = self.proj_l((q @ k.mT).permute(0, 2, 3, 1)).softmax(2)
        y = self.proj_w(scores).permute(0, 3, 1, 2) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, c))


class ReducedAttention(nn.Module):
    """Queries in a narrower width than values."""

    def __init__(self, width: int, heads: int, key_dim: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.dim = heads, key_dim, width
        self.d = width // heads
        self.qkv = nn.Linear(width, heads * (2 * key_dim + self.d))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.d], dim=3)
        y = (q @ k.mT * self.key_dim**-0.5).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(b, n, self.dim))


class LastToken(nn.Module):
    """The class token asks the others (class attention)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(b, 1, self.num_heads, -1).permute(0, 2, 1, 3)
        k = self.k(x).reshape(b, n, self.num_heads, -1).permute(0, 2, 1, 3)
        v = self.v(x).reshape(b, n, self.num_heads, -1).permute(0, 2, 1, 3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 1, c)
        return torch.cat([x[:, :1] + self.proj(y), x[:, 1:]], 1)


class RotaryAttention(nn.Module):
    """Rotary position embeddings: pairs of channels within each head, tables in buffers."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        half = self.head_dim // 2
        angles = torch.outer(torch.arange(tokens), 1 / 10 ** (torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(qkv[0]), self.rotate(qkv[1]), qkv[2])
        return x + self.proj(y.transpose(1, 2).reshape(b, n, -1))


class OneHead(nn.Module):
    """Attention over the whole width, whose scores are sums over channels."""

    def __init__(self, width: int, scale: str) -> None:
        super().__init__()
        self.scale, self.dim = scale, width
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        scale = {"shape": q.shape[-1], "attribute": self.dim, "none": 1}[self.scale] ** -0.5
        return x + (q @ k.mT * scale).softmax(-1) @ self.v(x)
