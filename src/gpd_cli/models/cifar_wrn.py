"""Wide ResNets for images of 32 x 32 pixels, registered with timm.

These are the networks of Zagoruyko and Komodakis (BMVC 2016, arXiv 1605.07146), without dropout as
in the literature on distillation. Parameters are named as in the checkpoints of this literature, so
that such checkpoints can be loaded.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from gpd_cli.models.classifier import Classifier, cifar_configs, start_from_fan_out

__all__ = ["CifarWideResNet", "PreActivationBlock"]


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU and convolution, twice: ``[B, in, H, W]`` to ``[B, out, H/s, W/s]``.

    If the number of channels changes, the shortcut is a 1 x 1 convolution of the activated input.

    Args:
        in_chans: channels of the input.
        out_chans: channels of the output.
        stride: s, the stride of the first convolution and of the shortcut.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_chans != out_chans:
            self.convShortcut = nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        active = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        x = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return shortcut + x


class _Stage(nn.Module):
    def __init__(self, blocks: int, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreActivationBlock(in_chans, out_chans, stride),
            *(PreActivationBlock(out_chans, out_chans) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x


class CifarWideResNet(Classifier):
    """A stem, three stages of pre-activation blocks at strides 1, 2 and 2, and a classifier.

    Args:
        depth: number of convolutions, plus one for the classifier: 6n + 4 for n blocks a stage.
        widen_factor: factor of the stages' numbers of channels, which are 16, 32 and 64 at 1.
        num_classes: number of outputs; 0 for pooled features instead of logits.
        in_chans: number of image channels.

    Raises:
        ValueError: when the depth is not 6n + 4.
    """

    def __init__(
        self, depth: int, widen_factor: int = 1, num_classes: int = 100, in_chans: int = 3
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 10, 16, 22 or another 6n + 4, not {depth}")
        narrow, middle, wide = (16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(blocks, 16, narrow, stride=1)
        self.block2 = _Stage(blocks, narrow, middle, stride=2)
        self.block3 = _Stage(blocks, middle, wide, stride=2)
        self.bn1 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.finish(
            wide, num_classes, [("block1", narrow, 1), ("block2", middle, 2), ("block3", wide, 4)]
        )
        start_from_fan_out(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[B, 64 widen_factor, H/4, W/4]``, of ``[B, C, H, W]``."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return x


default_cfgs = cifar_configs(
    [f"cifar_wrn_{variant}" for variant in ("16_1", "16_2", "40_1", "40_2")],
    first_conv="conv1",
    classifier="fc",
)


def _build(variant: str, pretrained: bool, **kwargs: Any) -> CifarWideResNet:
    return build_model_with_cfg(CifarWideResNet, variant, pretrained, **kwargs)


@register_model
def cifar_wrn_16_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-1: two blocks a stage, 0.18 million parameters."""
    return _build("cifar_wrn_16_1", pretrained, depth=16, widen_factor=1, **kwargs)


@register_model
def cifar_wrn_16_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-16-2: two blocks a stage, twice as wide, 0.70 million parameters."""
    return _build("cifar_wrn_16_2", pretrained, depth=16, widen_factor=2, **kwargs)


@register_model
def cifar_wrn_40_1(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-1: six blocks a stage, 0.57 million parameters."""
    return _build("cifar_wrn_40_1", pretrained, depth=40, widen_factor=1, **kwargs)


@register_model
def cifar_wrn_40_2(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
    """WRN-40-2: six blocks a stage, twice as wide, 2.26 million parameters."""
    return _build("cifar_wrn_40_2", pretrained, depth=40, widen_factor=2, **kwargs)
