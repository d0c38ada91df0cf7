"""Blocks on tokens other than attention, ``[B, N, D] -> [B, N', D]``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.attention import NORMS


class Mlp(nn.Module):
    """Two linear layers behind a norm, with or without a gate and a layer scale."""

    def __init__(self, width: int, how: str = "plain", norm: str = "layer") -> None:
        super().__init__()
        self.how, self.norm = how, NORMS[norm](width)
        hidden = 2 * width
        self.fc1 = nn.Linear(width, hidden if how == "plain" else 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(self.norm(x))
        if self.how == "plain":
            y = F.gelu(y)
        elif self.how == "swiglu":
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y
        else:
            y = F.glu(y)
        return x + self.gamma * self.fc2(y)


class Mixer(nn.Module):
    """Linear layers across tokens."""

    def __init__(self, width: int, tokens: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, hidden), nn.GELU(), nn.Linear(hidden, tokens))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)


class SpatialGating(nn.Module):
    """Half of the channels, mixed across tokens, gates the other half (gMLP)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.fc1(x)).chunk(2, dim=-1)
        v = self.mix(self.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return x + self.fc2(u * v)


class Recurrent(nn.Module):
    """A hand-written gated recurrent unit along the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_size = width
        self.x2h, self.h2h = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden_size)
        outputs = []
        for token in x.unbind(1):
            xr, xz, xn = self.x2h(token).chunk(3, 1)
            hr, hz, hn = self.h2h(h).split(self.hidden_size, 1)
            new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * new + z * h
            outputs.append(h)
        return torch.stack(outputs, 1)


class Embedding(nn.Module):
    """Class token and position embeddings, of several shapes and names, parameters or buffers."""

    def __init__(
        self, width: int, tokens: int, cls: bool, pos: str = "[1,N,D]", buffer: bool = False
    ) -> None:
        super().__init__()
        self.embed_dim = width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls else None
        shape = {
            "[1,N,D]": (1, tokens + cls, width),
            "[N,D]": (tokens + cls, width),
            "[D]": (width,),
        }[pos]
        table = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        if buffer:
            self.register_buffer("pos", table)
        else:
            self.pos = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], 1, self.embed_dim), x], dim=1)
        return x + self.pos


class LocalMlp(nn.Module):
    """Tokens but the class token as a map in between, for a depthwise convolution (PVT)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dw = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h = int(n**0.5)
        first, y = self.fc1(x).split([n - h * h, h * h], dim=1)
        y = y.transpose(1, 2).reshape(b, y.shape[2], h, h)
        y = torch.cat([first, self.dw(y).flatten(2).transpose(1, 2)], 1)
        return x + self.fc2(F.gelu(y))


class AlongTokens(nn.Module):
    """One-dimensional convolutions along the tokens, and a batch norm."""

    def __init__(self, width: int, depthwise: bool) -> None:
        super().__init__()
        groups = width if depthwise else 1
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(F.silu(self.conv(x.mT))).mT


class Table(nn.Module):
    """Position embeddings from `nn.Embedding`."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.position = nn.Embedding(tokens, width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.position(torch.arange(x.shape[1])))


class OneModule(nn.Module):
    """A transformer block that holds attention and MLP as direct children."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.ln1(x)).split(self.dim, dim=2)
        q, k, v = (
            y.view(b, n, self.heads, self.dim // self.heads).transpose(1, 2) for y in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
        x = x + self.out(y.view(b, n, self.dim))
        return x + self.down(F.gelu(self.up(self.ln2(x))))
