"""Robust Vision Transformers, registered with timm.

These are the networks of Mao et al. (CVPR 2022, arXiv 2105.07926). They have patches from a
convolutional stem, no position embedding and no class token, feed-forward layers with a depthwise
convolution, and average pooling. In the ``plus`` variants, learned weights scale the products of
queries and keys by position. Parameters are named as in the published weights, so that these can be
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from gpd_cli.errors import ModelError
from gpd_cli.models.classifier import Classifier

__all__ = ["RVT", "Attention", "Block", "ConvolutionalMlp"]

_STEM = 32
_STEM_STRIDE = 4
_EPS = 1e-6


class Attention(nn.Module):
    """Self-attention, ``[B, N, C]`` to ``[B, N, C]``.

    With position-aware attention scaling, products of queries and keys are multiplied before the
    softmax by the sigmoid of a learned number for each head and pair of positions.

    Args:
        dim: number of channels, C.
        num_heads: number of attention heads.
        positions: number of positions, N, for position-aware attention scaling; None for attention
            without scaling.
    """

    def __init__(self, dim: int, num_heads: int, positions: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.att_mask: nn.Parameter | None = None
        if positions is not None:
            self.att_mask = nn.Parameter(self.qkv.weight.new_empty(num_heads, positions, positions))
            trunc_normal_(self.att_mask, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """The attention's output."""
        parts = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.att_mask is None:
            x = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        else:
            products = (query * self.scale) @ key.transpose(2, 3)
            x = (products * self._weights(x.shape[1])).softmax(3) @ value
        tokens: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return tokens

    def _weights(self, positions: int) -> Tensor:
        """The factors of the products, ``[heads, N, N]``."""
        assert self.att_mask is not None
        if self.att_mask.shape[-1] != positions:
            raise ModelError(
                f"The network's attention scaling is for {self.att_mask.shape[-1]} patches, but "
                f"this image has {positions}; build the network with the img_size of the images."
            )
        return self.att_mask.sigmoid()


class ConvolutionalMlp(nn.Module):
    """Feed-forward layer with a depthwise convolution, ``[B, C, H, W]`` to ``[B, C, H, W]``.

    Args:
        dim: number of channels, C.
        inner: number of inner channels.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.fc2 = nn.Conv2d(inner, dim, 1)
        self.bn3 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        x = F.gelu(self.bn1(self.fc1(x)))
        x = F.gelu(self.bn2(self.dwconv(x)))
        x = self.bn3(self.fc2(x))
        return x


class Block(nn.Module):
    """Attention and a feed-forward layer, ``[B, H, W, C]`` to ``[B, H, W, C]``.

    Both come after a norm and have a residual connection.

    Args:
        dim: number of channels, C.
        num_heads: number of attention heads.
        mlp_ratio: number of inner channels of the feed-forward layer divided by C.
        drop_path: probability of dropping attention or the feed-forward layer in training.
        positions: number of positions, H x W, for position-aware attention scaling; None for
            attention without scaling.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, positions: int | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, num_heads, positions)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = ConvolutionalMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        tokens = self.norm1(x).flatten(1, 2)
        x = x + self.drop_path(self.attn(tokens).unflatten(1, x.shape[1:3]))
        channels_first = self.norm2(x).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.mlp(channels_first).permute(0, 2, 3, 1))
        return x


class _PatchEmbedding(nn.Module):
    """The stem: images to patches ``[B, dim, H/p, W/p]``, with p the side of a patch.

    It consists of a strided convolution, a strided pooling and a convolution over each patch.

    Args:
        in_chans: number of image channels.
        dim: number of channels of a patch.
        patch_size: side of a patch in pixels, p.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        last = patch_size // _STEM_STRIDE
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, _STEM, 7, 2, padding=2),
            nn.BatchNorm2d(_STEM),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(_STEM, dim, last, last),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x


class _Pooling(nn.Module):
    """A depthwise convolution between stages: ``[B, H, W, C]`` to ``[B, H/2, W/2, out]``."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, 2, padding=1, groups=in_chans)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2))
        return x.permute(0, 2, 3, 1)


class _Stage(nn.Module):
    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x


class RVT(Classifier):
    """A Robust Vision Transformer.

    Args:
        head_dim: width of an attention head.
        depths: number of blocks of each stage.
        heads: number of attention heads of each stage.
        scaled_blocks: how many of the first blocks have position-aware attention scaling.
        mlp_ratio: number of inner channels of the feed-forward layers divided by the number of
            outer channels.
        patch_size: side of a patch in pixels, a multiple of 4.
        img_size: side of the images, or height and width; with position-aware attention scaling
            the network takes no other size.
        drop_path_rate: rate of stochastic depth. Block k of n, counted from 0, drops its layers
            with ``k / n`` of this rate, as in the authors' code; so the last block has a little
            less than the rate.
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.

    Raises:
        ValueError: when the patch size is no multiple of 4, or there are more blocks to scale than
            the first stage has.
    """

    classifier_name = "head"
    output_fmt = "NHWC"

    def __init__(
        self,
        head_dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        scaled_blocks: int = 0,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if patch_size < _STEM_STRIDE or patch_size % _STEM_STRIDE:
            raise ValueError(f"patch_size must be a multiple of 4, not {patch_size}")
        if scaled_blocks > depths[0]:
            raise ValueError(f"scaled_blocks must be at most {depths[0]}, not {scaled_blocks}")
        positions = _positions(img_size, patch_size)
        dims = [head_dim * count for count in heads]
        self.patch_embed = _PatchEmbedding(in_chans, dims[0], patch_size)
        self.transformers, self.pools = nn.ModuleList(), nn.ModuleList()
        ends: list[tuple[str, int, int]] = []
        total = sum(depths)
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if stage:
                self.pools.append(_Pooling(dims[stage - 1], dim))
            blocks = []
            for k in range(depth):
                scaled = positions if len(ends) < scaled_blocks else None
                rate = drop_path_rate * len(ends) / total
                blocks.append(Block(dim, heads[stage], mlp_ratio, rate, scaled))
                ends.append((f"transformers.{stage}.blocks.{k}", dim, patch_size * 2**stage))
            self.transformers.append(_Stage(blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=_EPS)
        self.finish(dims[-1], num_classes, ends)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, h, w, num_features]``, of images ``[B, C, H, W]``."""
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for stage, transformer in enumerate(self.transformers):
            x = transformer(self.pools[stage - 1](x) if stage else x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits ``[B, num_classes]`` of a feature map; pooled features with `pre_logits`."""
        x = self.norm(x.mean((1, 2)))
        return x if pre_logits else self.get_classifier()(x)


def _positions(img_size: int | Sequence[int], patch_size: int) -> int:
    """Compute the number of patches that the stem makes of an image.

    Args:
        img_size: side of the image, or height and width.
        patch_size: side of a patch in pixels.
    """
    count = 1
    for side in (img_size, img_size) if isinstance(img_size, int) else img_size:
        convolved = (side - 3) // 2 + 1
        count *= ((convolved + 1) // 2) // (patch_size // _STEM_STRIDE)
    return count


_IMAGENET = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj.0",
    "classifier": "head",
}

default_cfgs = generate_default_cfgs(
    {
        "rvt_tiny": dict(_IMAGENET),
        "rvt_small": dict(_IMAGENET),
        "rvt_tiny_plus": {**_IMAGENET, "fixed_input_size": True},
        "rvt_small_plus": {**_IMAGENET, "fixed_input_size": True},
    }
)

_TINY: dict[str, Any] = {"head_dim": 32, "depths": (10, 2), "heads": (6, 12)}
_SMALL: dict[str, Any] = {"head_dim": 64, "depths": (12,), "heads": (6,)}


def _build(variant: str, pretrained: bool, arguments: dict[str, Any]) -> RVT:
    return build_model_with_cfg(RVT, variant, pretrained, **arguments)


@register_model
def rvt_tiny(pretrained: bool = False, **kwargs: Any) -> RVT:
    """RVT-Ti: ten blocks of 192 channels and two of 384, 8.65 million parameters."""
    return _build("rvt_tiny", pretrained, {**_TINY, **kwargs})


@register_model
def rvt_small(pretrained: bool = False, **kwargs: Any) -> RVT:
    """RVT-S: twelve blocks of 384 channels, 22.15 million parameters."""
    return _build("rvt_small", pretrained, {**_SMALL, **kwargs})


@register_model
def rvt_tiny_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """RVT-Ti*: position-aware attention scaling in the ten blocks of the first stage."""
    return _build("rvt_tiny_plus", pretrained, {**_TINY, "scaled_blocks": 10, **kwargs})


@register_model
def rvt_small_plus(pretrained: bool = False, **kwargs: Any) -> RVT:
    """RVT-S*: position-aware attention scaling in the first five blocks."""
    return _build("rvt_small_plus", pretrained, {**_SMALL, "scaled_blocks": 5, **kwargs})
