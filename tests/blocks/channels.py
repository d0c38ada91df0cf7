"""Blocks on images that take channels apart and put them together again."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.image import ConvNormAct, conv


class Concatenation(nn.Module):
    """Parallel branches side by side (Inception), in front of or behind the input (DenseNet)."""

    def __init__(self, width: int, growth: tuple[int, ...], keep: str = "") -> None:
        super().__init__()
        self.keep = keep
        self.branches = nn.ModuleList(
            nn.Sequential(conv(width, size, 2 * (k % 2) + 1), nn.BatchNorm2d(size))
            for k, size in enumerate(growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        if self.keep:
            parts.insert(0 if self.keep == "first" else len(parts), x)
        return torch.cat(parts, dim=1)


class CrossStage(nn.Module):
    """Split, work on a part, concatenate; the split written in one of five ways."""

    def __init__(self, width: int, half: int, how: str) -> None:
        super().__init__()
        self.how, self.half, self.sizes = how, half, [half, half]
        self.conv_in = conv(width, 2 * half)
        self.body = ConvNormAct(half, half, 3)
        self.conv_out = conv(2 * half, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.how == "chunk":
            left, right = x.chunk(2, dim=1)
        elif self.how == "split by size":
            left, right = torch.split(x, self.half, dim=1)
        elif self.how == "split by sizes":
            left, right = x.split(self.sizes, dim=1)
        elif self.how == "slices":
            left, right = x[:, : self.half], x[:, self.half :]
        else:
            left, right = x[:, ::2], x[:, 1::2]
        return self.conv_out(torch.cat([self.body(left), right], 1))


class PartialConv(nn.Module):
    """A convolution on the first channels only (FasterNet); widths in attributes of other names."""

    def __init__(self, width: int, part: int) -> None:
        super().__init__()
        self.dim_conv, self.dim_untouched = part, width - part
        self.partial = conv(part, part, 3, bias=False)
        self.mlp = nn.Sequential(conv(width, 2 * width), nn.ReLU(), conv(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.dim_conv, self.dim_untouched], dim=1)
        return x + self.mlp(torch.cat((self.partial(a), b), 1))


class Hierarchical(nn.Module):
    """Parts that feed each other in turn (Res2Net)."""

    def __init__(self, width: int, scales: int) -> None:
        super().__init__()
        self.scales, self.width = scales, width // scales
        self.convs = nn.ModuleList(conv(self.width, self.width, 3) for _ in range(scales - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = torch.split(x, self.width, 1)
        outputs = [first]
        for layer, part in zip(self.convs, rest, strict=True):
            outputs.append(layer(part + outputs[-1]))
        return torch.cat(outputs, 1)


class Shuffle(nn.Module):
    """Channel shuffle (ShuffleNet), by reshaping or as the module of that name."""

    def __init__(self, width: int, groups: int, how: str) -> None:
        super().__init__()
        self.groups, self.how = groups, how
        self.conv1 = conv(width, width, groups=groups)
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = conv(width, width, 3, groups=width)
        self.conv3 = conv(width, width, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        b, c, h, w = y.shape
        if self.how == "module":
            y = self.shuffle(y)
        elif self.how == "view":
            y = y.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        else:
            y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return x + self.conv3(F.relu(self.conv2(y)))


class SelectiveKernel(nn.Module):
    """Softmax over branches, channel by channel (SKNet)."""

    def __init__(self, width: int, paths: int = 2) -> None:
        super().__init__()
        self.num_paths, self.attn_channels = paths, width
        self.paths = nn.ModuleList(conv(width, width, 2 * k + 1) for k in range(paths))
        self.fc = conv(width, 4)
        self.select = conv(4, width * paths, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([path(x) for path in self.paths], dim=1)
        gate = self.select(self.fc(y.sum(1).mean((2, 3), keepdim=True)).relu())
        gate = gate.view(len(x), self.num_paths, self.attn_channels, 1, 1).softmax(1)
        return (y * gate).sum(1)


class SplitAttention(nn.Module):
    """Grouped convolution whose radix groups are summed under a softmax (ResNeSt)."""

    def __init__(self, width: int, radix: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, groups
        self.conv = conv(width, width * radix, 3, groups=groups * radix)
        self.fc1 = conv(width, 4 * groups, groups=groups)
        self.fc2 = conv(4 * groups, width * radix, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        b, rc, h, w = x.shape
        x = x.reshape(b, self.radix, rc // self.radix, h, w)
        gate = self.fc2(F.relu(self.fc1(x.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(b, self.cardinality, self.radix, -1).transpose(1, 2).softmax(1)
        return (x * gate.reshape(b, self.radix, rc // self.radix, 1, 1)).sum(1)


class NonLocal(nn.Module):
    """Attention between pixels, with 1 x 1 convolutions for projections."""

    def __init__(self, width: int, heads: int, how: str) -> None:
        super().__init__()
        self.num_heads, self.dim, self.how = heads, width, how
        self.qkv, self.proj = conv(width, 3 * width), conv(width, width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.how == "view":
            q, k, v = self.qkv(x).view(b, 3, self.num_heads, c // self.num_heads, h * w).unbind(1)
        elif self.how == "dim":
            q, k, v = (
                part.reshape(b, self.num_heads, self.dim // self.num_heads, h * w)
                for part in self.qkv(x).split(self.dim, 1)
            )
        else:  # queries, keys and values of each head together
            q, k, v = self.qkv(x).view(b, self.num_heads, -1, h * w).chunk(3, dim=2)
        if self.how == "channels":  # cross-covariance attention
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            weights = (q @ k.mT * self.temperature).softmax(-1)
            y = weights @ v
        else:
            weights = (q.mT @ k * self.temperature / math.sqrt(q.shape[2])).softmax(-1)
            y = v @ weights.mT
        return x + self.proj(y.reshape(b, c, h, w))


class EfficientChannelAttention(nn.Module):
    """A 1-d convolution along the channels (ECA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gate.view(len(x), -1, 1, 1)
