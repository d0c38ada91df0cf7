"""Where random networks begin and end, and how they hold their layers."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_stem(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def patch_stem(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 4, 4)


def pooled_stem(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 5, 2, 2), nn.GroupNorm(2, width), nn.GELU(), nn.MaxPool2d(3, 2, 1)
    )


def depthwise_stem(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, groups=3),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, width, 1),
        nn.SiLU(),
    )


def unshuffle_stem(width: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1))


class LinearPatches(nn.Module):
    """Patches cut out by reshaping, then a linear layer (and back to an image)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.embed_dim = 4, width
        self.norm = nn.LayerNorm(3 * 16)
        self.proj = nn.Linear(3 * 16, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch
        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
        x = self.proj(self.norm(x))
        return x.transpose(1, 2).reshape(b, self.embed_dim, h // p, w // p)


class NormalizedStem(nn.Module):
    """Mean and deviation of the images as buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.9, 1.1, 1.2]).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, width, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv((x - self.mean) / self.std))


class TwoStems(nn.Module):
    """The image itself next to its features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width + 3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.cat([self.conv1(x), F.avg_pool2d(x, 2)], 1))


STEMS: dict[str, Callable[[int], nn.Module]] = {
    "plain": plain_stem,
    "patches": patch_stem,
    "pooled": pooled_stem,
    "depthwise": depthwise_stem,
    "unshuffle": unshuffle_stem,
    "linear": LinearPatches,
    "normalized": NormalizedStem,
    "two": TwoStems,
}


class ToTokens(nn.Module):
    """Images to at most 16 tokens."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.how, self.dim, self.flat = how, width, nn.Flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = F.adaptive_avg_pool2d(x, 4 if self.how == "pool" else 2)
        if self.how == "permute":
            return x.permute(0, 2, 3, 1).reshape(len(x), -1, self.dim)
        return self.flat(x).transpose(1, 2)


Shape = tuple[int, ...]


def pooled_head(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], classes))


def convolution_head(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(shape[0], classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def pointwise_head(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(shape[0], 10, 1),
        nn.Hardswish(),
        nn.Conv2d(10, classes, 1),
        nn.Flatten(),
    )


def flat_head(shape: Shape, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(shape[0] * 4, 10),
        nn.ReLU(),
        nn.Linear(10, classes),
    )


def unflat_head(shape: Shape, classes: int) -> nn.Module:
    """Flat and back, with the number of channels as an argument."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Unflatten(1, (shape[0], 4)),
        nn.Flatten(),
        nn.BatchNorm1d(shape[0] * 4),
        nn.Linear(shape[0] * 4, classes),
    )


class BothPools(nn.Module):
    """Mean and maximum side by side, a norm, and a hidden layer."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = 2 * shape[0], classes
        self.norm = nn.LayerNorm(2 * shape[0])
        self.fc = nn.Linear(2 * shape[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return self.fc(self.norm(x).view(-1, self.num_features)).view(-1, self.num_classes)


IMAGE_HEADS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "pooled": pooled_head,
    "convolution": convolution_head,
    "pointwise": pointwise_head,
    "flat": flat_head,
    "unflat": unflat_head,
    "both pools": BothPools,
}


class TokenHead(nn.Module):
    """A norm, one token, their mean or maximum, or all of them, and a classifier."""

    how = "mean"

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape[1])
        inputs = shape[0] * shape[1] if self.how == "all" else shape[1]
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.how == "all":
            return self.head(x.flatten(1))
        return self.head(x[:, 0] if self.how == "first" else x.mean(dim=1))


class FirstTokenHead(TokenHead):
    how = "first"


class AllTokensHead(TokenHead):
    how = "all"


class DistilledHead(nn.Module):
    """Two classifiers, averaged (DeiT)."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.head, self.head_dist = nn.Linear(shape[1], classes), nn.Linear(shape[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x[:, 0]) + self.head_dist(x[:, -1])) / 2


class AttentionPool(nn.Module):
    """A learned query asks the tokens."""

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(shape[1]))
        self.key, self.value = nn.Linear(shape[1], shape[1]), nn.Linear(shape[1], shape[1])
        self.head = nn.Linear(shape[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.key(x).tanh() * self.query).mean(-1).softmax(1)
        return self.head(torch.einsum("bn,bnd->bd", weights, self.value(x)))


TOKEN_HEADS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mean": TokenHead,
    "first": FirstTokenHead,
    "all": AllTokensHead,
    "distilled": DistilledHead,
    "attention pool": AttentionPool,
}


class Plain(nn.Sequential):
    """Layers in a row."""


class Named(nn.Module):
    """Stem, body and head under names."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        stem, *body, self.head = layers
        self.stem = stem
        self.body = nn.Sequential(OrderedDict((f"layer{k}", layer) for k, layer in enumerate(body)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Listed(nn.Module):
    """Layers in a list that forward walks through."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.num_layers = len(layers)

    def forward(self, x: Tensor) -> Tensor:
        for k in range(self.num_layers):
            x = self.blocks[k](x)
        return x


class Owner(nn.Module):
    """A network that owns parameters and reads its width itself."""

    def __init__(self, *layers: nn.Module, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.scale = nn.Parameter(torch.ones(width, 1, 1))
        self.register_buffer("shift", torch.linspace(-1, 1, width).view(1, width, 1, 1))
        self.stem, *blocks = layers
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.scale + self.shift
        x = x.reshape(x.shape[0], self.num_features, *x.shape[2:])
        for block in self.blocks:
            x = block(x)
        return x
